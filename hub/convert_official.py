"""Turn a released checkpoint of UGround, READ, SESAME or LISA into one that `AutoModel.from_pretrained` loads.

python -m uground.hub.convert_official UGround-7B --vision-tower openai/clip-vit-large-patch14-336 --output uground-7b

Tensors are read, renamed and written one by one, so that memory never holds more than one file of either side.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig

from uground.command_line import DTYPES, run_command
from uground.hub.convert.official_config import build_config, check_vision_tower, vision_config
from uground.hub.convert.official_names import (
    BASELINE_FILE,
    CRITIC,
    CRITIC_PREFIX,
    EMBEDDINGS,
    VOCABULARY,
    Origin,
    clip_name,
    is_ignored,
    source_of,
)
from uground.hub.convert.official_systems import SYSTEMS, OfficialSystem, PointArguments, find_system
from uground.hub.convert.official_tokenizer import REJECT, SEGMENT, convert_tokenizer, has_tokenizer
from uground.hub.weights.checkpoint_writer import check_output, new_folder, save_all_but_weights
from uground.hub.weights.streaming import Part, Target, write_weights
from uground.hub.weights.weight_files import WeightFiles, resolve_folder
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.modeling_uground.checkpoint_files import names_config, read_json_object
from uground.modeling_uground.hub_files import give_usual_mode
from uground.processing import UGroundProcessor, letterbox_image_processor, make_image_processor

# The released code keeps its running reward outside of the weights and loses it; a converted policy starts anew.
NEW_REWARD = {"reward_ema": torch.zeros(()), "reward_updates": torch.zeros((), dtype=torch.long)}


@dataclass
class Source:
    """
    An official checkpoint and its vision tower, opened but not read.

    Attributes:
        name: what the user calls it.
        system: which of the systems it is.
        config: its `config.json`.
        weights, vision_weights: of the checkpoint and of the vision tower.
        vision: configuration of the vision tower.
    """

    name: str
    system: OfficialSystem
    config: dict
    weights: WeightFiles
    vision: CLIPVisionConfig
    vision_weights: WeightFiles

    @classmethod
    def open(cls, source: str, vision_tower: str, system_name: str | None = None) -> "Source":
        """
        Look at both folders, downloading what is a Hub id.

        Raises:
            OSError, ValueError: a folder is incomplete, or is not what it should be.
        """
        folder = resolve_folder(source, "checkpoint")
        config = read_json_object(folder / "config.json")
        weights = WeightFiles(folder)
        system = find_system(source, weights.shapes, system_name, _known_tokens(folder))
        vision_folder = resolve_folder(vision_tower, "vision tower")
        vision = vision_config(vision_folder)
        check_vision_tower(vision_folder, vision, config, weights.shapes, system)
        return cls(str(source), system, config, weights, vision, WeightFiles(vision_folder, "vision tower"))

    @property
    def num_rows(self) -> int:
        """Number of tokens of the checkpoint."""
        return self.weights.shapes[EMBEDDINGS][0]


def _known_tokens(folder: Path) -> list[str]:
    path = folder / "added_tokens.json"
    return list(read_json_object(path)) if path.is_file() else []


def convert_official(
    source: str,
    vision_tower: str,
    output: str,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    layer_selection: str | int | None = None,
    segment_token_id: int | None = None,
    reject_token_id: int | None = None,
    system: str | None = None,
    points: PointArguments | None = None,
) -> None:
    """
    Convert a checkpoint in the layout of the released UGround, READ, SESAME or LISA.

    Args:
        source: folder or Hub id of the checkpoint.
        vision_tower: folder or Hub id of the CLIP it was trained with, whole or vision part only.
        output: folder to write, new or empty.
        tokenizer: folder of the tokenizer; by default that of `source`. Without any the model is written without a
            processor.
        dtype: of the written weights; by default that of the checkpoint.
        layer_selection: what the converted model does by default; `None` for the rule of the official evaluation.
        segment_token_id, reject_token_id: ids of `[SEG]` and `[REJ]`, for a checkpoint without a tokenizer: nothing
            else in it tells them. Where both are missing the model refuses to segment until its config names them.

    Raises:
        OSError: something cannot be read or written, or the output is not empty.
        ValueError: the checkpoint, the vision tower or the tokenizer is not what it should be.
    """
    output, points = Path(output), points or PointArguments()
    check_output(output)
    opened = Source.open(source, vision_tower, system)
    points.check(opened.system, opened.config.get("num_hidden_layers"))
    fast_tokenizer = _open_tokenizer(opened, tokenizer)
    segment_token_id, reject_token_id = _token_ids(opened, fast_tokenizer, segment_token_id, reject_token_id)
    with names_config("config.json of the checkpoint"):
        config = build_config(
            opened.config,
            opened.weights.shapes,
            opened.vision,
            opened.system,
            segment_token_id,
            reject_token_id,
            layer_selection,
            points,
        )
    dtype = dtype or opened.weights.dtype_of(EMBEDDINGS)
    with torch.device("meta"):
        model = UGroundForReferringSegmentation(config).to(dtype)
    # The official vocabulary lacks <image>, so the official model cannot write it.
    model.generation_config.suppress_tokens = [config.image_token_id]
    parts = plan_parts(opened, model)
    processor = None
    if fast_tokenizer is not None:
        processor = UGroundProcessor(
            make_image_processor(config.image_frame, opened.vision.image_size),
            letterbox_image_processor(config.frame_size),
            fast_tokenizer,
            patch_size=opened.vision.patch_size,
        )
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with new_folder(output, num_bytes) as folder:
        save_all_but_weights(folder, model, processor)
        write_weights(folder, parts, new_tensors(model, dtype), dtype, num_bytes)
        write_critic(folder, opened.weights)
    _report(opened, output, config, dtype, processor, points)


def plan_parts(opened: Source, model: UGroundForReferringSegmentation) -> list[Part]:
    """
    Which source tensor becomes which tensor of the model; both sides are complete.

    Args:
        opened: the source.
        model: of the configuration to be written, on the meta device.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape; the sentence names them.
    """
    critic = _critic_shapes(opened, model.config.num_layers)
    depth = model.config.sam_config.mask_decoder_config.iou_head_depth
    targets = {origin: {} for origin in Origin}
    for name, tensor in model.state_dict().items():
        origin, key = source_of(name, depth, opened.system.projector_layers)
        shape = tuple(tensor.shape)
        target = Target(name, (shape[0] - 1, *shape[1:]), add_row) if key in VOCABULARY else Target(name, shape)
        # A second name of the same tensor, of SAM's position encoding, is tied and not written.
        targets[origin].setdefault(key, target)
    title = f"the checkpoint {opened.name}"
    checked = {name: Target(name, shape) for name, shape in critic.items()}
    Part(title, opened.weights, lambda name: name if _is_of_critic(name) else None, checked).check()
    parts = [
        Part(title, opened.weights, _official_name, targets[Origin.CHECKPOINT]),
        Part(
            f"the vision tower {opened.vision_weights.path}",
            opened.vision_weights,
            clip_name,
            targets[Origin.VISION_TOWER],
        ),
    ]
    for part in parts:
        part.check()
    return parts


def new_tensors(model: UGroundForReferringSegmentation, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name in the model, what comes from no checkpoint: a second projector layer that changes nothing."""
    if model.config.lmm_config.projector_hidden_act != "linear":
        return {}
    size = model.config.get_text_config().hidden_size
    name = "lmm.model.multi_modal_projector.linear_2"
    return {f"{name}.weight": torch.eye(size, dtype=dtype), f"{name}.bias": torch.zeros(size, dtype=dtype)}


