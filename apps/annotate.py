"""Ask the same or listed queries of many images; write answers and masks as parquet, JSON lines or COCO.

    python -m uground.apps.annotate --input photos/ --queries queries.txt --output annotated/
    python -m uground.apps.annotate --input user/dataset --split train --queries asked.jsonl --output annotated/

--input is a folder of images (searched through), an image, a dataset of `datasets` saved to disk, or a Hub id.
--queries is a .txt file, one query a line, asked of every image; or a .jsonl file of {"image": ID, "query": "…"} or
{"image": ID, "queries": ["…", …]}, where ID is the path below the folder, or the column `id` (else the number) of a
row.

The images are cut into shards of --shard-size, each written at once as `part-NNNNNNNN.parquet`, one row per image and
query; or as .jsonl with the same rows, or as .json of COCO, whose categories are the queries. After an interruption
the same command, on any number of processes, goes on with the shards that are missing.

--input may also be a stream, of which no local copy is made: a .parquet, .jsonl or .tar file (of WebDataset), a folder
or pattern of such files, or, with --stream, a Hub id. Every process reads its own part and names its shards by its
number, so that an interrupted run goes on with as many processes as before.

An image that cannot be read, or a query that cannot be asked, is recorded in the column `error`.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from uground import tiny_checkpoint
from uground.apps.annotation_inputs import ImageSource, open_source, read_queries
from uground.apps.annotation_outputs import FORMATS, OutputFolder, encode_segment
from uground.apps.annotation_streams import is_stream, open_stream, read_chunks, read_stream_queries
from uground.checkpoint_loading import load_model, load_processor
from uground.command_line import LOADING_DTYPES, RESUMABLE, one_line, run_command
from uground.job_processes import job_state
from uground.processing import draw_result
from uground.processing.halving import is_out_of_memory
from uground.processing.image_reading import read_image
from uground.processing.pipeline_uground import ReferringSegmentationPipeline
from uground.whole_files import write_whole

LAYER_RULES = ("argmax", "last", "sample", "mc")
# Hidden, so that `load_dataset` does not take it for data. Release 0.1.0 wrote it without the dot.
SETTINGS_FILE, EARLIER_SETTINGS_FILE = ".annotate.json", "annotate.json"


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


@dataclass(frozen=True)
class PreparedImage:
    """
    An image on its way to the model.

    Attributes:
        number: of the image.
        places: of those of its queries that can be asked.
        tensors: what the pipeline made of image and queries; None without queries.
        errors: why the others cannot be asked, by place.
    """

    number: int
    places: list[int]
    tensors: dict | None
    errors: dict[int, str]


class Annotator:
    """
    Writes the shards of one process.

    Args:
        pipe: the pipeline, its settings given when it was made.
        source, queries: images, and what is asked about each.
        output: where shards go.
        min_area: segments of fewer pixels are left out.
        batch_size: images that go through the model at a time.
        ahead: images read and prepared ahead of the model.
    """

    def __init__(
        self,
        pipe: ReferringSegmentationPipeline,
        source: ImageSource,
        queries: list[list[str]],
        output: OutputFolder,
        batch_size: int,
        ahead: int,
        min_area: int = 0,
    ):
        self.pipe, self.source, self.queries, self.output = pipe, source, queries, output
        self.batch_size, self.ahead, self.min_area = batch_size, max(ahead, 1), min_area
        self.answered, self.refusal, self.pictures = 0, None, None

    def write_shard(self, shard: int | str, numbers: Sequence[int], progress: tqdm) -> None:
        """
        Ask about the images of these numbers; the file of the shard appears whole or not at all.

        Raises:
            ValueError: the model has answered nothing so far, and refuses all there is: this is no matter of an image.
            MemoryError: not even a part of a batch fits into memory.
        """
        rows, batch = [], []
        self.pictures = self.output.begin_pictures()
        for image in prefetch(numbers, self._prepare, self.ahead):
            rows += [self._row(image.number, place, error=error) for place, error in image.errors.items()]
            if image.tensors is None:
                progress.update()
            else:
                batch.append(image)
            if len(batch) == self.batch_size:
                rows += self._ask_all(batch, progress)
                batch = []
        rows += self._ask_all(batch, progress) if batch else []
        if self.refusal is not None and not self.answered:
            raise ValueError(f"the model answers nothing: {self.refusal}")
        order = {number: place for place, number in enumerate(numbers)}
        rows.sort(key=lambda row: (order[row["number"]], row["query_index"]))
        self.output.finish(shard_name(shard), rows, self.pictures)

    def _prepare(self, number: int, places: Sequence[int] | None = None) -> PreparedImage:
        """An image with its queries, or with those at some places."""
        places = range(len(self.queries[number])) if places is None else places
        try:
            picture = read_image(self.source.read(number))
        except Exception as error:  # a broken file leads decoders to errors of any kind
            if is_out_of_memory(error):
                raise
            return PreparedImage(number, [], None, dict.fromkeys(places, one_line(error)))
        return self._encode(number, picture, list(places))

    def _encode(self, number: int, picture: Image.Image, places: list[int]) -> PreparedImage:
        item = {"image": picture, "text": [self.queries[number][place] for place in places]}
        try:
            tensors = self.pipe.preprocess(item)
            # Whole pictures wait for the model only where they are drawn on.
            tensors["image"] = picture if self.pictures is not None else None
            return PreparedImage(number, places, tensors, {})
        except (OSError, ValueError, TypeError) as error:
            refused = PreparedImage(number, [], None, dict.fromkeys(places, one_line(error)))
        if len(places) == 1:
            return refused
        # One query may be at fault: the others are asked without it.
        errors = {}
        for place in places:
            errors |= self._encode(number, picture, [place]).errors
        good = [place for place in places if place not in errors]
        if not good or not errors:
            return PreparedImage(number, [], None, errors or refused.errors)
        kept = self._encode(number, picture, good)
        return PreparedImage(number, kept.places, kept.tensors, errors | kept.errors)

    def _ask_all(self, batch: list[PreparedImage], progress) -> list[dict]:
        rows = self._ask(batch)
        progress.update(len(batch))
        progress.set_postfix_str(f"{sum(len(image.places) for image in batch)} queries a batch", refresh=False)
        return rows

    def _ask(self, batch: list[PreparedImage]) -> list[dict]:
        """Rows of the answers; where the model refuses a batch, image by image, and then query by query."""
        try:
            results = self.pipe.run_batch([image.tensors for image in batch])
        except (OSError, ValueError, TypeError) as error:
            self.refusal = one_line(error)
        else:
            self.answered += len(batch)
            pairs = zip(batch, results, strict=True)
            return [
                self._row(image.number, place, result)
                for image, answers in pairs
                for place, result in zip(image.places, answers, strict=True)
            ]
        if len(batch) > 1:
            return [row for image in batch for row in self._ask([image])]
        (image,) = batch
        if len(image.places) == 1:
            return [self._row(image.number, image.places[0], error=self.refusal)]
        alone = [self._prepare(image.number, [place]) for place in image.places]
        return [row for one in alone for row in self._ask([one])]

    def _row(self, number: int, place: int, result: dict | None = None, error: str | None = None) -> dict:
        segments = [] if result is None else [one for one in result["segments"] if one.area >= self.min_area]
        if result is not None and self.pictures is not None:
            result["segments"] = segments
            draw_result(result.image, result).save(self.pictures / f"image-{number:08d}-query-{place:03d}.png")
        return {
            "number": number,
            "image": storable(self.source.ids[number]),
            "query_index": place,
            "query": storable(self.queries[number][place]),
            "answer": None if result is None else result["answer"],
            "segments": [encode_segment(segment) for segment in segments],
            "areas": [segment.area for segment in segments],
            "size": None if result is None else result.size,
            "error": None if error is None else storable(error),
        }


def storable(text: str) -> str:
    """A text with halves of characters written out: file names and queries may hold some, parquet takes none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shard_name(shard: int | str) -> str:
    """What a shard is called, between `part-` and the ending of its file."""
    return shard if isinstance(shard, str) else f"{shard:08d}"


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
    check_arguments(args)
    output = OutputFolder(folder, args.format, None if args.overlays is None else Path(args.overlays))
    if args.stream or is_stream(args.input):
        return annotate_stream(args, state, output, make_pipeline)
    source = open_source(args.input, args.split, args.image_column)
    queries = read_queries(args.queries, source.ids)
    numbers = [number for number, asked in enumerate(queries) if asked]
    shards = [numbers[start : start + args.shard_size] for start in range(0, len(numbers), args.shard_size)]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        asked = hashlib.sha256(json.dumps([source.ids, queries]).encode()).hexdigest()
        check_settings(folder, _settings(args) | {"images_and_queries": asked})
        output.clear()
    state.wait_for_everyone()
    missing = [shard for shard in range(len(shards)) if not output.has(shard_name(shard))]
    # Nobody may write before everybody has looked: all must see the same shards missing.
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        sizes = (args.batch_size, args.prefetch, args.min_area)
        annotator = Annotator(make_pipeline(args), source, queries, output, *sizes)
        total = sum(len(shards[shard]) for shard in mine)
        with tqdm(total=total, unit="image", disable=not state.is_local_main_process) as progress:
            for shard in mine:
                annotator.write_shard(shard, shards[shard], progress)
    state.wait_for_everyone()
    return folder


