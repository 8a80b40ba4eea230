"""Put a fresh UGround together from an LMM and a SAM.

python -m uground.hub.assemble --lmm llava-hf/llava-1.5-7b-hf --sam facebook/sam2.1-hiera-large --output uground-start

It gets the tokens [SEG] and [REJ], whose embeddings begin as the mean of the old ones, a policy that knows nothing
yet and a new projection, so it loads and can be trained, but does not segment before. Tensors are copied one by one,
so that memory never holds more than one file of either side.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from uground.command_line import DTYPES, run_command, seed_number
from uground.hub.convert.official_tokenizer import IMAGE, REJECT, SEGMENT
from uground.hub.weights.checkpoint_writer import check_output, new_folder, save_all_but_weights
from uground.hub.weights.sam_folders import TIED_SAM_NAME, open_sam_folder, refuse_metas_sam2, sam_frames
from uground.hub.weights.sam_weights import IGNORED_KEYS, rename_original_sam_key, sam_config_from_state_dict
from uground.hub.weights.streaming import Part, Target, write_weights
from uground.hub.weights.weight_files import WeightFiles, first_line, resolve_folder
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.modeling_uground.checkpoint_files import names_config, read_json_object
from uground.modeling_uground.configuration_uground import SIMILARITY_SCALINGS
from uground.modeling_uground.lmm_families import LMM_ADAPTERS, lmm_adapter, usual_frame
from uground.processing import UGroundProcessor, letterbox_image_processor
from uground.processing.image_processors import IMAGE_PROCESSORS, NATIVE, type_of

LLAVA_TYPES = ("llava", "llava_next")
LMM_TYPES = (*LLAVA_TYPES, *(name for name in LMM_ADAPTERS if name not in LLAVA_TYPES))
# Where an LMM of transformers keeps the settings of its image processor, and older ones their template.
IMAGE_FILES, OLD_TEMPLATE = ("preprocessor_config.json", "processor_config.json"), "chat_template.json"
# Settings that LLaVA-1.5 and 1.6 share; what 1.6 has besides is its tiling, which UGround does without.
LLAVA_SETTINGS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
)
LMM_PREFIX, SAM_PREFIX = "lmm.", "mask_decoder.sam."
VOCABULARY = ("lmm.model.language_model.embed_tokens.weight", "lmm.lm_head.weight")
# Names of either generation of transformers, in front and behind; the first that fits is replaced.
_LMM_NAMES = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model.language_model."),
    (r"(model\.)?language_model\.", "model.language_model."),
    (r"lm_head\.", "lm_head."),
    # Of Qwen-VL before transformers 4.52.
    (r"visual\.", "model.visual."),
    (r"model\.(?=(layers|embed_tokens|norm)\.)", "model.language_model."),
)
_LMM_IGNORED = r"(model\.)?image_newline|.*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids"


def lmm_name(name: str) -> str | None:
    """Name in the LMM of transformers of a tensor in one of its files; `None` for what is of no use."""
    if re.fullmatch(_LMM_IGNORED, name):
        return None
    for pattern, prefix in _LMM_NAMES:
        if match := re.match(pattern, name):
            return prefix + name[match.end() :]
    return name


def original_sam_name(name: str, iou_head_depth: int) -> str | None:
    """The same for a tensor in a file of Meta's; a name that SAM does not have stays as it is."""
    if name in IGNORED_KEYS:
        return None
    try:
        return rename_original_sam_key(name, iou_head_depth)[0]
    except ValueError:
        return name


def assemble(
    lmm: str,
    sam: str,
    output: str,
    dtype: torch.dtype | None = None,
    similarity_scaling: str = "scaled",
    seed: int = 0,
) -> None:
    """
    Write a fresh UGround.

    Args:
        lmm: folder or Hub id of a LLaVA-1.5 or 1.6, a Qwen2.5-VL or a Qwen3-VL of transformers.
        sam: folder or Hub id of a `SamModel`, `Sam2Model` or `Sam3TrackerModel`, of images or video, or a `.pth` of
            Meta's SAM.
        output: folder to write, new or empty.
        dtype: of the written weights; by default that of the LMM.
        similarity_scaling: see [`UGroundConfig`].
        seed: of the new projection.

    Raises:
        OSError: something cannot be read or written, or the output is not empty.
        ValueError: LMM, tokenizer or SAM is not what it should be.
    """
    output = Path(output)
    check_output(output)
    lmm_folder = resolve_folder(lmm, "LMM")
    lmm_config = read_lmm_config(lmm_folder)
    tokenizer, num_old = read_tokenizer(lmm_folder, lmm_config)
    lmm_weights = WeightFiles(lmm_folder)
    sam_config, sam_weights, rename_sam, sam_folder = open_sam(sam)
    # A vocabulary that is longer than the tokenizer, to be a round number, has room for the new tokens.
    text_config = lmm_config.get_text_config()
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    config = UGroundConfig(
        lmm_config=lmm_config,
        sam_config=sam_config,
        segment_token_id=tokenizer.convert_tokens_to_ids(SEGMENT),
        reject_token_id=tokenizer.convert_tokens_to_ids(REJECT),
        similarity_scaling=similarity_scaling,
    )
    processor = UGroundProcessor(
        read_image_processor(lmm_folder, lmm_config),
        sam_frames(sam_config, config.frame_size, sam_folder),
        tokenizer,
        patch_size=config.adapter.cell_side,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
    )
    with torch.device("meta"):
        model = UGroundForReferringSegmentation(config)
    dtype = dtype or _dtype_of(lmm_weights)
    model = model.to(dtype)
    model.generation_config.suppress_tokens = [config.image_token_id]
    parts = plan_parts(model, lmm_weights, sam_weights, rename_sam, num_old, len(tokenizer))
    new_tensors = fresh_tensors(model, seed, dtype)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with new_folder(output, num_bytes) as folder:
        save_all_but_weights(folder, model, processor)
        write_weights(folder, parts, new_tensors, dtype, num_bytes)
    print(
        f"wrote {output}: {config.num_layers - 1} layers, {len(tokenizer)} tokens, "
        f"{str(dtype).removeprefix('torch.')}, {SEGMENT} {config.segment_token_id}, "
        f"{REJECT} {config.reject_token_id}; it is to be trained"
    )


