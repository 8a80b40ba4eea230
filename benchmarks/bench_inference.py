"""Speed and memory of asking, in pairs within one process: one JSON line per measure, medians over the rounds.

    python benchmarks/bench_inference.py                       # everything, at the middle size
    python benchmarks/bench_inference.py --scale tiny --only shared batched
    python benchmarks/bench_inference.py --scale 7b --device cuda --dtype bfloat16

Weights are random and answers are dictated, so every run writes the same tokens with one segment each. `middle` is an
LMM of width 512 with 12 layers and 576 image tokens, and SAM with the shapes of ViT-B; all of it takes the better
part of an hour on two cores.
"""

import argparse
import gc
import json
import statistics
import time
import weakref
from itertools import pairwise

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, SamConfig

from uground import UGroundConfig, UGroundForReferringSegmentation
from uground.job_processes import job_state
from uground.modeling_uground.layer_states import ImageStates, states_at
from uground.modeling_uground.similarity import image_similarity

# LMM width, feed-forward width, layers, heads; CLIP width, feed-forward width, layers, heads, image; SAM width,
# layers, heads, frame, global layers; vocabulary.
SCALES = {
    "tiny": ((64, 128, 12, 4), (32, 64, 3, 2, 84), (32, 2, 2, 256, [1]), 200),
    "middle": ((512, 1376, 12, 8), (512, 2048, 12, 8, 336), (768, 12, 12, 1024, [2, 5, 8, 11]), 32004),
    "7b": ((4096, 11008, 32, 32), (1024, 4096, 24, 16, 336), (1280, 32, 16, 1024, [7, 15, 23, 31]), 32004),
}
BEFORE_IMAGE, ANSWER_LENGTH, CALLS = 35, 10, 200
SEGMENT_AT = 6


def build_model(scale: str, device: str, dtype: torch.dtype) -> UGroundForReferringSegmentation:
    """A model of random weights."""
    (width, inner, layers, heads), clip, sam, vocabulary = SCALES[scale]
    lmm_config = {
        "model_type": "llava",
        "image_token_index": vocabulary - 1,
        "image_seq_length": (clip[4] // 14) ** 2,
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": clip[0],
            "intermediate_size": clip[1],
            "num_hidden_layers": clip[2],
            "num_attention_heads": clip[3],
            "image_size": clip[4],
            "patch_size": 14,
        },
    }
    frame = {"image_size": sam[3], "patch_size": 16}
    sam_config = SamConfig(
        vision_config={
            "hidden_size": sam[0],
            "num_hidden_layers": sam[1],
            "num_attention_heads": sam[2],
            "global_attn_indexes": sam[4],
            **frame,
        },
        prompt_encoder_config=frame,
    )
    config = UGroundConfig(lmm_config=lmm_config, sam_config=sam_config, segment_token_id=vocabulary - 2)
    torch.manual_seed(0)
    with torch.device(device):
        return UGroundForReferringSegmentation(config).to(dtype).eval()


class Dictate(LogitsProcessor):
    """Every row writes the same tokens, the segment token once."""

    def __init__(self, segment_token_id: int):
        self.tokens = [7] * ANSWER_LENGTH
        self.tokens[SEGMENT_AT] = segment_token_id
        self.step = 0

    def __call__(self, input_ids, scores):
        token, self.step = self.tokens[self.step], self.step + 1
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token], device=scores.device), 0.0)


