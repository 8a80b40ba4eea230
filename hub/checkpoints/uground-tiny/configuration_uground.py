"""Configuration of UGround: an LMM trunk, a SAM, and the settings of what lies between them."""

import copy
from typing import ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig, SamConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Version of the package that this code belongs to; published code has no package to ask.
CODE_VERSION = "0.1.0"
# Minor version of transformers that this code was tested with.
TESTED_TRANSFORMERS = "5.23"
PROMPTS = ("embedding", "mask")
LAYER_SELECTIONS = ("sample", "argmax", "last", "mc")
SIMILARITY_SCALINGS = ("minmax", "scaled")
POLICY_BASELINES = ("ema", "critic")
EMBEDDING_LAYERS = ("selected", "last")
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
            Configuration of the vision-language trunk, of any LLaVA-like `AutoModelForImageTextToText`.
        sam_config (`dict` or `SamConfig`, *optional*):
            Configuration of the SAM that draws the masks. Its patch size is 16, so that low-resolution mask logits
            live at 1/4 of the SAM frame.
        segment_token_id (`int`, *optional*):
            Id of `[SEG]`. Resolve it by name with the tokenizer.
        reject_token_id (`int`, *optional*):
            Id of `[REJ]`; `None` for models that cannot reject by token.
        prompts (`tuple[str]`, defaults to `("embedding", "mask")`):
            What the mask decoder gets of each segment: the projected segment state (`"embedding"`), the similarity
            map (`"mask"`).
        layer_selection (`str` or `int`, defaults to `"argmax"`):
            How a layer is chosen when a call does not say: `"sample"`, `"argmax"`, `"last"`, `"mc"` or a layer number.
        num_layer_samples (`int`, defaults to 8):
            Number of layers drawn per segment under `"mc"`.
        similarity_scaling (`str`, defaults to `"scaled"`):
            `"minmax"` maps the dot products of a segment to [0, 1] as the official code does; `"scaled"` is
            dot / sqrt(D) plus a learned bias per layer, a true logit.
        embedding_layer (`str`, defaults to `"selected"`):
            Layer whose segment state is projected: the selected one (official mode 3) or the last (mode 2).
        policy_baseline (`str`, defaults to `"ema"`):
            Baseline of REINFORCE: an exponential moving average of the reward, or a small critic network.
        policy_ema_decay (`float`, defaults to 0.9):
            Share of the old value kept when the moving average is updated.
        critic_hidden_size (`int`, defaults to 128):
            Width of the critic's hidden layer.
        num_segment_tokens (`int`, defaults to 1):
            Segment tokens written per object. Only 1 is implemented.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of new linear layers.
        custom_pipelines (`dict`, *optional*):
            Pipelines that come with the checkpoint, as `transformers.pipeline` reads them.
        uground_version (`str`, *optional*):
            Version of the code the checkpoint was saved by; stamped on saving.

    Raises:
        ValueError: a setting is outside of what is listed above.
    """

    model_type = "uground"
    sub_configs_defaults: ClassVar[dict] = {
        "lmm_config": SubConfigSpec(config_class=AutoConfig, model_type="llava"),
        "sam_config": SamConfig,
    }

    lmm_config: dict | PreTrainedConfig | None = None
    sam_config: dict | PreTrainedConfig | None = None
    segment_token_id: int | None = None
    reject_token_id: int | None = None
    prompts: list[str] | tuple[str, ...] = PROMPTS
    layer_selection: str | int = "argmax"
    num_layer_samples: int = 8
    similarity_scaling: str = "scaled"
    embedding_layer: str = "selected"
    policy_baseline: str = "ema"
    policy_ema_decay: float = 0.9
    critic_hidden_size: int = 128
    num_segment_tokens: int = 1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    custom_pipelines: dict | None = None
    uground_version: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.prompts = tuple(self.prompts)
        if self.custom_pipelines is None:
            self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        self._check_settings()

    def _check_settings(self):
        if not self.prompts or any(prompt not in PROMPTS for prompt in self.prompts):
            raise ValueError(f"prompts must be one or more of {PROMPTS}, got {self.prompts}")
        for name, value, allowed in (
            ("similarity_scaling", self.similarity_scaling, SIMILARITY_SCALINGS),
            ("policy_baseline", self.policy_baseline, POLICY_BASELINES),
            ("embedding_layer", self.embedding_layer, EMBEDDING_LAYERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        check_layer_selection(self.layer_selection, self.num_layers)
        if not 0.0 <= self.policy_ema_decay < 1.0:
            raise ValueError(f"policy_ema_decay must lie in [0, 1), got {self.policy_ema_decay}")
        if self.num_layer_samples < 1:
            raise ValueError(f"num_layer_samples must be at least 1, got {self.num_layer_samples}")
        if self.num_segment_tokens != 1:
            raise ValueError(f"num_segment_tokens must be 1, got {self.num_segment_tokens}")
        patch_size = self.sam_config.vision_config.patch_size
        if patch_size != 16:
            raise ValueError(f"the SAM of UGround has patches of 16 pixels, got {patch_size}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Like `PreTrainedConfig.from_dict`; warns, once, if the installed transformers is not the tested one."""
        installed = transformers.__version__
        if installed.split(".")[:2] != TESTED_TRANSFORMERS.split("."):
            logger.warning_once(
                f"uground {CODE_VERSION} was tested with transformers {TESTED_TRANSFORMERS}, installed is {installed}"
            )
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Like `PreTrainedConfig.save_pretrained`, stamped with the version of the code that goes with it."""
        self.uground_version = CODE_VERSION
        # What was loaded from a repository names that repository here; the copy has its own.
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_layers(self) -> int:
        """L + 1: the number of layer states of a token, embeddings and final norm included."""
        return self.get_text_config().num_hidden_layers + 1

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that stands once per image token in `input_ids`."""
        return self.lmm_config.image_token_id

    @property
    def token_grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the LMM's image tokens."""
        vision_config = self.lmm_config.vision_config
        side = vision_config.image_size // vision_config.patch_size
        return side, side

    @property
    def frame_size(self) -> int:
        """Side of the SAM frame in pixels."""
        return self.sam_config.vision_config.image_size

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's part of `lmm_config`, where vocabulary and hidden size stand."""
        return self.lmm_config.get_text_config(*args, **kwargs)


def check_layer_selection(layer_selection: str | int, num_layers: int) -> None:
    """Raise a `ValueError` unless `layer_selection` is a known rule or a layer number in 0..num_layers-1."""
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
