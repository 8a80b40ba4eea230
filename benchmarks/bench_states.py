"""What lies between the LMM and the mask head: time of mask prompts, and bytes of the layer states that are kept.

    python benchmarks/bench_states.py [--layers 32] [--width 32] [--rows 64]

`prompts`: mask prompts of 8 segments on an image of 12 megapixels, against resizing step by step through the image's
pixels. The matrices are made anew in every round, as for a size that was not seen before; `remembered` is the time
where they were.

`states`: what is kept of 64 rows about 64 images, against all hidden states of all steps. At a known layer that is its
image tokens. A policy may ask for any layer: what it picked is read again (`policy`), or all layers are kept
(`policy_keeping_all`). Proportions of layers and tokens are those of a 7B model, 33 states of 576 image tokens; the
width does not change the ratio. `seconds` are those of whole calls, in turns: every row
writes a segment, so that every prompt is read twice, down to the deepest layer that was picked.

Ends in one JSON line per measure.
"""

import argparse
import json

import torch
from bench_inference import Dictate, medians
from bench_train_memory import IMAGE_TOKEN, PATCH, SEGMENT_TOKEN, SIDE, build_inputs, build_model
from torch.nn import functional as F
from transformers import LogitsProcessorList

from uground.modeling_uground import image_frames
from uground.modeling_uground.image_frames import ImageFrame
from uground.modeling_uground.prompts import build_mask_prompts
from uground.modeling_uground.states_again import MAX_KEPT_PREFIXES

IMAGE_HW, SEGMENTS, GRID, PROMPT_SIDE, PADDING = (3000, 4000), 8, SIDE // PATCH, 256, -10.0
PROMPT_TARGET, DIFFERENCE_TARGET, STATES_TARGET = 0.05, 2e-6, 0.15
BEFORE_IMAGE, AFTER_IMAGE, ANSWER_LENGTH = 35, 20, 10


def resize(maps: torch.Tensor, size: tuple[int, int], **options) -> torch.Tensor:
    """`(N, h, w)` to `(N, *size)`, bilinear."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False, **options)[:, 0]


def plain_prompts(maps: torch.Tensor) -> torch.Tensor:
    """To the LMM's frame, out of it what is image, to the image's pixels, to SAM's frame, padded."""
    lmm_hw, sam_hw = (
        [end for _, end in ImageFrame("letterbox", side).windows(IMAGE_HW)] for side in (SIDE, PROMPT_SIDE)
    )
    pixels = resize(resize(maps, (SIDE, SIDE))[:, : lmm_hw[0], : lmm_hw[1]], IMAGE_HW)
    return F.pad(
        resize(pixels, tuple(sam_hw), antialias=True),
        (0, PROMPT_SIDE - sam_hw[1], 0, PROMPT_SIDE - sam_hw[0]),
        value=PADDING,
    )


def measure_prompts(rounds: int) -> dict:
    """Seconds of both ways, and by how much they differ."""
    maps = torch.randn(SEGMENTS, GRID, GRID, generator=torch.Generator().manual_seed(0))
    frames = ImageFrame("letterbox", SIDE), ImageFrame("letterbox", PROMPT_SIDE)
    image = torch.zeros(SEGMENTS, dtype=torch.long)

    def remembered():
        return build_mask_prompts(maps, image, [IMAGE_HW], *frames, PADDING)

    def anew():
        image_frames._grid_to_image.cache_clear()
        image_frames._grid_to_grid.cache_clear()
        return remembered()

    seconds = medians({"ours": anew, "remembered": remembered, "plain": lambda: plain_prompts(maps)}, rounds)
    difference = float((anew() - plain_prompts(maps)).abs().max())
    ratio = seconds["ours"] / seconds["plain"]
    return {
        "measure": "prompts",
        "segments": SEGMENTS,
        "image_hw": IMAGE_HW,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "ratio": round(ratio, 4),
        "target_ratio": PROMPT_TARGET,
        "difference": difference,
        "target_difference": DIFFERENCE_TARGET,
        "within_bar": ratio <= PROMPT_TARGET and difference <= DIFFERENCE_TARGET,
    }