class Case:
    """A model, images of three shapes and queries of changing length for it."""

    def __init__(self, scale: str, device: str, dtype: torch.dtype):
        self.model = build_model(scale, device, dtype)
        self.device = device

    def inputs(self, images: int, rows: int, start: int = 0) -> dict:
        """`rows` queries, shared out over `images` images; those of `start` = 1 are others than those of 0."""
        config = self.model.config
        side, frame = config.adapter.frame.side, config.head_frame.side
        grid_rows, grid_columns = config.token_grid_hw
        generator = torch.Generator().manual_seed(start)
        shapes = [((1, 1), (3, 4), (1, 2))[(start + image) % 3] for image in range(images)]
        small = [(side * high // wide, side) for high, wide in shapes]
        large = [(frame * high // wide, frame) for high, wide in shapes]
        image_id, text = config.image_token_id, [5] * BEFORE_IMAGE
        prompts = [
            text + [image_id] * (grid_rows * grid_columns) + [9 + (start + row) % 50] * (18 + (start + row) % 6)
            for row in range(rows)
        ]
        length = max(map(len, prompts))
        inputs = {
            "input_ids": torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts]),
            "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
            "image_index": torch.arange(rows) * images // rows,
            "pixel_values": torch.randn(images, 3, side, side, generator=generator),
            "valid_sizes": torch.tensor(small),
            "sam_pixel_values": torch.randn(images, 3, frame, frame, generator=generator),
            "sam_valid_sizes": torch.tensor(large),
            "original_sizes": torch.tensor([(480 * high // wide, 480) for high, wide in shapes]),
        }
        return {name: value.to(self.device) for name, value in inputs.items()}

    def writing(self) -> dict:
        """Generation arguments of one call."""
        dictate = Dictate(self.model.config.segment_token_id)
        return {"max_new_tokens": ANSWER_LENGTH, "logits_processor": LogitsProcessorList([dictate])}

    def ask(self, inputs: dict, **settings):
        outputs = self.model.segment(**inputs, **{"layer_selection": "last", **settings}, **self.writing())
        return outputs.mask_logits.sum().item()

    @torch.no_grad()
    def by_hand(self, inputs: dict) -> float:
        """The parts alone: the LMM's own `generate`, SAM's encoder, SAM's decoder with a prompt of each kind."""
        model, sam = self.model, self.model.mask_decoder.sam
        pixels = inputs["pixel_values"].to(model.dtype)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        model.lmm.generate(**text, pixel_values=pixels, **self.writing())
        embeddings = sam.vision_encoder(inputs["sam_pixel_values"].to(model.dtype))[0]
        side = model.mask_decoder.side
        channels = model.config.sam_config.prompt_encoder_config.hidden_size
        _, dense = sam.prompt_encoder(None, None, None, embeddings.new_zeros(1, 1, side, side))
        masks, _ = sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=embeddings.new_zeros(1, 1, 1, channels),
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return masks.float().sum().item()


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within it held at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage) -> None:
        # In-place results come by again, and views share the storage of older tensors.
        if storage.data_ptr() in self.alive or storage.data_ptr() in self.known:
            return
        address, size = storage.data_ptr(), storage.nbytes()
        self.alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size

    def measure(self, work, *known: torch.Tensor) -> int:
        """Peak bytes of `work()` beyond the tensors that were there before."""
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        with self:
            kept = work()
        del kept
        return self.peak


def medians(works: dict, rounds: int) -> dict[str, float]:
    """Seconds of each of several ways to do the same, taken in turns, the first round not counted."""
    times = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def paired(name: str, bar: float, rounds: int, fast, slow) -> dict:
    seconds = medians({"fast": fast, "slow": slow}, rounds)
    ratio = seconds["fast"] / seconds["slow"]
    rounded = {key: round(value, 4) for key, value in seconds.items()}
    return {"measure": name, "seconds": rounded, "ratio": round(ratio, 4), "bar": bar, "within_bar": ratio <= bar}


def shared(case: Case, rounds: int) -> dict:
    """16 queries on one image in one call, against 16 calls."""
    together = case.inputs(1, 16)
    singles = [{**together, **row_of(together, row)} for row in range(16)]
    return paired("shared", 0.25, rounds, lambda: case.ask(together), lambda: [case.ask(one) for one in singles])


def row_of(inputs: dict, row: int) -> dict:
    start = int((inputs["attention_mask"][row] == 0).sum())
    text = {name: inputs[name][row, None, start:] for name in ("input_ids", "attention_mask")}
    return {**text, "image_index": torch.zeros_like(inputs["image_index"][:1])}


def batched(case: Case, rounds: int) -> dict:
    """16 queries about 16 images, 8 at a time, against one by one."""
    eights = [case.inputs(8, 8, start) for start in (0, 8)]
    singles = [case.inputs(1, 1, start) for start in range(16)]
    works = [lambda: [case.ask(one) for one in eights], lambda: [case.ask(one) for one in singles]]
    return paired("batched", 0.6, rounds, *works)


def overhead(case: Case, rounds: int) -> dict:
    """One query, against its parts run by hand."""
    inputs = case.inputs(1, 1)
    return paired("overhead", 1.1, rounds, lambda: case.ask(inputs), lambda: case.by_hand(inputs))


def monte_carlo(case: Case, rounds: int) -> dict:
    """8 drawn layers, against the last one."""
    inputs = case.inputs(1, 1)
    drawn = {"layer_selection": "mc", "num_layer_samples": 8}
    return paired("mc", 1.25, rounds, lambda: case.ask(inputs, **drawn), lambda: case.ask(inputs))


def states(case: Case, rounds: int) -> dict:
    """Bytes per segment to read 16 segments of one image, each at a layer of its own, against copying all layers."""
    config, count = case.model.config, 16
    width, tokens = config.get_text_config().hidden_size, case.inputs(1, 1)["input_ids"].shape[1]
    rows, layers = torch.zeros(count, dtype=torch.long), torch.arange(count) % config.num_layers
    columns = torch.arange(count) + tokens - count
    positions = torch.arange(config.token_grid_hw[0] ** 2)[None] + BEFORE_IMAGE
    hidden = tuple(torch.randn(1, tokens, width) for _ in range(config.num_layers))

    def ours():
        read = states_at(hidden, rows, columns[:, None])[:, 0]
        chosen = read[torch.arange(count), layers]
        return read, image_similarity(chosen, ImageStates(hidden, positions), rows, layers)

    def stacked():
        every = torch.stack(hidden, 1)
        levels = torch.arange(len(hidden))[None, :, None]
        return every[rows, :, columns], every[rows[:, None, None], levels, positions[rows][:, None]]

    peaks = {name: PeakMemory().measure(work, *hidden) for name, work in (("fast", ours), ("slow", stacked))}
    ratio = peaks["fast"] / peaks["slow"]
    per_segment = {name: peak // count for name, peak in peaks.items()}
    result = {"measure": "states", "bytes_per_segment": per_segment, "ratio": round(ratio, 4), "bar": 0.1}
    return {**result, "within_bar": ratio <= 0.1}


def growth(case: Case, rounds: int) -> dict:
    """Seconds of 1, 2, 4, … 64 queries on one image; what a query costs beyond the first, against the first."""
    counts = [2**power for power in range(7)]
    works = {}
    for count in counts:
        inputs = case.inputs(1, count)
        works[count] = lambda inputs=inputs: case.ask(inputs)
    seconds = medians(works, rounds)
    marginal = [(seconds[b] - seconds[a]) / (b - a) / seconds[1] for a, b in pairwise(counts)]
    whole = (seconds[64] - seconds[1]) / 63 / seconds[1]
    table = {str(count): round(value, 4) for count, value in seconds.items()}
    steps = {str(count): round(value, 4) for count, value in zip(counts[1:], marginal, strict=True)}
    result = {"measure": "growth", "seconds": table, "marginal": steps, "ratio": round(whole, 4), "bar": 0.15}
    return {**result, "within_bar": whole <= 0.15}


def resident(case: Case, rounds: int) -> dict:
    """Resident memory over many calls of changing sizes on encoded images: between the first quarter and the last."""
    process, sizes = psutil.Process(), []
    images = case.inputs(2, 2)
    embeddings = case.model.get_image_embeddings(**images)
    for call in range(CALLS):
        inputs = case.inputs(2, 2 + call % 3, call)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_index")}
        case.ask(text, image_embeddings=embeddings, layer_selection=("last", "argmax", "mc")[call % 3])
        gc.collect()
        sizes.append(process.memory_info().rss)
    quarter = CALLS // 4
    first, last = max(sizes[quarter : 2 * quarter]), max(sizes[-quarter:])
    growth_of = last / first - 1
    result = {"measure": "resident", "calls": CALLS, "mebibytes": [first >> 20, last >> 20]}
    return {**result, "ratio": round(growth_of, 4), "bar": 0.02, "within_bar": growth_of <= 0.02}


MEASURES = {
    "shared": shared,
    "batched": batched,
    "overhead": overhead,
    "states": states,
    "mc": monte_carlo,
    "growth": growth,
    "resident": resident,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scale", choices=SCALES, default="middle")
    parser.add_argument("--only", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after one that is not counted")
    parser.add_argument("--device", default=str(job_state().device), help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    case = Case(args.scale, args.device, getattr(torch, args.dtype))
    common = {"benchmark": "inference", "scale": args.scale, "device": args.device, "dtype": args.dtype}
    common |= {"threads": torch.get_num_threads(), "rounds": args.rounds}
    for name in args.only:
        print(json.dumps({**common, **MEASURES[name](case, args.rounds)}), flush=True)


if __name__ == "__main__":
    main()
