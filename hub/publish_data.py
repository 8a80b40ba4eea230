"""Publish a prepared dataset, a JSONL file, or Scenes, to the Hub with a card, in one commit.

    python -m uground.hub.publish_data prepared/refcoco --repo-id someone/refcoco-grounding --license cc-by-4.0
    python -m uground.hub.publish_data mine.jsonl --repo-id someone/cups --license cc-by-4.0
    python -m uground.hub.publish_data scenes --count 1000 --seed 0 --repo-id someone/scenes

PATH is a folder written by `uground.training.data.prepare`, or a JSONL file as for training; it is only read. Pictures
go inside the parquet files.
Check first that the licence of the original data lets you publish it.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData
from tqdm import tqdm

from uground.command_line import checked_seed, run_command, seed_number
from uground.hub.publish.commit import add_repository_arguments, check_repo_id, commit_files, require_token
from uground.hub.publish.publishing import listing
from uground.training.data.jsonl import JsonlSource, named_file
from uground.training.data.prepared import (
    FEATURES,
    checked_answer,
    checked_example,
    file_rows,
    open_parquet,
    parquet_rows,
    prepared_splits,
    write_prepared,
)
from uground.training.data.records import Record
from uground.training.scenes import SPLITS, scenes

SCENES = "scenes"
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
COLUMN_NOTES = {
    "id": "name of the example",
    "image": "the picture",
    "query": "what is asked",
    "answer": "the answer in words, with one `[SEG]` per mask in order, and `[REJ]` for what is not there",
    "phrases": "what is asked for, a phrase per target",
    "masks": "a COCO run-length encoding per `[SEG]`",
    "ignore": "run-length encoding of pixels that count neither way, or nothing",
    "attribute": "`res`, `rs`, `fp_res`, `gres`, `multi_rs` or `vqa`",
    "subset": "a part of the split that is reported apart, or nothing",
}
SCENES_ABOUT = (
    "Scenes: images of geometric shapes and simple things, drawn by the code of `uground` from a seed, with exact "
    "queries, answers and masks. Splits differ in their random streams, and some combinations of colour and kind "
    "stand in one evaluation split only."
)
FILE_ABOUT = "Images with queries, answers and masks, in one schema for visual grounding."
PREPARED_ABOUT = (
    "A published dataset brought to one schema for visual grounding by `uground.training.data.prepare`. Pictures and "
    "annotations belong to those who made them."
)


def count_attributes(folder: str | os.PathLike) -> dict[str, Counter]:
    """
    How many examples of each attribute the splits of a prepared folder hold.

    Raises:
        OSError: the folder holds no prepared dataset.
        ValueError: columns are missing, a split is empty, or an answer does not fit its masks.
    """
    splits = prepared_splits(folder)
    if not splits:
        raise FileNotFoundError(f"{os.fspath(folder)!r} holds no prepared dataset (data/SPLIT-*.parquet)")
    counts = {}
    for split, files in splits.items():
        counts[split] = Counter()
        for name, row in _rows(files, ["id", "query", "answer", "phrases", "masks", "attribute"]):
            checked_answer(Record(row, f"{name}, {row['id']}"))
            counts[split][row["attribute"]] += 1
        if not counts[split]:
            raise ValueError(f"the split {split!r} of {os.fspath(folder)!r} is empty")
    return counts


def build_dataset_card(
    folder: str | os.PathLike, repo_id: str, about: str = PREPARED_ABOUT, license: str | None = None
) -> DatasetCard:
    """
    The card of a prepared folder; its figures are counted in the files.

    Args:
        folder: of the prepared dataset.
        repo_id: where it will lie.
        about: what it is and where it is from.
        license: licence of pictures and annotations, as the Hub spells it.
    """
    counts = count_attributes(folder)
    total = sum(count.total() for count in counts.values())
    named = {"license": license} if license else {"license": "other", "license_name": "see-the-original-data"}
    data = DatasetCardData(
        **named,
        language="en",
        pretty_name=repo_id.split("/")[-1],
        task_categories=["image-segmentation"],
        size_categories=[next((name for limit, name in SIZES if total < limit), "n>1M")],
        tags=["uground", "referring-segmentation", "visual-grounding"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts],
            }
        ],
    )
    attributes = sorted({name for count in counts.values() for name in count})
    lines = [f"# {repo_id.split('/')[-1]}", "", about, "", "## Use", "", "```python"]
    lines += [
        "from datasets import load_dataset",
        "",
        f'data = load_dataset("{repo_id}")',
        "```",
        "",
        "## Columns",
        "",
    ]
    lines += [f"- `{name}`: {COLUMN_NOTES[name]}" for name in FEATURES]
    lines += ["", "## Examples", "", "| split | " + " | ".join(attributes) + " | all |"]
    lines += ["|---|" + "---|" * (len(attributes) + 1)]
    for split, count in counts.items():
        lines.append(f"| {split} | " + " | ".join(str(count[name]) for name in attributes) + f" | {count.total()} |")
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


@contextmanager
def staged_data(source: str | os.PathLike, repo_id: str, license: str | None = None) -> Iterator[Path]:
    """
    A temporary folder with what the repository of a prepared folder should hold: data with pictures inside, and card.

    Raises:
        OSError: it is no prepared folder, or a picture is gone.
        ValueError: see [`count_attributes`].
    """
    card = build_dataset_card(source, repo_id, license=license)
    with tempfile.TemporaryDirectory(prefix="uground-publish-") as made:
        for split, files in prepared_splits(source).items():
            rows = tqdm(_rows(files, list(FEATURES)), desc=split, unit=" examples")
            write_prepared((_with_picture(name, row) for name, row in rows), made, split, embed=True)
        card.save(Path(made) / "README.md")
        yield Path(made)


@contextmanager
def staged_file(source: str, repo_id: str, split: str | None, license: str | None = None) -> Iterator[Path]:
    """
    The same for a JSONL file, with or without `:SPLIT`, every line of which is read.

    Args:
        source: the file; its lines may name splits, all of which are staged, or the one that is named.
        repo_id, license: as for [`build_dataset_card`].
        split: what the lines of a file are called that names none; `train` by default.

    Raises:
        OSError, ValueError: a line is bad, a conversation of several turns, or names a split though `split` does.
    """
    path, named = named_file(source)
    whole = JsonlSource(path, named)
    if whole.splits and split is not None:
        raise ValueError(f"--split is for files whose lines name none, those of {path} do: {', '.join(whole.splits)}")
    with tempfile.TemporaryDirectory(prefix="uground-publish-") as made:
        for name in [named] if whole.splits and named else whole.splits or [split or "train"]:
            lines = JsonlSource(path, name)
            rows = tqdm(file_rows(lines, embed=True), desc=name, total=len(lines), unit=" examples")
            write_prepared(rows, made, checked_split(name))
        build_dataset_card(made, repo_id, FILE_ABOUT, license=license).save(Path(made) / "README.md")
        yield Path(made)


def checked_split(name: str) -> str:
    """
    The name of a split that may be part of the name of a file.

    Raises:
        ValueError: it may not.
    """
    if not SPLIT_NAME.fullmatch(name):
        raise ValueError(f"--split must be a word of letters, digits, '_' and '.', got {name!r}")
    return name


@contextmanager
def staged_scenes(repo_id: str, count: int, seed: int) -> Iterator[Path]:
    """The same for `count` examples of every split of Scenes."""
    with tempfile.TemporaryDirectory(prefix="uground-publish-") as made:
        for split in SPLITS:
            drawn = tqdm(scenes(split, count, seed), desc=split, total=count, unit=" examples")
            write_prepared(({**example, "subset": None} for example in drawn), made, split)
        about = f"{SCENES_ABOUT} Seed {seed}."
        build_dataset_card(made, repo_id, about, license="apache-2.0").save(Path(made) / "README.md")
        yield Path(made)


def publish_data(
    source: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    count: int = 1000,
    seed: int = 0,
    split: str | None = None,
) -> str | None:
    """
    Publish a dataset; what the command does.

    Args:
        source: a prepared folder, a JSONL file with or without `:SPLIT`, or `"scenes"`.
        repo_id: `USER/NAME`.
        private, dry_run: as for [`uground.hub.publish.publish`].
        license: licence of a prepared folder's pictures and annotations.
        count, seed: examples of each split, for Scenes.
        split: what a JSONL file whose lines name no split is called there; `train` by default.

    Returns:
        Address of the commit; `None` for a dry run.

    Raises:
        OSError, ValueError: it cannot be published; the sentence says why.
    """
    check_repo_id(repo_id)
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    token = None if dry_run else require_token()
    if split is not None:
        checked_split(split)
    if os.fspath(source) == SCENES:
        stage = staged_scenes(repo_id, count, checked_seed(seed, "--seed"))
    elif named_file(os.fspath(source)):
        stage = staged_file(os.fspath(source), repo_id, split, license)
    else:
        stage = staged_data(source, repo_id, license)
    with stage as folder:
        if dry_run:
            print(listing(folder, repo_id))
            return None
        return commit_files(folder, repo_id, token, "Publish dataset with uground", private, repo_type="dataset")


def _rows(files: list[str], columns: list[str]) -> Iterator[tuple[str, dict]]:
    """Rows, and what to call each in messages."""
    for file in files:
        held = open_parquet(file).schema_arrow.names
        absent = [name for name in columns if name not in held]
        if absent:
            raise ValueError(f"{file} lacks the columns {', '.join(absent)} of a prepared dataset")
        for number, row in enumerate(parquet_rows(file, columns)):
            yield f"{file} row {number}", row


def _with_picture(name: str, row: dict) -> dict:
    """The row with its picture's file inside, and no path that only means something here; all of it is checked."""
    image = row["image"] if isinstance(row["image"], dict) else {}
    path = Path(image["path"]) if image.get("path") else None
    if image.get("bytes") is None and path is not None and not path.is_file():
        raise FileNotFoundError(f"{name}: the picture of example {row['id']!r} is gone: {path}")
    checked_example(row, name)
    content = image["bytes"] if image.get("bytes") is not None else path.read_bytes()
    return {**row, "image": {"bytes": content, "path": path.name if path else None}}


def main(argv: list[str] | None = None) -> int:
    usage, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground.hub.publish_data",
        description=usage,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", metavar="PATH", help='prepared folder, JSONL file (with or without :SPLIT), or "scenes"'
    )
    add_repository_arguments(parser)
    parser.add_argument("--license", help="licence of pictures and annotations, as the Hub spells it")
    parser.add_argument("--split", help="what the lines of a JSONL file are that name no split (default: train)")
    parser.add_argument("--count", type=int, default=1000, help="examples of each split, for scenes")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed, for scenes")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    address = publish_data(
        options.path,
        options.repo_id,
        private=options.private,
        dry_run=options.dry_run,
        license=options.license,
        count=options.count,
        seed=options.seed,
        split=options.split,
    )
    if address is not None:
        print(address)


if __name__ == "__main__":
    sys.exit(main())
