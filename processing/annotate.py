"""Ask the same or listed queries of many images; write answers and masks as parquet.

    accelerate launch -m uground.processing.annotate --input photos/ --queries queries.txt --output annotated/
    python -m uground.processing.annotate --input user/dataset --split train --queries asked.jsonl --output annotated/

--input is a folder of images (searched through), an image, a dataset of `datasets` saved to disk, or a Hub id.
--queries is a .txt file, one query a line, asked of every image; or a .jsonl file of {"image": ID, "query": "…"} or
{"image": ID, "queries": ["…", …]}, where ID is the path below the folder, or the column `id` (else the number) of a
row.

The images are cut into shards of --shard-size, each written at once as `part-NNNNNNNN.parquet`, one row per image and
query. After an interruption the same command, on any number of processes, goes on with the shards that are missing.
An image that cannot be read is recorded in the column `error`.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import transformers
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from uground import tiny_checkpoint
from uground.checkpoint_loading import load_model, load_processor
from uground.command_line import LOADING_DTYPES, RESUMABLE, run_command

from .job_processes import job_state
from .pipeline_uground import ReferringSegmentationPipeline

SETTINGS_FILE = "annotate.json"
SEGMENT = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float32()),
        ("box", pa.list_(pa.int32())),
        ("layer", pa.int32()),
        ("mask", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
    ]
)
ROW = pa.schema(
    [
        ("image", pa.string()),
        ("query_index", pa.int32()),
        ("query", pa.string()),
        ("answer", pa.string()),
        ("segments", pa.list_(SEGMENT)),
        ("error", pa.string()),
    ]
)


class ImageSource:
    """
    Numbered images, read one by one.

    Attributes:
        ids: what each is called in the output.
        read: fetches what the pipeline takes as an image; raises `OSError` or `ValueError` for a bad one.
    """

    def __init__(self, ids: Sequence[str], read: Callable[[int], object]):
        self.ids, self.read = list(ids), read

    def __len__(self) -> int:
        return len(self.ids)


def open_source(path: str, split: str | None = None, image_column: str = "image") -> ImageSource:
    """
    Images of a folder, a file, a saved dataset or the Hub.

    Raises:
        OSError: there is no such thing.
        ValueError: it holds no images.
    """
    place = Path(path)
    if place.is_file():
        return ImageSource([place.name], lambda _: path)
    if place.is_dir():
        if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _dataset_source(load_from_disk(path), path, split, image_column)
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(file for file in place.rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise ValueError(f"--input {path} holds no images")
        return ImageSource([file.relative_to(place).as_posix() for file in files], lambda number: str(files[number]))
    if place.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise FileNotFoundError(f"--input {path} does not exist")
    return _dataset_source(load_dataset(path, split=split), path, split, image_column)


def _dataset_source(data: Dataset | DatasetDict, name: str, split: str | None, column: str) -> ImageSource:
    if isinstance(data, DatasetDict):
        if split is None or split not in data:
            raise ValueError(f"--split must be one of {', '.join(data)} for {name}, got {split!r}")
        data = data[split]
    if column not in data.column_names:
        raise ValueError(f"--image-column must be one of {', '.join(data.column_names)}, got {column!r}")
    # Undecoded, so that a broken image shows when it is its turn, and in the thread that reads it.
    data = data.cast_column(column, ImageFeature(decode=False))
    ids = [str(value) for value in data["id"]] if "id" in data.column_names else [str(i) for i in range(len(data))]

    def read(number: int):
        entry = data[number][column]
        if entry is None:
            raise ValueError("there is no image")
        if entry["bytes"] is None:
            return entry["path"]
        try:
            picture = Image.open(io.BytesIO(entry["bytes"]))
            picture.load()
        except (OSError, SyntaxError) as error:
            raise OSError(f"the image cannot be read: {error}") from error
        return picture

    return ImageSource(ids, read)


def read_queries(path: str, ids: Sequence[str]) -> list[list[str]]:
    """
    Queries per image, in the order of `ids`; an empty list where nothing is asked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no queries, a line is none, or it names an image that is not there.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    if Path(path).suffix != ".jsonl":
        queries = [line.strip() for line in lines if line.strip()]
        if not queries:
            raise ValueError(f"--queries {path} holds no queries")
        return [queries] * len(ids)
    asked: dict[str, list[str]] = {image: [] for image in ids}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, queries = _read_line(line, f"line {number} of {path}")
        if image not in asked:
            raise ValueError(f"line {number} of {path} asks about the image {image!r}, which is not in --input")
        asked[image] += queries
    if not any(asked.values()):
        raise ValueError(f"--queries {path} holds no queries")
    return [asked[image] for image in ids]