def annotate_stream(
    args: argparse.Namespace, state: PartialState, output: OutputFolder, make_pipeline: Callable
) -> Path:
    """[`annotate`] for a stream: each process goes through its part, shard by shard, from the first missing one on."""
    queries = read_stream_queries(args.queries)
    stream = open_stream(args.input, args.split, args.image_column, state.process_index, state.num_processes)
    if state.is_main_process:
        output.path.mkdir(parents=True, exist_ok=True)
        asked = hashlib.sha256(json.dumps([queries.everywhere, queries.by_image]).encode()).hexdigest()
        settings = _settings(args) | {"images_and_queries": asked, "processes": state.num_processes}
        check_settings(output.path, settings)
        output.clear()
    state.wait_for_everyone()
    annotator, done = None, 0
    with tqdm(unit="image", disable=not state.is_local_main_process) as progress:
        names = (f"{state.process_index:05d}-{number:08d}" for number in count())
        while output.has(name := next(names)):
            done += 1
        for source in read_chunks(stream, args.shard_size, done):
            chunk = [queries.of(image) for image in source.ids]
            if annotator is None:
                sizes = (args.batch_size, args.prefetch, args.min_area)
                annotator = Annotator(make_pipeline(args), source, chunk, output, *sizes)
            annotator.source, annotator.queries = source, chunk
            annotator.write_shard(name, [number for number, asked in enumerate(chunk) if asked], progress)
            name = next(names)
    state.wait_for_everyone()
    return output.path


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a number is out of its range, or `--layer-selection` is neither a rule nor a number.
    """
    for name in ("batch_size", "shard_size", "prefetch", "max_rows", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("min_area", "max_kept_prefixes"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {value}")
    if args.overlays is not None and Path(args.overlays).absolute() == Path(args.output).absolute():
        raise ValueError(f"--overlays must name another folder than --output, got {args.overlays} for both")
    for name in ("output", "overlays"):
        if getattr(args, name) is not None and Path(getattr(args, name)).is_file():
            raise NotADirectoryError(f"--{name} must name a folder, got the file {getattr(args, name)}")
    for name, value in (("min-score", args.threshold), ("reject-threshold", args.reject_threshold)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} must lie in 0..1, got {value}")
    selection = args.layer_selection
    if selection is not None and selection not in LAYER_RULES and not selection.isdecimal():
        raise ValueError(f"--layer-selection must be {', '.join(LAYER_RULES)} or a number, got {selection!r}")


def _settings(args: argparse.Namespace) -> dict:
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
        "format",
        "min_area",
    )
    given = {name: getattr(args, name) for name in names}
    if args.reject_threshold is None:
        del given["reject_threshold"]  # the checkpoint's, which `model` tells
    return {**given, "model": args.model or "uground-tiny"}


def check_settings(folder: Path, settings: dict) -> None:
    """
    Note down how the output is made.

    Raises:
        ValueError: the folder holds the output of other settings.
    """
    path, earlier = folder / SETTINGS_FILE, folder / EARLIER_SETTINGS_FILE
    found = next((file for file in (path, earlier) if file.is_file()), None)
    if found is None:
        if any(file for kind in FORMATS.values() for file in folder.glob(f"part-*{kind.ending}")):
            raise ValueError(f"--output {folder} holds files of something else; choose another folder")
        write_whole(path, lambda place: place.write_text(json.dumps(settings, indent=2), encoding="utf-8"))
        return
    try:
        before = dict(json.loads(found.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{found} must hold the settings of a job, but {one_line(error)}") from error
    before = {"format": "parquet", "min_area": 0, **before}  # as release 0.1.0 had no choice
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"--output {folder} was begun with {name}={before.get(name)!r}, got {settings[name]!r}; "
            f"choose another folder"
        )
    found.replace(path)


def load_pipeline(args: argparse.Namespace) -> ReferringSegmentationPipeline:
    """The pipeline of a checkpoint on this process's device."""
    path = args.model or tiny_checkpoint()
    processor = load_processor(path)
    model = load_model(path, dtype=args.dtype).to(job_state().device)
    if args.compile:
        model.compile_mask_path()
    selection = args.layer_selection
    selection = int(selection) if selection and selection.isdecimal() else selection
    if isinstance(selection, int) and selection >= model.config.num_layers:
        raise ValueError(f"--layer-selection must lie in 0..{model.config.num_layers - 1} for {path}, got {selection}")
    scaling = model.config.similarity_scaling
    if args.reject_threshold and scaling != "scaled":
        raise ValueError(f"--reject-threshold needs a model with similarity_scaling='scaled', got {scaling!r}")
    return ReferringSegmentationPipeline(
        model=model,
        processor=processor,
        task="referring-segmentation",
        max_new_tokens=args.max_new_tokens,
        max_rows=args.max_rows,
        max_kept_prefixes=args.max_kept_prefixes,
        layer_selection=selection,
        threshold=args.threshold,
        **({} if args.reject_threshold is None else {"reject_threshold": args.reject_threshold}),
    )


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground.apps.annotate`."""
    usage, notes = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground.apps.annotate",
        description=usage,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="folder of images, image, saved dataset or Hub id")
    parser.add_argument("--queries", required=True, help=".txt or .jsonl file")
    parser.add_argument("--output", required=True, help="folder to write to, shared by all processes")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the bundled tiny checkpoint)")
    parser.add_argument("--stream", action="store_true", help="read a Hub id or a folder of images as a stream")
    parser.add_argument("--split", help="split of a dataset (of a stream by default train)")
    parser.add_argument("--image-column", default="image", help="column of a dataset that holds the images")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--max-rows", type=int, help="most queries at a time (default: the model's)")
    parser.add_argument(
        "--max-kept-prefixes", type=int, help="keep the states of so many images at all layers; 0 takes least memory"
    )
    parser.add_argument("--shard-size", type=int, default=256, help="images per file (default: %(default)s)")
    parser.add_argument("--prefetch", type=int, default=16, help="images prepared ahead (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="of the shards (default: %(default)s)")
    parser.add_argument("--overlays", metavar="DIR", help="draw every answer, into a folder per shard")
    parser.add_argument(
        "--min-score",
        "--threshold",
        dest="threshold",
        type=float,
        default=0.0,
        help="leave out segments with a lower score in 0..1",
    )
    parser.add_argument("--min-area", type=int, default=0, help="leave out segments of fewer pixels")
    parser.add_argument(
        "--reject-threshold",
        type=float,
        help="a query whose maps are all weaker, in 0..1, gets nothing (default: as the checkpoint says)",
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
        print(OutputFolder(folder, args.format).closing_line())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
