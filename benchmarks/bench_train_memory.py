"""Memory and time of a training step, against plainer ways to compute the same loss and gradients.

    python benchmarks/bench_train_memory.py [--layers 16] [--width 256] [--segments 12] [--queries 4]

All runs take steps of the same mid-size random model, with gradient checkpointing, in one process.

`reading`: one row of many segments, whose maps are read in two ways. `stacked` is the plain one: the image tokens of
all L+1 layers are stacked and copied for every segment, and the chosen layer is picked from the copies.

`packed`: several queries about an image, packed into one row as the collator does, against a row per query and stacked
layers (`plain`). Between them lie a row per query of which only the chosen layer is read (`rows`), and a packed row
whose layers are stacked (`packed_stacked`). The image is encoded once in all of them.

Peaks are bytes of tensors alive at once beyond those alive before the step, counted at every operation, so they do not
depend on the allocator or the machine; seconds are taken in turns without counting. Ends in one JSON line per measure.
"""

import argparse
import json
import weakref
from contextlib import contextmanager

import torch
from bench_inference import medians
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SamConfig

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation, modeling_uground
from uground.training.collator import pack_rows

IMAGE_TOKEN, SEGMENT_TOKEN, VOCABULARY = 299, 298, 300
SIDE, PATCH, FRAME = 336, 14, 128
TARGET_RATIO, TIME_TARGET = 0.5, 0.8
# Tokens of a query and of an answer in front of its segment.
QUERY_LENGTH, ANSWER_LENGTH = 20, 6


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id_of(leaf) not in given | self._known:
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def id_of(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


def build_model(layers: int, width: int) -> UGroundForReferringSegmentation:
    """A random model with the token grid of the real one, 24 x 24, and a small SAM."""
    torch.manual_seed(0)
    heads = max(1, width // 64)
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    lmm = {
        "model_type": "llava",
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": (SIDE // PATCH) ** 2,
        "text_config": {**text, "num_hidden_layers": layers, "num_attention_heads": heads},
        "vision_config": {**vision, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH},
    }
    sam = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": FRAME,
            "global_attn_indexes": [0],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": FRAME},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    model = UGroundForReferringSegmentation(
        UGroundConfig(lmm_config=lmm, sam_config=sam, segment_token_id=SEGMENT_TOKEN)
    )
    for encoder in (model.lmm.model.vision_tower, model.mask_decoder.sam.vision_encoder):
        encoder.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def build_inputs(segments: int) -> dict[str, torch.Tensor]:
    """One image, one row, and that many segment tokens in it."""
    row = [1] + [IMAGE_TOKEN] * (SIDE // PATCH) ** 2 + [5, SEGMENT_TOKEN] * segments
    ids = torch.tensor([row])
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100),
        "pixel_values": torch.randn(1, 3, SIDE, SIDE),
        "valid_sizes": torch.tensor([[SIDE, SIDE]]),
        "sam_pixel_values": torch.randn(1, 3, FRAME, FRAME),
        "sam_valid_sizes": torch.tensor([[FRAME, FRAME]]),
        "original_sizes": torch.tensor([[FRAME, FRAME]]),
    }