def _read_line(line: str, place: str) -> tuple[str, list[str]]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} must be JSON, but {error}") from error
    queries = entry.get("queries", [entry.get("query")]) if isinstance(entry, dict) else None
    is_listed = isinstance(queries, list) and all(isinstance(query, str) and query.strip() for query in queries)
    if not is_listed or "image" not in entry:
        raise ValueError(f'{place} must hold "image" and "query" or "queries", got {line.strip()[:100]}')
    return str(entry["image"]), queries


def prefetch(numbers: Sequence[int], prepare: Callable[[int], object], ahead: int) -> Iterator:
    """`prepare(number)` of each number in order, at most `ahead` of them computed or waiting at any time."""
    waiting: deque = deque()
    with ThreadPoolExecutor(max_workers=min(ahead, os.cpu_count() or 1)) as pool:
        try:
            for number in numbers:
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(prepare, number))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Annotator:
    """
    Writes the shards of one process.

    Args:
        pipe: the pipeline, its settings given when it was made.
        source, queries: images, and what is asked about each.
        folder: where shards go.
        batch_size: images that go through the model at a time.
        ahead: images read and prepared ahead of the model.
    """

    def __init__(self, pipe, source: ImageSource, queries: list[list[str]], folder: Path, batch_size: int, ahead: int):
        self.pipe, self.source, self.queries, self.folder = pipe, source, queries, folder
        self.batch_size, self.ahead = batch_size, max(ahead, 1)

    def write_shard(self, shard: int, numbers: Sequence[int], progress) -> None:
        """Ask about the images of these numbers; the file of the shard appears whole or not at all."""
        rows, batch = [], []
        for number, item, error in prefetch(numbers, self._prepare, self.ahead):
            if error is None:
                batch.append((number, item))
            else:
                rows += [self._row(number, place, error=error) for place in range(len(self.queries[number]))]
                progress.update()
            if len(batch) == self.batch_size:
                rows += self._ask(batch, progress)
                batch = []
        rows += self._ask(batch, progress) if batch else []
        order = {number: place for place, number in enumerate(numbers)}
        rows.sort(key=lambda row: (order[row["number"]], row["query_index"]))
        table = pa.Table.from_pylist([{name: row[name] for name in ROW.names} for row in rows], schema=ROW)
        partial = self.folder / f".{uuid.uuid4().hex}.partial"
        parquet.write_table(table, partial)
        partial.replace(shard_path(self.folder, shard))

    def _prepare(self, number: int):
        """An image and its queries as tensors, or why they cannot be."""
        try:
            item = {"image": self.source.read(number), "text": self.queries[number]}
            return number, self.pipe.preprocess(item), None
        except (OSError, ValueError) as error:
            return number, None, " ".join(str(error).split())

    def _ask(self, batch, progress) -> list[dict]:
        rows = []
        results = self.pipe.run_batch([item for _, item in batch])
        for (number, _), answers in zip(batch, results, strict=True):
            rows += [self._row(number, place, result) for place, result in enumerate(answers)]
        progress.update(len(batch))
        progress.set_postfix_str(f"{sum(len(answers) for answers in results)} queries a batch", refresh=False)
        return rows

    def _row(self, number: int, place: int, result: dict | None = None, error: str | None = None) -> dict:
        return {
            "number": number,
            "image": self.source.ids[number],
            "query_index": place,
            "query": self.queries[number][place],
            "answer": None if result is None else result["answer"],
            "segments": [] if result is None else [_encode_segment(segment) for segment in result["segments"]],
            "error": error,
        }


