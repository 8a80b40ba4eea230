"""From an image and a sentence to a mask, step by step, with the shape of everything on the way.

python examples/walk_through.py [IMAGE] [QUERY]
"""

import sys
from pathlib import Path

import torch

import uground
from uground import UGroundForReferringSegmentation, UGroundProcessor
from uground.modeling_uground.image_frames import apply_matrices, grid_to_image
from uground.modeling_uground.segment_tokens import LayerRequest


def show(name: str, value) -> None:
    print(f"{name:<34}{tuple(value.shape) if hasattr(value, 'shape') else value}")


@torch.no_grad()
def main(image: str, query: str) -> None:
    path = uground.tiny_checkpoint()
    model = UGroundForReferringSegmentation.from_pretrained(path).eval()
    processor = UGroundProcessor.from_pretrained(path)

    # 1. Image and query to tensors: one letterbox for the LMM, one for SAM, and a row of tokens.
    inputs = processor(image, query)
    for name, value in inputs.items():
        show(name, value)

    # 2. Both encoders see the image once, however many queries follow.
    images = model.get_image_embeddings(**inputs)
    show("LMM image features (I, n, D)", images.lmm_features)
    show("SAM image embeddings (I, C, h, w)", images.sam_embeddings)

    # 3. The LMM writes its answer; of every [SEG] the states that predicted it are kept, at all layers.
    answers = model.write_answers(inputs["input_ids"], inputs["attention_mask"], None, images)
    show("answer", processor.tokenizer.decode(answers.sequences[0, answers.prompt_length :]))
    show("segment states (N, K, L+1, D)", answers.segments.states)

    # 4. The policy says through which layer each segment leaves.
    policy = model.layer_policy(answers.segments.states).softmax(-1)
    show("layer probabilities (N, L+1)", policy)
    show("  of the first segment", [round(share, 2) for share in policy[0].tolist()])

    # 5. There the state meets the image tokens: the similarity map, SAM's mask prompt; and SAM draws.
    found = model.decode_segments(answers.segments, LayerRequest(selection="argmax"))
    show("layer of each segment (N,)", found["layer_index"].tolist())
    for name in ("similarity", "similarity_map", "mask_logits", "iou_scores"):
        show(name, found[name])

    # 6. Maps and masks in pixels of the image: two small matrices each.
    height, width = inputs["original_sizes"][0].tolist()
    rows, columns = grid_to_image(model.config.token_grid_hw, model.adapter.frame, (height, width))
    show("map in image pixels (N, H, W)", apply_matrices(found["similarity_map"], rows, columns))
    result = processor.post_process_instance_segmentation(model.read_masks(answers))[0]
    show("masks (n, H, W)", result["masks"])
    show("scores", [round(score, 3) for score in result["scores"].tolist()])


if __name__ == "__main__":
    scene = str(Path(__file__).with_name("scene.png"))
    main(*(sys.argv[1:] or [scene, "the small red boat"]))
