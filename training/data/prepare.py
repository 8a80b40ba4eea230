"""Bring a published dataset from its original files, or a JSONL file, to parquet in the common schema.

    python -m uground.training.data.prepare refcoco --root DIR --output PARQUET_DIR
    python -m uground.training.data.prepare mine.jsonl --output PARQUET_DIR --embed-images
    python -m uground.training.data.prepare scenes --split test --count 1000 --output PARQUET_DIR

DIR is the folder that holds `refer_seg/`, `reason_seg/`, …, or the dataset's own folder; docs/data.md has the layouts.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

from tqdm import tqdm

from uground.command_line import CommandParser, run_command, seed_number
from uground.training.data.jsonl import JsonlSource, named_file
from uground.training.data.prepared import file_rows, write_prepared
from uground.training.data.registry import DATASETS, read_samples
from uground.training.data.samples import SkipCount
from uground.training.data.wording import Wording, group_samples
from uground.training.scenes import SPLITS as SCENE_SPLITS
from uground.training.scenes import scenes

SCENES = "scenes"


def prepared_examples(arguments: argparse.Namespace, split: str, skips: SkipCount) -> Iterator[dict]:
    """
    The examples of a split as told by the arguments of the command, images not opened; counts what is left out.

    Raises:
        OSError, ValueError: at once where files are missing or make no sense; of one record when it is read.
    """
    if named_file(arguments.dataset):
        path, _ = named_file(arguments.dataset)
        return islice(file_rows(JsonlSource(path, split), arguments.embed_images), arguments.count)
    if arguments.dataset == SCENES:
        return ({**example, "subset": None} for example in scenes(split, arguments.count or 1000, arguments.seed))
    style = arguments.words or ("training" if split == "train" else "evaluation")
    wording = Wording(style, arguments.seed, arguments.rejection)
    samples = read_samples(arguments.dataset, arguments.root, split, skips)
    if arguments.targets_per_query > 1 or arguments.queries_per_image is not None:
        samples = group_samples(
            list(samples), arguments.seed, arguments.targets_per_query, arguments.queries_per_image
        )
    return map(wording.example, islice(samples, arguments.count))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        "python -m uground.training.data.prepare",
        description=__doc__.splitlines()[0],
        epilog="datasets and splits: "
        + "; ".join(f"{name}: {' '.join(entry.splits)}" for name, entry in DATASETS.items()),
    )
    parser.add_argument("dataset", metavar="DATASET", help="name of the dataset, or a JSONL file")
    parser.add_argument("--root", help="folder of the original files")
    parser.add_argument("--output", required=True, help="folder to write data/SPLIT-*.parquet to")
    parser.add_argument(
        "--split", nargs="+", help="splits to prepare, all by default; of lines that name none what they are (train)"
    )
    parser.add_argument("--count", type=int, help="at most so many examples of each split")
    parser.add_argument(
        "--words", choices=["training", "evaluation"], help="templates; by default training for the split train only"
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of templates and of what is asked about each image"
    )
    parser.add_argument("--targets-per-query", type=int, default=1, help="at most so many targets of an image at once")
    parser.add_argument("--queries-per-image", type=int, help="at most so many queries of an image; all by default")
    parser.add_argument(
        "--rejection",
        choices=["token", "text"],
        default="token",
        help="deny false premises with [REJ] or in words only",
    )
    parser.add_argument("--embed-images", action="store_true", help="store the pictures inside the parquet files")
    arguments = parser.parse_args(argv)
    if arguments.dataset not in (SCENES, *DATASETS) and not named_file(arguments.dataset):
        parser.error(
            f"there is no dataset {arguments.dataset!r}; there are: {SCENES}, {', '.join(DATASETS)}, JSONL files"
        )
    for name in ("count", "targets_per_query", "queries_per_image"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parse(argv)
    return run_command("prepare", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    for split in _splits(arguments):
        skips = SkipCount()
        examples = tqdm(prepared_examples(arguments, split, skips), desc=split, unit=" examples")
        count = write_prepared(examples, arguments.output, split, arguments.embed_images)
        print("; ".join(filter(None, (f"{split}: {count} examples in {arguments.output}/data", str(skips)))))


def _splits(arguments: argparse.Namespace) -> list[str]:
    """The splits to prepare."""
    if file := named_file(arguments.dataset):
        path, named = file
        known = JsonlSource(path, named).splits
        if named and arguments.split:
            raise ValueError(f"a split is named by --split or behind the colon of {arguments.dataset}, got both")
        wanted = [named] if named else arguments.split or known or ["train"]
        if not known and len(wanted) > 1:
            raise ValueError(f"the lines of {path} name no splits, so --split takes one name, got {len(wanted)}")
        known = known or wanted
    elif arguments.dataset == SCENES:
        known = tuple(SCENE_SPLITS)
        wanted = arguments.split or known
    else:
        known = DATASETS[arguments.dataset].splits
        wanted = arguments.split or DATASETS[arguments.dataset].whole_splits
    for split in wanted:
        if split not in known:
            raise ValueError(f"{arguments.dataset} has no split {split!r}; it has: {', '.join(known)}")
    return list(wanted)


if __name__ == "__main__":
    sys.exit(main())
