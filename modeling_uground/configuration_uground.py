"""Configuration of UGround: an LMM trunk, a SAM, and the settings of what lies between them."""

import copy
import os
from collections.abc import Iterable
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .attention_parts import attention_of_parts
from .checkpoint_files import check_config_fields, own_hints, read_json_object, reason_of
from .head_sam import SamHead
from .head_sam2 import Sam2Head
from .image_frames import FRAMES, ImageFrame
from .known_names import nearest_name
from .lmm_access import LmmAdapter
from .lmm_families import lmm_adapter, usual_frame
from .prompt_points import PointSettings
from .prompts import PROMPTS
from .similarity import SIMILARITY_SCALINGS

logger = logging.get_logger(__name__)

# Version of the package that this code belongs to; published code has no package to ask.
CODE_VERSION = "0.1.0"
# Oldest minor version of transformers that this code is tested with: the floor of `setup.py`.
TESTED_TRANSFORMERS = "5.23"
LAYER_SELECTIONS = ("sample", "argmax", "last", "mc")
# Those that ask the layer policy.
POLICY_RULES = ("sample", "argmax", "mc")
EMBEDDING_LAYERS = ("selected", "last")
MASK_HEADS = {"sam": SamHead, "sam2": Sam2Head}
# Of SAMs that one might expect to work, why they do not.
VIDEO_REASON = ", of which only the image part can be used: see `python -m uground.hub.assemble`"
REFUSED_SAMS = {
    "edgetam": ", whose encoder needs the package timm",
    "edgetam_video": ", whose encoder needs the package timm",
    "sam_hq": ", whose decoder also reads the inside of its encoder",
    "sam3": ", which finds things by text and takes no prompts of ours; its tracker does",
    **dict.fromkeys(("sam2_video", "sam3_tracker_video", "sam3_video"), VIDEO_REASON),
}
POINT_SETTINGS = ("num_points", "point_thresholds", "point_downsample")
DEFAULT_PROMPTS = ("embedding", "mask")
# Of the published systems that are settings of the same parts; DESIGN of each in its paper. The LMM and the SAM are
# those that the caller names.
SYSTEMS = {
    "lisa": {
        "image_frame": "centre_crop",
        "prompts": ("embedding",),
        "layer_policy": False,
        "layer_selection": "last",
    },
    "sesame": {
        "image_frame": "centre_crop",
        "prompts": ("embedding",),
        "layer_policy": False,
        "layer_selection": "last",
    },
    "read": {
        "image_frame": "centre_crop",
        "prompts": ("embedding", "points"),
        "layer_policy": False,
        "layer_selection": "last",
        "similarity_scaling": "minmax",
    },
    "uground": {"image_frame": "letterbox", "prompts": ("embedding", "mask"), "layer_policy": True},
}
# Of release 0.1.0, where they stood beside the weights; they are settings of training.
EARLIER_KEYS = ("policy_baseline", "policy_ema_decay", "critic_hidden_size")
# Where `pipeline("referring-segmentation", model=folder)` finds the pipeline, in a file beside `config.json`.
CUSTOM_PIPELINES = {
    "referring-segmentation": {
        "impl": "pipeline_uground.ReferringSegmentationPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


class UGroundConfig(PreTrainedConfig):
    r"""
    Configuration of [`UGroundForReferringSegmentation`].

    Args:
        lmm_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision-language trunk, an `AutoModelForImageTextToText` of a family in `LMM_ADAPTERS`.
        sam_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the SAM that draws the masks: a `SamConfig`, whose patch size is 16, a `Sam2Config` (SAM 2
            and 2.1) or a `Sam3TrackerConfig`. `None` stays `None`: a model without SAM.
        segment_token_id (`int`, *optional*):
            Id of `[SEG]`, in the vocabulary of the LMM. Resolve it by name with the tokenizer.
        reject_token_id (`int`, *optional*):
            Id of `[REJ]`; `None` for models that cannot reject by token.
        image_frame (`str`, *optional*):
            What the LMM sees of an image: `"letterbox"`, `"centre_crop"` or `"stretch"`. By default the usual one of
            the LMM's family: `"letterbox"` for LLaVA, `"stretch"` for one that sees images in their own proportions.
        mask_head (`str`, *optional*):
            What turns segments into masks: `"sam"`, or `"sam2"` for SAM 2, SAM 2.1 and the tracker of SAM 3. By
            default the one for `sam_config`; without one there is none, and a segment is its similarity map.
        prompts (`tuple[str]`, *optional*):
            What the mask head gets of each segment: the projected segment state (`"embedding"`), the similarity map
            (`"mask"`), points where it is high and low (`"points"`). By default embedding and mask, and without a mask
            head nothing.
        num_points (`int`, defaults to 30):
            Points per segment.
        point_thresholds (`tuple[float, float]`, defaults to `(0.8, 0.2)`):
            A cell of the similarity map, scaled to [0, 1], is a positive point from the first on, a negative one up to
            the second.
        point_downsample (`int`, defaults to 2):
            Image tokens along each axis that make one cell.
        layer_policy (`bool`, defaults to `True`):
            Whether the model has a policy that picks layers; without, `layer_selection` is `"last"` or a number.
        layer_selection (`str` or `int`, defaults to `"argmax"`):
            How a layer is chosen when a call does not say: `"sample"`, `"argmax"`, `"last"`, `"mc"` or a layer number.
        num_layer_samples (`int`, defaults to 8):
            Number of layers drawn per segment under `"mc"`.
        similarity_scaling (`str`, defaults to `"scaled"`):
            `"minmax"` maps the dot products of a segment to [0, 1] as the official code does; `"scaled"` is
            dot / sqrt(D) plus a learned bias per layer, a true logit.
        embedding_layer (`str`, defaults to `"selected"`):
            Layer whose segment state is projected: the selected one (official mode 3) or the last (mode 2).
        reject_threshold (`float`, defaults to 0.0):
            Peak of a similarity map, as a probability, below which it says that nothing is there; 0 leaves that to
            the reject token. Needs `similarity_scaling="scaled"`. `benchmarks/rejection.py` measures it.
        num_segment_tokens (`int`, defaults to 1):
            Ids that one segment stands for inside of the model, K. In text it is one `[SEG]`.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of new linear layers.
        custom_pipelines (`dict`, *optional*):
            Pipelines that come with the checkpoint, as `transformers.pipeline` reads them.
        uground_version (`str`, *optional*):
            Version of the code the checkpoint was saved by; stamped on saving.

    Raises:
        ValueError: a setting is outside of what is listed above, or has a name that resembles one of these.
    """

    model_type = "uground"
    # A trainer's `predict` gathers the outputs of every batch but these.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "sam_embeddings"]
    sub_configs_defaults: ClassVar[dict] = {
        "lmm_config": SubConfigSpec(config_class=AutoConfig, model_type="llava"),
        "sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam"),
    }

    lmm_config: dict | PreTrainedConfig | None = None
    sam_config: dict | PreTrainedConfig | None = None
    segment_token_id: int | None = None
    reject_token_id: int | None = None
    image_frame: str | None = None
    mask_head: str | None = None
    prompts: list[str] | tuple[str, ...] | None = None
    num_points: int = 30
    point_thresholds: list[float | int] | tuple[float | int, float | int] = (0.8, 0.2)
    point_downsample: int = 2
    layer_policy: bool = True
    layer_selection: str | int = "argmax"
    num_layer_samples: int = 8
    similarity_scaling: str = "scaled"
    embedding_layer: str = "selected"
    reject_threshold: float | int = 0.0
    num_segment_tokens: int = 1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    custom_pipelines: dict | None = None
    uground_version: str | None = None

    def __post_init__(self, **kwargs):
        for name in EARLIER_KEYS:
            kwargs.pop(name, None)
        refuse_misspelt(kwargs)
        has_sam = self.sam_config is not None
        super().__post_init__(**kwargs)
        if not has_sam:
            self.sam_config = None
        if self.image_frame is None:
            self.image_frame = usual_frame(self.lmm_config)
        if self.mask_head is None and has_sam:
            self.mask_head = mask_head_of(self.sam_config)
        if self.prompts is None:
            self.prompts = DEFAULT_PROMPTS if self.mask_head else ()
        for name in ("prompts", "point_thresholds"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))
        if self.custom_pipelines is None:
            self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        self._check_settings()

    def _check_settings(self):
        given = self.prompts
        if (
            not isinstance(given, tuple)
            or any(prompt not in PROMPTS for prompt in given)
            or len({*given}) < len(given)
        ):
            raise ValueError(f"prompts must be of {tuple(PROMPTS)}, each at most once, got {given!r}")
        for name, value, allowed in (
            ("similarity_scaling", self.similarity_scaling, SIMILARITY_SCALINGS),
            ("embedding_layer", self.embedding_layer, EMBEDDING_LAYERS),
            ("image_frame", self.image_frame, FRAMES),
            ("mask_head", self.mask_head, (None, *MASK_HEADS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        lmm_adapter(self.lmm_config, self.image_frame)
        if (self.mask_head is None) != (self.sam_config is None):
            raise ValueError(f"mask_head 'sam' and a sam_config go together, got mask_head {self.mask_head!r}")
        if self.mask_head and self.mask_head != mask_head_of(self.sam_config):
            raise ValueError(
                f"mask_head of a {self.sam_config.model_type} must be {mask_head_of(self.sam_config)!r}, got "
                f"{self.mask_head!r}"
            )
        if self.mask_head and not self.prompts:
            raise ValueError(f"a mask head needs prompts of {tuple(PROMPTS)}, got ()")
        if self.prompts and not self.mask_head:
            raise ValueError(f"prompts are for a mask head, which needs a sam_config, got {self.prompts} without one")
        if not isinstance(self.layer_policy, bool):
            raise ValueError(f"layer_policy must be True or False, got {self.layer_policy!r}")
        for name in ("num_layer_samples", "num_segment_tokens", "num_points", "point_downsample"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        check_layer_selection(self.layer_selection, self.num_layers, self.layer_policy)
        if self.mask_head:
            MASK_HEADS[self.mask_head].frame_of(self.sam_config)
        self._check_points()
        self._check_rejection()
        self.check_token_ids()

    def _check_points(self) -> None:
        given = self.point_thresholds
        is_pair = isinstance(given, tuple) and len(given) == 2 and {*map(type, given)} <= {int, float}
        if not is_pair or not 0.0 <= given[1] < given[0] <= 1.0:
            raise ValueError(
                "point_thresholds must be two numbers in 0..1, that of positive points above that of negative ones, "
                f"got {given!r}"
            )
        if "points" not in self.prompts or self.token_grid_hw is None:
            return
        rows, columns = self.token_grid_hw
        if rows % self.point_downsample or columns % self.point_downsample:
            raise ValueError(
                f"point_downsample must divide the {rows} x {columns} token grid, got {self.point_downsample}"
            )

    def _check_rejection(self) -> None:
        given = self.reject_threshold
        if type(given) not in (int, float) or not 0.0 <= given <= 1.0:
            raise ValueError(f"reject_threshold must be a number within 0..1, got {given!r}")
        if given and self.similarity_scaling != "scaled":
            raise ValueError(
                f"reject_threshold needs similarity_scaling 'scaled', whose maps have a strength, got {given} with "
                f"{self.similarity_scaling!r}"
            )

    def check_token_ids(self) -> None:
        """
        Compare the ids of special tokens with the vocabulary of the LMM and with one another.

        A config that does not name its segment token is not yet that of a model that can be asked, and passes.

        Raises:
            ValueError: an id is outside of the vocabulary, or two are equal.
        """
        names = ("segment_token_id", "reject_token_id", "image_token_id")
        ids = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.segment_token_id is None:
            return
        size = self.get_text_config().vocab_size
        for name, value in ids.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
                raise ValueError(f"{name} must lie in the vocabulary of {size} tokens, got {value!r}")
            same = [other for other in names if other != name and ids.get(other) == value]
            if same:
                raise ValueError(f"{name} and {same[0]} must differ, got {value} for both")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_dict`; warns, once, if the installed transformers is older than the tested."""
        installed = transformers.__version__
        if _minor_version(installed) < _minor_version(TESTED_TRANSFORMERS):
            logger.warning_once(
                f"uground {CODE_VERSION} was tested with transformers {TESTED_TRANSFORMERS} and later, "
                f"installed is {installed}"
            )
        refuse_misspelt(kwargs)
        check_config_fields(config_dict, own_hints(cls))
        try:
            return super().from_dict(config_dict, **kwargs)
        except (ValueError, OSError):
            raise
        except Exception as error:  # transformers raises whatever a value of another type leads it to
            raise ValueError(f"config.json cannot be used ({reason_of(error)})") from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_pretrained`; what is wrong with a `config.json` is said with its place."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            place, said = str(pretrained_model_name_or_path), reason_of(error)
            if place in said:
                raise
            raise ValueError(f"{place}/config.json: {said.removeprefix('config.json').lstrip(': ')}") from error

    @classmethod
    def _dict_from_json_file(cls, json_file):
        return cls._decode_special_floats(read_json_object(json_file))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Like `PreTrainedConfig.save_pretrained`, stamped with the version of the code that goes with it."""
        self.uground_version = CODE_VERSION
        # What was loaded from a repository names that repository here; the copy has its own.
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def _attn_implementation(self) -> str | None:
        return PreTrainedConfig._attn_implementation.fget(self)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        # Every way of loading a model with an `attn_implementation` ends here.
        PreTrainedConfig._attn_implementation.fset(self, attention_of_parts(value))

    @property
    def num_layers(self) -> int:
        """L + 1: the number of layer states of a token, embeddings and final norm included."""
        return self.get_text_config().num_hidden_layers + 1

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that stands once per image token in `input_ids`."""
        return self.lmm_config.image_token_id

    @property
    def adapter(self) -> LmmAdapter:
        """What the package knows of the LMM's family."""
        return lmm_adapter(self.lmm_config, self.image_frame)

    @property
    def token_grid_hw(self) -> tuple[int, int] | None:
        """Rows and columns of the LMM's image tokens; `None` where each image has a grid of its own."""
        return self.adapter.token_grid_hw

    @property
    def head_frame(self) -> ImageFrame | None:
        """What the mask head sees of an image, in pixels; `None` without one."""
        return MASK_HEADS[self.mask_head].frame_of(self.sam_config) if self.mask_head else None

    @property
    def frame_size(self) -> int:
        """Side of the SAM frame in pixels."""
        return self.head_frame.side

    @property
    def point_settings(self) -> PointSettings:
        """How points are picked from similarity maps."""
        positive, negative = self.point_thresholds
        return PointSettings(self.num_points, (positive, negative), self.point_downsample)

    @classmethod
    def for_system(cls, system: str, **settings: Any) -> "UGroundConfig":
        """
        The settings of a published system.

        Args:
            system: `"lisa"`, `"sesame"`, `"read"` or `"uground"`.
            settings: of [`UGroundConfig`], over those of the system: `lmm_config` and `sam_config` at least.

        Raises:
            ValueError: there is no such system, or a setting does not fit.
        """
        if system not in SYSTEMS:
            raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}")
        chosen = {**SYSTEMS[system], **settings}
        given = [name for name in POINT_SETTINGS if name in settings]
        if given and "points" not in (chosen["prompts"] or ()):
            raise ValueError(f"{', '.join(given)} need the prompt 'points', but {system} has {chosen['prompts']}")
        return cls(**chosen)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's part of `lmm_config`, where vocabulary and hidden size stand."""
        return self.lmm_config.get_text_config(*args, **kwargs)


def _minor_version(version: str) -> tuple[int, ...]:
    """`"5.24.0.dev0"` to (5, 24)."""
    return tuple(map(int, version.split(".")[:2]))


def mask_head_of(sam_config: PreTrainedConfig) -> str:
    """
    Which of `MASK_HEADS` takes a SAM.

    Raises:
        ValueError: none does.
    """
    kind = sam_config.model_type
    for name, head in MASK_HEADS.items():
        if kind in head.model_types:
            return name
    known = [kind for head in MASK_HEADS.values() for kind in head.model_types]
    reason = REFUSED_SAMS.get(kind, "")
    raise ValueError(f"sam_config must be of type {', '.join(known)}, got {kind}{reason}")


def refuse_misspelt(names: Iterable[str]) -> None:
    """
    Raise a `ValueError` if a name resembles a field of [`UGroundConfig`], or is that of a value that it computes.

    Other names pass: transformers, and tools around it, add keys of their own.
    """
    members = vars(UGroundConfig)
    own = set(UGroundConfig.__annotations__) - {"sub_configs_defaults"}
    for name in names:
        if isinstance(members.get(name), property):
            raise ValueError(f"config key {name} is computed from lmm_config and sam_config, and cannot be set")
        near = None if name in own else nearest_name(name, own)
        if near is not None:
            raise ValueError(f"unknown config key {name}, expected {near}")


def check_layer_selection(layer_selection: str | int, num_layers: int, has_policy: bool = True) -> None:
    """Raise a `ValueError` unless `layer_selection` is a rule that can be followed or a layer in 0..num_layers-1."""
    if not has_policy and layer_selection in POLICY_RULES:
        raise ValueError(
            f"layer_selection {layer_selection!r} needs a layer policy, which this model has not; expected 'last' or "
            "a layer number"
        )
    if isinstance(layer_selection, str):
        if layer_selection not in LAYER_SELECTIONS:
            raise ValueError(
                f"layer_selection must be one of {LAYER_SELECTIONS} or a layer number, got {layer_selection!r}"
            )
    elif isinstance(layer_selection, bool) or not isinstance(layer_selection, int):
        raise ValueError(
            f"layer_selection must be one of {LAYER_SELECTIONS} or a layer number, got {layer_selection!r}"
        )
    elif not 0 <= layer_selection < num_layers:
        raise ValueError(f"layer_selection must lie in 0..{num_layers - 1} for this model, got {layer_selection}")


UGroundConfig.register_for_auto_class()

__all__ = ["UGroundConfig"]
