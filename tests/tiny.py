"""Builders of tiny random models for tests: 32-pixel LMM images on a 4x4 token grid, 64-pixel SAM frames."""

import torch
from transformers import Sam2Config, Sam3TrackerConfig, SamConfig

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

VOCAB_SIZE = 40
IMAGE_TOKEN, SEGMENT_TOKEN, REJECT_TOKEN, END_TOKEN = 39, 38, 37, 2


def tiny_config(**settings) -> UGroundConfig:
    """Four decoder layers of width 16; `settings` go to `UGroundConfig`."""
    lmm_config = {
        "model_type": "llava",
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 16,
        "text_config": {
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": END_TOKEN,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        },
    }
    sam_config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "initializer_range": 0.02,
        },
        # A quarter of the channels comes first, and a layer norm over a single one would be deaf to the mask prompt.
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    defaults = {"segment_token_id": SEGMENT_TOKEN, "reject_token_id": REJECT_TOKEN, "sam_config": sam_config}
    return UGroundConfig(**{"lmm_config": lmm_config, **defaults, **settings})


# Of SAM 2 and the tracker of SAM 3: maps of 16 channels, a decoder with one mask and three others.
SAM2_PROMPTS = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 16}
SAM2_DECODER = {
    "hidden_size": 16,
    "mlp_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}


def tiny_sam2_config() -> Sam2Config:
    """Frames of 64 pixels, maps of 16, 8 and 4 cells."""
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 12, 16, 20],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [4, 4, 4, 2],
        "window_positional_embedding_background_size": [2, 2],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [20, 16, 12, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    return Sam2Config(vision_config=vision, prompt_encoder_config=SAM2_PROMPTS, mask_decoder_config=SAM2_DECODER)


def tiny_sam3_config(scale_factors=(4.0, 2.0, 1.0)) -> Sam3TrackerConfig:
    """Frames of 56 pixels in patches of 14, so that masks of 16 cells do not live at a quarter of the frame."""
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "pretrain_image_size": 28,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
        "scale_factors": [*scale_factors],
    }
    prompts = {**SAM2_PROMPTS, "image_size": 56, "patch_size": 14}
    return Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=SAM2_DECODER)


def tiny_model(seed: int = 0, **settings) -> UGroundForReferringSegmentation:
    """A tiny model whose every parameter was drawn anew, so that no zero or one hides a mistake."""
    torch.manual_seed(seed)
    return redrawn(UGroundForReferringSegmentation(tiny_config(**settings)).eval())


def redrawn(model: UGroundForReferringSegmentation) -> UGroundForReferringSegmentation:
    """The model with every parameter drawn anew from torch's generator."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            scale = 0.5 if "gates" in name else 0.2
            parameter.copy_(
                torch.randn(parameter.shape) * scale + (1.0 if "norm" in name and "bias" not in name else 0.0)
            )
    return model


def say_only(*tokens: int) -> list[int]:
    """`suppress_tokens` of a generation configuration that leaves only these."""
    return [token for token in range(VOCAB_SIZE) if token not in tokens]


def tiny_inputs(rows: list[list[int]], image_index: list[int] | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """
    Inputs for text `rows` of token ids, each after a start token and the 16 image tokens, padded on the left.

    Images differ in shape: square, wide (half of the rows are padding), tall.
    """
    image_index = list(range(len(rows))) if image_index is None else image_index
    num_images = max(image_index) + 1
    shapes = [(32, 32), (16, 32), (32, 20)]
    sizes = [shapes[image % len(shapes)] for image in range(num_images)]
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.zeros(num_images, 3, 32, 32)
    sam_pixel_values = torch.zeros(num_images, 3, 64, 64)
    for image, (height, width) in enumerate(sizes):
        pixel_values[image, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        sam_pixel_values[image, :, : 2 * height, : 2 * width] = torch.randn(
            3, 2 * height, 2 * width, generator=generator
        )
    full = [[1] + [IMAGE_TOKEN] * 16 + row for row in rows]
    length = max(map(len, full))
    sizes = torch.tensor(sizes)
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in full]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in full]),
        "image_index": torch.tensor(image_index),
        "pixel_values": pixel_values,
        "valid_sizes": sizes,
        "sam_pixel_values": sam_pixel_values,
        "sam_valid_sizes": sizes * 2,
        "original_sizes": sizes * 3,
    }