def _official_name(name: str) -> str | None:
    return None if is_ignored(name) or _is_of_critic(name) else name


def _is_of_critic(name: str) -> bool:
    return name.startswith(f"{CRITIC_PREFIX}critic.")


def _critic_shapes(opened: Source, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the critic that the checkpoint should hold, of the width that it has; empty without one."""
    if opened.config.get("baseline_type", "ema") != "critic":
        return {}
    width = opened.weights.shapes.get(CRITIC[0], (128,))[0]
    return dict(zip(CRITIC, ((width, num_layers), (width,), (1, width), (1,)), strict=True))


def write_critic(folder: Path, weights: WeightFiles) -> None:
    """What training holds rewards against, for [`BaselineTraining`] to load; nothing for a checkpoint without it."""
    if weights.shapes.keys().isdisjoint(CRITIC):
        return
    critic = dict(NEW_REWARD)
    for tensors in weights.by_file():
        found = [name for name in tensors if name in CRITIC]
        critic |= {name.removeprefix(CRITIC_PREFIX): tensors[name].float().clone() for name in found}
    save_file(critic, folder / BASELINE_FILE)
    give_usual_mode(folder / BASELINE_FILE)


def add_row(matrix: Tensor) -> Tensor:
    """A vocabulary matrix `(V, D)` with a last row of zeros, for `<image>`: its place is taken by image features."""
    return torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])


def _open_tokenizer(opened: Source, tokenizer: str | None):
    """The converted tokenizer, or `None` where there is none."""
    if tokenizer is not None:
        folder = resolve_folder(tokenizer, "tokenizer", weights=False)
    elif has_tokenizer(opened.weights.path):
        folder = opened.weights.path
    else:
        return None
    return convert_tokenizer(
        folder,
        opened.num_rows,
        opened.config.get("max_position_embeddings", 2048),
        opened.name,
        opened.config.get("mm_use_im_start_end", True),
    )


def _token_ids(opened: Source, tokenizer, *given: int | None) -> tuple[int | None, int | None]:
    """Ids of `[SEG]` and `[REJ]`: by name where there is a tokenizer, else those that were given."""
    if tokenizer is None:
        for token, number in zip((SEGMENT, REJECT), given, strict=True):
            if number is not None and not 0 <= number < opened.num_rows:
                raise ValueError(f"{token} must be one of the {opened.num_rows} tokens of {opened.name}, got {number}")
        return given
    named = tuple(tokenizer.get_vocab().get(token) for token in (SEGMENT, REJECT))
    for token, number, asked in zip((SEGMENT, REJECT), named, given, strict=True):
        if asked is not None and asked != number:
            raise ValueError(f"{token} was said to be number {asked}, but the tokenizer says {number}")
    return named


def _report(opened: Source, output: Path, config: UGroundConfig, dtype: torch.dtype, processor, points) -> None:
    layers = config.num_layers - 1
    print(
        f"wrote {output}: {layers} layers, {opened.num_rows} tokens and <image>, {str(dtype).removeprefix('torch.')}, "
        f"{SEGMENT} {config.segment_token_id}, {REJECT} {config.reject_token_id}, layer selection "
        f"{config.layer_selection!r}"
    )
    if "points" in config.prompts:
        said = "" if points.is_whole else f", where not said as READ's code has it for {layers} layers"
        print(
            f"it picks {config.num_points} points of cells of {config.point_downsample} x {config.point_downsample} "
            f"image tokens, positive from {config.point_thresholds[0]} and negative up to "
            f"{config.point_thresholds[1]}{said}"
        )
    if processor is None:
        print("it has no processor, because no tokenizer was found; pass --tokenizer for one")
    if config.segment_token_id is None:
        print(f"it does not know its {SEGMENT} token; pass --tokenizer or --segment-token-id")


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground.hub.convert_official`."""
    usage, example, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "python -m uground.hub.convert_official",
        description=usage,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="folder or Hub id of the released checkpoint")
    parser.add_argument(
        "--vision-tower", required=True, metavar="CLIP", help="folder or Hub id of the CLIP it was trained with"
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or Hub id of the tokenizer (default: SRC's own)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the written weights (default: as in SRC)")
    parser.add_argument(
        "--layer-selection",
        help="layer the converted model reads segments at: last, argmax, sample, mc or a number (default: as the "
        "official evaluation does, which is last for the released checkpoints)",
    )
    parser.add_argument(
        "--system", choices=SYSTEMS, help="which system SRC is of (default: uground, if it has a layer policy)"
    )
    layers = "default: as READ has it for a language model of 32 or 40 layers"
    parser.add_argument("--num-points", type=int, help=f"READ: points per segment ({layers})")
    parser.add_argument(
        "--point-thresholds",
        type=float,
        nargs=2,
        metavar=("POSITIVE", "NEGATIVE"),
        help="READ: a cell is a positive point from the first on and a negative one up to the second",
    )
    parser.add_argument("--point-downsample", type=int, help="READ: image tokens along each axis that make one cell")
    for token in ("segment", "reject"):
        parser.add_argument(
            f"--{token}-token-id",
            type=int,
            help=f"id of [{token[:3].upper()}], for a checkpoint without a tokenizer",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    selection = options.layer_selection
    return run_command(
        "convert_official",
        lambda: convert_official(
            options.source,
            options.vision_tower,
            options.output,
            tokenizer=options.tokenizer,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            layer_selection=int(selection) if selection and selection.lstrip("-").isdigit() else selection,
            segment_token_id=options.segment_token_id,
            reject_token_id=options.reject_token_id,
            system=options.system,
            points=PointArguments(
                options.num_points,
                options.point_thresholds and tuple(options.point_thresholds),
                options.point_downsample,
            ),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
