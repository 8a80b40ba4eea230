"""Freezes a small checkpoint of the present code, so that later releases can be tested on it.

    python tests/freeze_release.py tests/releases/0.1.0

Run once per release and never again for that release: the folder is what users of it have published.
"""

import json
import sys
from pathlib import Path

import torch
from tiny import tiny_config, tiny_inputs
from tiny_processor import gradient_image, tiny_processor

from uground.hub.publish.closure import complete_folder
from uground.modeling_uground import UGroundForReferringSegmentation

ROWS = [[5, 38, 6], [7, 8, 9, 38]]
QUERIES = ["the red cup", "what can swim"]


def outputs_of(model) -> dict[str, list]:
    """What a frozen model computes for fixed inputs; a few numbers of each output."""
    with torch.no_grad():
        outputs = model.float()(**tiny_inputs(ROWS), layer_selection="argmax")
    return {
        "layer_logits": outputs.layer_logits.tolist(),
        "mask_logits": outputs.mask_logits[:, ::5, ::5].tolist(),
        "iou_scores": outputs.iou_scores.tolist(),
    }


def input_ids_of(processor) -> list:
    """What a frozen processor makes of fixed queries."""
    return processor([gradient_image(20, 30)], [QUERIES], return_tensors="pt")["input_ids"].tolist()


def small_model() -> UGroundForReferringSegmentation:
    """Smaller still than `tiny_model`: the folder lies in the repository for good."""
    config = tiny_config()
    config.lmm_config.text_config.num_hidden_layers = 2
    config.lmm_config.vision_config.num_hidden_layers = 2
    sam = config.sam_config
    sam.vision_config.hidden_size = sam.vision_config.output_channels = 8
    sam.vision_config.num_pos_feats = 4
    sam.vision_config.num_hidden_layers = 1
    sam.vision_config.global_attn_indexes = [0]
    sam.prompt_encoder_config.hidden_size = sam.mask_decoder_config.hidden_size = 8
    sam.mask_decoder_config.mlp_dim = sam.mask_decoder_config.iou_head_hidden_dim = 8
    sam.mask_decoder_config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = UGroundForReferringSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.bfloat16()


def freeze(folder: Path) -> None:
    """Save model, processor, code, card, and what they compute."""
    small_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    complete_folder(folder, example=False, license="apache-2.0", base_models=[])
    model = UGroundForReferringSegmentation.from_pretrained(folder).eval()
    expected = {**outputs_of(model), "input_ids": input_ids_of(tiny_processor())}
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is frozen already")
    freeze(target)