def _encode_segment(segment: dict) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(np.asarray(segment["mask"]) > 0, dtype=np.uint8))
    mask = {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}
    return {**{name: segment[name] for name in ("label", "score", "box", "layer")}, "mask": mask}


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard."""
    return folder / f"part-{shard:08d}.parquet"


def annotate(args: argparse.Namespace, make_pipeline: Callable[[argparse.Namespace], object]) -> Path:
    """
    Write what is missing of the output, on however many processes there are.

    Args:
        args: of [`build_parser`].
        make_pipeline: loads the pipeline, once everything else was checked.

    Returns:
        The output folder.

    Raises:
        OSError, ValueError: an argument does not fit, or the folder holds the output of other settings.
    """
    state, folder = job_state(), Path(args.output)
    for name in ("batch_size", "shard_size", "prefetch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    source = open_source(args.input, args.split, args.image_column)
    queries = read_queries(args.queries, source.ids)
    numbers = [number for number, asked in enumerate(queries) if asked]
    shards = [numbers[start : start + args.shard_size] for start in range(0, len(numbers), args.shard_size)]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, _settings(args, source, queries))
        for partial in folder.glob(".*.partial"):
            partial.unlink()
    state.wait_for_everyone()
    missing = [shard for shard in range(len(shards)) if not shard_path(folder, shard).is_file()]
    # Nobody may write before everybody has looked: all must see the same shards missing.
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        annotator = Annotator(make_pipeline(args), source, queries, folder, args.batch_size, args.prefetch)
        total = sum(len(shards[shard]) for shard in mine)
        with tqdm(total=total, unit="image", disable=not state.is_local_main_process) as progress:
            for shard in mine:
                annotator.write_shard(shard, shards[shard], progress)
    state.wait_for_everyone()
    return folder


def _settings(args: argparse.Namespace, source: ImageSource, queries: list[list[str]]) -> dict:
    """Everything that the rows depend on, for an interrupted run to be recognised."""
    names = (
        "input",
        "split",
        "shard_size",
        "max_new_tokens",
        "threshold",
        "reject_threshold",
        "layer_selection",
        "dtype",
    )
    asked = json.dumps([source.ids, queries]).encode()
    return {
        **{name: getattr(args, name) for name in names},
        "model": args.model or "uground-tiny",
        "images_and_queries": hashlib.sha256(asked).hexdigest(),
    }


def check_settings(folder: Path, settings: dict) -> None:
    """
    Note down how the output is made.

    Raises:
        ValueError: the folder holds the output of other settings.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        if any(folder.glob("part-*.parquet")):
            raise ValueError(f"--output {folder} holds parquet files of something else; choose another folder")
        partial = folder / f".{uuid.uuid4().hex}.partial"
        partial.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        partial.replace(path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"--output {folder} was begun with {name}={before.get(name)!r}, got {settings[name]!r}; "
            f"choose another folder"
        )


def load_pipeline(args: argparse.Namespace) -> ReferringSegmentationPipeline:
    """The pipeline of a checkpoint on this process's device."""
    path = args.model or tiny_checkpoint()
    processor = load_processor(path)
    model = load_model(path, dtype=args.dtype).to(job_state().device)
    if args.compile:
        model.compile_mask_path()
    selection = args.layer_selection
    return ReferringSegmentationPipeline(
        model=model,
        processor=processor,
        task="referring-segmentation",
        max_new_tokens=args.max_new_tokens,
        max_rows=args.max_rows,
        layer_selection=int(selection) if selection and selection.isdigit() else selection,
        threshold=args.threshold,
        reject_threshold=args.reject_threshold,
    )


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground.processing.annotate`."""
    usage, notes = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground.processing.annotate",
        description=usage,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="folder of images, image, saved dataset or Hub id")
    parser.add_argument("--queries", required=True, help=".txt or .jsonl file")
    parser.add_argument("--output", required=True, help="folder to write to, shared by all processes")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the bundled tiny checkpoint)")
    parser.add_argument("--split", help="split of a dataset")
    parser.add_argument("--image-column", default="image", help="column of a dataset that holds the images")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--max-rows", type=int, help="most queries at a time (default: the model's)")
    parser.add_argument("--shard-size", type=int, default=256, help="images per file (default: %(default)s)")
    parser.add_argument("--prefetch", type=int, default=16, help="images prepared ahead (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("--threshold", type=float, default=0.0, help="leave out segments with a lower score in 0..1")
    parser.add_argument(
        "--reject-threshold", type=float, default=0.0, help="a query whose maps are all weaker, in 0..1, gets nothing"
    )
    parser.add_argument("--layer-selection", help="argmax, last, sample, mc or a number (default: the model's)")
    parser.add_argument(
        "--dtype", choices=LOADING_DTYPES, default="auto", help="precision (default: the checkpoint's)"
    )
    parser.add_argument("--compile", action="store_true", help="compile SAM's encoder and decoder with torch.compile")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after an error, of which one line was written to stderr."""
    args = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return run_command("annotate", lambda: _run(args), RESUMABLE)


def _run(args: argparse.Namespace) -> None:
    folder = annotate(args, load_pipeline)
    if job_state().is_main_process:
        tables = [parquet.read_table(path, columns=["error"]) for path in sorted(folder.glob("part-*.parquet"))]
        failed = sum(len(table) - table["error"].null_count for table in tables)
        print(f"{sum(map(len, tables))} rows in {len(tables)} files in {folder}, {failed} of them failed")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