def query_inputs(queries: int) -> dict[str, torch.Tensor]:
    """One image and a row for each of that many queries, of two lengths; answers are learnt."""
    rows = [
        [1] + [IMAGE_TOKEN] * (SIDE // PATCH) ** 2 + [7 + row] * (QUERY_LENGTH - row % 2) + [6] * ANSWER_LENGTH
        for row in range(queries)
    ]
    longest = max(map(len, rows)) + 1
    ids = torch.tensor([[0] * (longest - 1 - len(row)) + [*row, SEGMENT_TOKEN] for row in rows])
    is_answer = (torch.arange(longest) >= longest - ANSWER_LENGTH - 1).expand_as(ids)
    return {
        **build_inputs(1),
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(~is_answer, -100),
        "image_index": torch.zeros(queries, dtype=torch.long),
    }


def stacked_similarity(segment_states, image_states, rows, layer_index) -> torch.Tensor:
    """What `image_similarity` gives, by way of all layers for each segment."""
    every = torch.stack(image_states.layers, 1)
    tokens = torch.stack([every[row, :, image_states.columns[row]] for row in rows.tolist()])
    chosen = tokens[torch.arange(len(rows)), layer_index]
    return torch.einsum("nd,ntd->nt", segment_states.float(), chosen.float())


@contextmanager
def formulation(read):
    """Let models read similarities by `read`."""
    original = modeling_uground.image_similarity
    modeling_uground.image_similarity = read
    try:
        yield
    finally:
        modeling_uground.image_similarity = original


def step(model, inputs, layer_index, read) -> float:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    with formulation(read):
        outputs = model(**inputs, layer_index=layer_index)
        loss = outputs.loss + outputs.mask_logits.square().mean() + outputs.similarity_map.square().mean()
        loss.backward()
    return float(loss.detach())


def measure(model, inputs, layer_index, read) -> tuple[int, float, torch.Tensor]:
    """Peak bytes of a step, its loss, and the gradient of the first query projection."""
    with LiveBytes() as live:
        loss = step(model, inputs, layer_index, read)
    gradient = model.lmm.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone()
    return live.peak, loss, gradient


def measure_packed(model, queries: int, layers: int, rounds: int) -> dict:
    """Peaks and seconds of four ways to take the same step; those of a packed row against those of a row per query."""
    rows = query_inputs(queries)
    packed = pack_rows(rows, IMAGE_TOKEN, pad_token_id=0)
    layer_index = layers - torch.arange(queries) * layers // (2 * queries)
    ways = {
        "packed": (packed, modeling_uground.image_similarity),
        "packed_stacked": (packed, stacked_similarity),
        "rows": (rows, modeling_uground.image_similarity),
        "plain": (rows, stacked_similarity),
    }
    peaks, found = {}, {}
    for name, (inputs, read) in ways.items():
        peaks[name], *found[name] = measure(model, inputs, layer_index, read)
    loss, gradient = found["plain"]
    difference = max(float((other - gradient).abs().max()) for _, other in found.values())
    assert all(abs(other - loss) < 1e-3 for other, _ in found.values()) and difference < 1e-3, "must compute the same"
    works = {name: lambda way=way: step(model, way[0], layer_index, way[1]) for name, way in ways.items()}
    seconds = medians(works, rounds)
    ratio, time_ratio = peaks["packed"] / peaks["plain"], seconds["packed"] / seconds["plain"]
    return {
        "measure": "packed",
        "queries": queries,
        "peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "ratio": round(ratio, 3),
        "target_ratio": TARGET_RATIO,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "time_ratio": round(time_ratio, 3),
        "target_time_ratio": TIME_TARGET,
        "gradient_difference": difference,
        "within_bar": {"memory": ratio <= TARGET_RATIO, "time": time_ratio <= TIME_TARGET},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of packed steps, after one not counted")
    options = parser.parse_args()
    common = {"benchmark": "train_memory", "layers": options.layers, "width": options.width}
    model, inputs = build_model(options.layers, options.width), build_inputs(options.segments)
    layer_index = torch.arange(options.segments) % (options.layers + 1)
    ours, loss, gradient = measure(model, inputs, layer_index, modeling_uground.image_similarity)
    stacked, other_loss, other_gradient = measure(model, inputs, layer_index, stacked_similarity)
    difference = float((gradient - other_gradient).abs().max())
    assert abs(loss - other_loss) < 1e-3 and difference < 1e-3, "both formulations must compute the same"
    result = {
        **common,
        "measure": "reading",
        "segments": options.segments,
        "peak_mib": round(ours / 2**20, 1),
        "stacked_peak_mib": round(stacked / 2**20, 1),
        "ratio": round(ours / stacked, 3),
        "target_ratio": TARGET_RATIO,
        "gradient_difference": difference,
        "within_bar": ours / stacked <= TARGET_RATIO,
    }
    print(json.dumps(result), flush=True)
    print(json.dumps({**common, **measure_packed(model, options.queries, options.layers, options.rounds)}))


if __name__ == "__main__":
    main()
