"""Choose the peak below which a checkpoint's similarity maps say "not there", on validation scenes, and write it down.

    python -m uground.training.choose_rejection PATH --count 600

The highest threshold that costs at most `COST` of the answerable queries goes into `reject_threshold` of the folder's
config, which pipeline and evaluation follow. `benchmarks/rejection.py` measures what it brings on test scenes.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import PreTrainedModel

from uground.checkpoint_loading import load_model, load_processor
from uground.command_line import CommandParser, run_command, seed_number
from uground.modeling_uground import UGroundConfig
from uground.processing import UGroundProcessor
from uground.processing.rejection import is_rejected, map_peak, valid_maps
from uground.training.data.scene_data import scene_dataset

# Half of the queries ask for what is not there.
ASKED = {"fp_res": 0.5, "res": 0.25, "rs": 0.25}
COST = 0.01  # share of the answerable queries that a threshold may lose
BATCH = 16
MAX_NEW_TOKENS = 32


def answered_peaks(
    model: PreTrainedModel, processor: UGroundProcessor, split: str, count: int, seed: int
) -> list[dict]:
    """Per query `{"there": bool, "rejected": bool, "peak": float}`: the last is the best peak of its maps, or 0."""
    data, found = scene_dataset(split, count, seed, 1, ASKED), []
    for start in range(0, count, BATCH):
        items = [data[number] for number in range(start, min(start + BATCH, count))]
        examples = [item["examples"][0] for item in items]
        inputs = processor([item["image"] for item in items], [example["query"] for example in examples])
        outputs = model.segment(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        answers = processor.post_process_instance_segmentation(outputs)
        for example, answer, maps in zip(examples, answers, valid_maps(outputs, processor.patch_size), strict=True):
            peaks = [map_peak(similarity_map) for similarity_map in maps]
            rejected = is_rejected(answer["answer"], peaks, processor.reject_token)
            row = {"there": bool(example["masks"]), "rejected": rejected, "peak": max(peaks, default=0.0)}
            found.append(row)
    return found


def careful_threshold(rows: list[dict], cost: float = COST) -> float:
    """
    The highest threshold that loses at most a share `cost` of the queries that ask for what is there.

    Args:
        rows: of [`answered_peaks`]. Queries that the token rejects are lost already and cost nothing more.
    """
    kept = sorted(row["peak"] for row in rows if row["there"] and not row["rejected"])
    may_lose = int(cost * sum(row["there"] for row in rows))
    # A map as strong as the threshold is kept.
    return kept[may_lose] if may_lose < len(kept) else 0.0


def shares(rows: list[dict], threshold: float) -> dict[str, float]:
    """Of what is absent the share that is rejected, of what is there the share that is kept."""
    figures = {}
    for name, there in (("absent rejected", False), ("present kept", True)):
        right = [(row["rejected"] or row["peak"] < threshold) != there for row in rows if row["there"] == there]
        figures[name] = round(sum(right) / max(1, len(right)), 4)
    return figures


def choose(options: argparse.Namespace) -> None:
    """Measure, choose, and write the folder's config anew."""
    model, processor = load_model(options.path), load_processor(options.path)
    rows = answered_peaks(model, processor, "validation", options.count, options.seed)
    threshold = round(careful_threshold(rows), 4)
    config = UGroundConfig.from_pretrained(options.path)
    config.reject_threshold = threshold
    config.save_pretrained(options.path)
    print(json.dumps({"threshold": threshold, "token alone": shares(rows, 0.0), "with it": shares(rows, threshold)}))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = CommandParser("python -m uground.training.choose_rejection", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="checkpoint folder with a similarity_scaling of 'scaled'")
    parser.add_argument("--count", type=int, default=600, help="validation queries, half of them about nothing")
    parser.add_argument("--seed", type=seed_number, default=100, help="of these scenes")
    options = parser.parse_args(argv)
    return run_command("choose_rejection", lambda: choose(options))


if __name__ == "__main__":
    sys.exit(main())