def image_inputs(rows: int) -> dict[str, torch.Tensor]:
    """That many images, each with one query."""
    inputs = {name: value for name, value in build_inputs(1).items() if name.endswith(("values", "sizes"))}
    return {name: value.expand(rows, *value.shape[1:]) for name, value in inputs.items()}


@torch.no_grad()
def measure_states(rows: int, layers: int, width: int, rounds: int) -> dict:
    """Bytes kept at a known layer and for a policy, against all hidden states of a plain `generate`; and seconds."""
    model = build_model(layers, width).eval()
    prompt = [1] + [5] * (BEFORE_IMAGE - 1) + [IMAGE_TOKEN] * GRID**2 + [6] * AFTER_IMAGE
    ids = torch.tensor([prompt] * rows)
    images = model.get_image_embeddings(**image_inputs(rows))
    text = (ids, torch.ones_like(ids), torch.arange(rows))
    torch.nn.init.normal_(model.layer_policy.gates)

    def writing() -> dict:
        dictate = LogitsProcessorList([Dictate(SEGMENT_TOKEN)])
        return {"max_new_tokens": ANSWER_LENGTH, "logits_processor": dictate}

    kept, picked = {}, {}
    for name, options in (
        ("known_layer", {"layers": [layers]}),
        ("policy", {"max_kept_prefixes": MAX_KEPT_PREFIXES}),
        ("policy_keeping_all", {}),
    ):
        answers = model.write_answers(*text, images, **options, **writing())
        segments = answers.segments
        assert segments.image_states.row_of is None and len(segments) == rows
        chosen = model.layer_policy(segments.states).argmax(-1)
        layer = torch.full_like(chosen, layers) if name == "known_layer" else chosen
        picked[name] = segments.image_states.picked(segments.token_row, layer)
        kept[name] = segments.states.nbytes + picked[name].nbytes
    differences = [
        (picked["policy"].at(*place) - picked["policy_keeping_all"].at(*place)).abs().max()
        for place in zip(chosen.tolist(), range(rows), strict=True)
    ]
    inputs = model.prepare_rows(*text, images).lmm_inputs()
    settings = {"return_dict_in_generate": True, "output_hidden_states": True}
    plain = model.lmm.generate(**inputs, **writing(), **settings).hidden_states
    last = torch.stack([plain[0][layer][0, BEFORE_IMAGE : BEFORE_IMAGE + GRID**2] for layer in range(layers + 1)])
    ours = torch.stack([answers.segments.image_states.at(layer, 0) for layer in range(layers + 1)])
    assert (ours - last).abs().max() < 1e-4, "what is kept must be what a plain run gives"
    every = sum(state.nbytes for step in plain for state in step)
    ratios = {name: round(size / every, 4) for name, size in kept.items()}
    del plain, answers, picked

    def call(selection: str | int, limit: int):
        arguments = {"layer_selection": selection, "max_kept_prefixes": limit}
        return lambda: model.segment(*text, image_embeddings=images, **arguments, **writing())

    calls = {
        "known_layer": call("last", rows),
        "policy": call("argmax", 0),
        "policy_keeping_all": call("argmax", rows),
    }
    seconds = medians(calls, rounds)
    return {
        "measure": "states",
        "rows": rows,
        "layers": layers,
        "width": width,
        "kept_bytes": kept,
        "all_states_bytes": every,
        "ratio": ratios,
        "target_ratio": STATES_TARGET,
        "difference": float(max(differences)),
        "deepest_layer": int(chosen.max()),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "time_ratio": round(seconds["policy"] / seconds["policy_keeping_all"], 3),
        "within_bar": {name: ratios[name] <= STATES_TARGET for name in ("known_layer", "policy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of the prompts, after one not counted")
    parser.add_argument("--state-rounds", type=int, default=1, help="measured rounds of whole calls")
    options = parser.parse_args()
    common = {"benchmark": "states", "threads": torch.get_num_threads()}
    print(json.dumps({**common, **measure_prompts(options.rounds)}), flush=True)
    states = measure_states(options.rows, options.layers, options.width, options.state_rounds)
    print(json.dumps({**common, **states}), flush=True)


if __name__ == "__main__":
    main()