def read_image_processor(folder: Path, lmm_config: PreTrainedConfig) -> Any:
    """
    What makes the LMM's frames: its own image processor where it sees images in their own proportions.

    Raises:
        OSError, ValueError: it has none, or one that is not known here.
    """
    adapter = lmm_adapter(lmm_config, usual_frame(lmm_config))
    if adapter.frame is not None:
        return letterbox_image_processor(adapter.frame.side)
    path = next((folder / name for name in IMAGE_FILES if (folder / name).is_file()), folder / IMAGE_FILES[0])
    settings = read_json_object(path)
    settings = settings.get("image_processor", settings)
    kind = type_of(str(settings.get("image_processor_type")))
    if kind not in NATIVE:
        raise ValueError(f"The image processor of {folder} must be a {' or '.join(NATIVE)}, got {kind}.")
    return IMAGE_PROCESSORS[kind](**settings)


def read_lmm_config(folder: Path) -> PreTrainedConfig:
    """
    The configuration of an LMM; that of a LLaVA-1.6 as one of LLaVA-1.5, which looks at an image once and as a whole.

    Raises:
        OSError: there is none.
        ValueError: it is one of something else, or of a LLaVA without a class token to be dropped.
    """
    content = read_json_object(folder / "config.json")
    if content.get("model_type") not in LMM_TYPES:
        raise ValueError(f"the LMM {folder} must be of type {' or '.join(LMM_TYPES)}, got {content.get('model_type')}")
    if "text_config" not in content:
        raise ValueError(
            f"the LMM {folder} is in the layout of the LLaVA code, expected that of transformers as in llava-hf/…"
        )
    with names_config(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in LLAVA_TYPES:
        return config
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"the LMM {folder} must drop the class token (vision_feature_select_strategy 'default'), got "
            f"{config.vision_feature_select_strategy!r}"
        )
    if config.tie_word_embeddings:
        raise ValueError(f"the LMM {folder} ties its output to its embeddings, which is not supported")
    vision = config.vision_config
    return LlavaConfig(
        vision_config=vision,
        text_config=config.text_config,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        **{name: getattr(config, name) for name in LLAVA_SETTINGS},
    )


def read_tokenizer(folder: Path, lmm_config: PreTrainedConfig) -> tuple[PreTrainedTokenizerBase, int]:
    """
    The tokenizer of an LMM with `[SEG]` and `[REJ]` added, and how many tokens it had before.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: its `<image>` is not the one of the configuration.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as error:  # tokenizers raises the base class alone
        raise OSError(f"the tokenizer in {folder} cannot be read ({first_line(error)})") from error
    is_llava = lmm_config.model_type in LLAVA_TYPES
    image_token_id = tokenizer.get_vocab().get(IMAGE)
    if is_llava and image_token_id != lmm_config.image_token_id:
        raise ValueError(
            f"{IMAGE} is number {image_token_id} in the tokenizer of {folder}, but number {lmm_config.image_token_id} "
            f"in its config.json"
        )
    num_old = len(tokenizer)
    # Without the white space around them, as the official tokenizer has it.
    tokens = [AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in (SEGMENT, REJECT)]
    tokenizer.add_tokens(tokens)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    limit = lmm_config.get_text_config().max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if is_llava:
        # The conversation is the one of UGround; that of a LLaVA ends its answers in another way.
        tokenizer.chat_template = None
    elif not tokenizer.chat_template:
        tokenizer.chat_template = read_json_object(folder / OLD_TEMPLATE).get("chat_template")
    return tokenizer, num_old


def open_sam(source: str) -> Any:
    """
    Configuration and weights of a SAM, the function that renames its tensors, and its folder, if it is one.

    Args:
        source: folder or Hub id of a model of transformers, or a file of Meta's.

    Raises:
        OSError, ValueError: it cannot be read, or is no SAM.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            refuse_metas_sam2(path)
        weights = WeightFiles(path, "SAM checkpoint")
        meta = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
        config = sam_config_from_state_dict(meta)
        depth = config.mask_decoder_config.iou_head_depth
        return config, weights, partial(original_sam_name, iou_head_depth=depth), None
    folder = resolve_folder(source, "SAM")
    return *open_sam_folder(folder), folder


