"""Loading a 1-GB checkpoint, against the same weights in a plain `LlavaForConditionalGeneration` + `SamModel` pair.

    python benchmarks/bench_load.py

Each load runs in a process of its own, in turns, after one of each that is not counted; every weight is read once.
Prints one JSON line: medians of seconds and of the growth of peak memory, and their ratios (UGround / pair; at most
1.15 wanted).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, SamConfig, SamModel, logging

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

WANTED = 1.15
KINDS = ("uground", "pair")


def big_config(layers: int) -> UGroundConfig:
    """A LLaVA of width 1024 with six layers of CLIP, and a SAM of its base size; 20 layers make 1 GB in bfloat16."""
    lmm_config = {
        "model_type": "llava",
        "image_token_index": 31999,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "image_size": 336,
            "patch_size": 14,
        },
    }
    return UGroundConfig(lmm_config=lmm_config, sam_config=SamConfig(), segment_token_id=31998)


def make_checkpoints(folder: Path, layers: int) -> int:
    """Random weights, saved both ways; returns the bytes of the UGround checkpoint."""
    with torch.device("meta"):
        model = UGroundForReferringSegmentation(big_config(layers)).bfloat16()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
            else:
                tensor.zero_()
    model.save_pretrained(folder / "uground")
    model.lmm.save_pretrained(folder / "llava")
    model.mask_decoder.sam.save_pretrained(folder / "sam")
    return sum(path.stat().st_size for path in (folder / "uground").glob("*.safetensors"))


def load(kind: str, folder: Path) -> dict:
    """Seconds and growth of peak memory in bytes, of loading and reading every weight."""
    before = peak_bytes()
    start = time.perf_counter()
    if kind == "uground":
        models = [UGroundForReferringSegmentation.from_pretrained(folder / "uground", dtype="auto")]
    else:
        models = [
            LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype="auto"),
            SamModel.from_pretrained(folder / "sam", dtype="auto"),
        ]
    for model in models:
        for parameter in model.parameters():
            parameter.view(-1).view(torch.int16).max()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """Peak resident memory of this process; `getrusage` would begin with that of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(folder: Path, rounds: int) -> dict[str, list[dict]]:
    """`rounds` loads of each kind, in turns."""
    measured = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind in KINDS:
            command = [sys.executable, __file__, "--kind", kind, "--folder", str(folder)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if number:
                measured[kind].append(result)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="loads of each kind that count")
    parser.add_argument("--layers", type=int, default=20, help="decoder layers; the default makes 1 GB")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.kind:
        print(json.dumps(load(options.kind, options.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="uground-bench-") as folder:
        size = make_checkpoints(Path(folder), options.layers)
        measured = measure(Path(folder), options.rounds)
    line = {"benchmark": "load", "checkpoint_bytes": size, "rounds": options.rounds}
    for name in ("seconds", "bytes"):
        medians = {kind: statistics.median(result[name] for result in measured[kind]) for kind in KINDS}
        line |= {f"{kind}_{name}": round(value, 3) for kind, value in medians.items()}
        line[f"ratio_{name}"] = round(medians["uground"] / medians["pair"], 3)
    line["wanted_ratio"] = WANTED
    line["within_bar"] = line["ratio_seconds"] <= WANTED and line["ratio_bytes"] <= WANTED
    print(json.dumps(line))


if __name__ == "__main__":
    main()
