"""Tiny random models of every family of LMMs: a further family adds a builder to `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny import END_TOKEN, IMAGE_TOKEN, VOCAB_SIZE, redrawn, tiny_config

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

# Rows and columns of the token grids of three images, and what a plain call of the LMM takes for them.
GRIDS = [(2, 3), (4, 1), (3, 3)]
QWEN_PATCH, QWEN_MERGE = 4, 2


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        lmm_config: of a tiny LMM.
        images: pixels and what else its encoder needs, of the images of `GRIDS`, and the pixels of each of its frames.
        plain: what a call of the bare LMM needs beside ids, mask, pixels and image inputs.
    """

    lmm_config: Callable[[], dict]
    images: Callable[[torch.Generator], tuple[dict, torch.Tensor]]
    plain: Callable[[torch.Tensor], dict]


def _qwen_text(model_type: str, rope: str, section: list[int]) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": END_TOKEN,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", rope: True, "mrope_section": section, "rope_theta": 10000.0},
    }


def _qwen_ids() -> dict:
    return {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 36,
        "vision_start_token_id": 35,
        "vision_end_token_id": 34,
        "tie_word_embeddings": True,
    }


def _qwen3_vl() -> dict:
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": QWEN_MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _qwen_text("qwen3_vl_text", "mrope_interleaved", [4, 2, 2])
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, **_qwen_ids()}


def _qwen2_5_vl() -> dict:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": QWEN_MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = _qwen_text("qwen2_5_vl_text", "mrope", [4, 2, 2])
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, **_qwen_ids()}


def _qwen_images(generator: torch.Generator) -> tuple[dict, torch.Tensor]:
    grids = torch.tensor([[1, rows * QWEN_MERGE, columns * QWEN_MERGE] for rows, columns in GRIDS])
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * QWEN_PATCH**2, generator=generator)
    side = QWEN_PATCH * QWEN_MERGE
    return {"pixel_values": pixels, "image_grid_thw": grids}, torch.tensor(GRIDS) * side


FAMILIES = {
    name: Family(config, _qwen_images, lambda ids: {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()})
    for name, config in (("qwen3_vl", _qwen3_vl), ("qwen2_5_vl", _qwen2_5_vl))
}


def family_config(name: str, **settings) -> UGroundConfig:
    """A model of a family with the mask head of `tiny.py`."""
    return tiny_config(lmm_config=FAMILIES[name].lmm_config(), **settings)


def family_model(name: str, **settings) -> UGroundForReferringSegmentation:
    """The same with every parameter drawn anew."""
    torch.manual_seed(0)
    return redrawn(UGroundForReferringSegmentation(family_config(name, **settings)).eval())


def family_inputs(name: str, rows: list[list[int]], image_index: list[int]) -> dict[str, torch.Tensor]:
    """Rows of token ids behind the image tokens of the images of `GRIDS`, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    images, frames = FAMILIES[name].images(generator)
    full = [
        [1, 35] + [IMAGE_TOKEN] * (GRIDS[image][0] * GRIDS[image][1]) + [34, *row]
        for row, image in zip(rows, image_index, strict=True)
    ]
    length = max(map(len, full))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in full]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in full]),
        "image_index": torch.tensor(image_index),
        **images,
        "valid_sizes": frames,
        "sam_pixel_values": torch.randn(len(GRIDS), 3, 64, 64, generator=generator),
        "sam_valid_sizes": torch.tensor([[64, 64], [64, 32], [40, 64]]),
        "original_sizes": torch.tensor([[96, 96], [120, 60], [60, 96]]),
    }