def _dtype_of(lmm_weights: WeightFiles) -> torch.dtype:
    """Data type of the embeddings of an LMM."""
    names = {lmm_name(name): name for name in lmm_weights.shapes}
    embeddings = names.get(VOCABULARY[0].removeprefix(LMM_PREFIX))
    return torch.get_default_dtype() if embeddings is None else lmm_weights.dtype_of(embeddings)


def plan_parts(
    model: UGroundForReferringSegmentation,
    lmm_weights: WeightFiles,
    sam_weights: WeightFiles,
    rename_sam: Callable[[str], str] | None,
    num_old: int,
    num_tokens: int,
) -> list[Part]:
    """
    What comes from the LMM and what from the SAM; both are complete and both are used up.

    Args:
        model: of the configuration to be written, on the meta device.
        lmm_weights, sam_weights: of the two.
        rename_sam: names in the files of SAM to those of `SamModel`.
        num_old, num_tokens: tokens before and after the new ones were added.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape; the sentence names them.
    """
    lmm_targets, sam_targets = {}, {}
    # The head of an LMM that ties it to its embeddings is not written; some files hold it all the same.
    tied = (VOCABULARY[1],) if model.lmm.config.tie_word_embeddings else ()
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in tied:
            continue
        if name in VOCABULARY:
            change = partial(extend_vocabulary, num_old=num_old, num_tokens=num_tokens, num_rows=shape[0])
            lmm_targets[name.removeprefix(LMM_PREFIX)] = Target(name, None, change)
        elif name.startswith(LMM_PREFIX):
            lmm_targets[name.removeprefix(LMM_PREFIX)] = Target(name, shape)
        elif name.startswith(SAM_PREFIX) and not _is_tied(model, name.removeprefix(SAM_PREFIX)):
            sam_targets[name.removeprefix(SAM_PREFIX)] = Target(name, shape)
    parts = [
        Part(f"the LMM {lmm_weights.path}", lmm_weights, partial(_untied_name, tied=tied), lmm_targets),
        Part(f"the SAM {sam_weights.path}", sam_weights, rename_sam, sam_targets),
    ]
    for part in parts:
        part.check()
    return parts


def _untied_name(name: str, tied: tuple[str, ...]) -> str | None:
    """As [`lmm_name`], without what is tied to something else."""
    found = lmm_name(name)
    return None if found is not None and LMM_PREFIX + found in tied else found


def _is_tied(model, name: str) -> bool:
    """Whether a tensor of the SAM is the second name of another one."""
    return name == TIED_SAM_NAME and model.config.mask_head == "sam"


def extend_vocabulary(matrix: Tensor, num_old: int, num_tokens: int, num_rows: int) -> Tensor:
    """
    A vocabulary matrix with the mean of the old rows for every new token.

    Args:
        matrix: `(V, D)`, of which rows behind `num_old` belong to no token.
        num_old, num_tokens: tokens before and after.
        num_rows: rows of the result.
    """
    mean = matrix[:num_old].float().mean(0).to(matrix.dtype)
    extended = matrix.new_zeros(num_rows, matrix.shape[1])
    extended[: len(matrix)] = matrix
    extended[min(num_old, num_rows) : num_tokens] = mean
    return extended


def fresh_tensors(model: UGroundForReferringSegmentation, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """
    Tensors that no checkpoint has, as the model initialises them: policy, projection, similarity scaling.

    Args:
        model: on the meta device, where its other parts stay.
        seed: of what is drawn.
        dtype: of the result.
    """
    torch.manual_seed(seed)
    tensors = {}
    for part in ("layer_policy", "segment_projection", "similarity_scaling"):
        module = getattr(model, part).to_empty(device="cpu").float()
        for child in module.modules():
            model._init_weights(child)
        tensors |= {f"{part}.{name}": tensor for name, tensor in module.to(dtype).state_dict().items()}
    return tensors


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground.hub.assemble`."""
    usage, example, more = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "python -m uground.hub.assemble",
        description=f"{usage}\n\n{more}",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lmm", required=True, help="folder or Hub id of a LLaVA, Qwen2.5-VL or Qwen3-VL")
    parser.add_argument(
        "--sam",
        required=True,
        help="folder or Hub id of a SAM, SAM 2 or SAM 3 of transformers, or a .pth of Meta's SAM",
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the written weights (default: as in the LMM)")
    parser.add_argument(
        "--similarity-scaling", choices=SIMILARITY_SCALINGS, default="scaled", help="minmax is the official one"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the new projection")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return run_command(
        "assemble",
        lambda: assemble(
            options.lmm,
            options.sam,
            options.output,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            similarity_scaling=options.similarity_scaling,
            seed=options.seed,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
