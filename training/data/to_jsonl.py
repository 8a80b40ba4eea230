"""Turn annotations of common tools and formats into a JSONL file for training, evaluation and publishing.

    python -m uground.training.data.to_jsonl coco instances.json --images photos/ --output mine.jsonl
    python -m uground.training.data.to_jsonl labelme annotated/ --output mine.jsonl --query "the {name}" --negatives 1
    python -m uground.training.data.to_jsonl yolo data.yaml --output mine.jsonl

SOURCE is a file or a folder of files. The command closes with a table of what was taken and what was left out, and
why; the file appears whole or not at all. docs/data.md says how each format is read.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from uground.command_line import CommandParser, checked_seed, one_line, run_command, seed_number
from uground.training.data.importers.annotated import Entry, Importer, Picture, PictureFinder, Reading, Tally
from uground.training.data.importers.coco_importer import read_coco
from uground.training.data.importers.column_importer import read_annotated, read_columns
from uground.training.data.importers.composing import SEVERAL, UNION, Composer, check_templates
from uground.training.data.importers.cvat_importer import read_cvat
from uground.training.data.importers.label_map_importer import read_label_map_files
from uground.training.data.importers.label_studio_importer import read_label_studio
from uground.training.data.importers.labelme_importer import read_labelme
from uground.training.data.importers.yolo_importer import read_yolo
from uground.training.data.jsonl import JSONL

KINDS: dict[str, Importer] = {
    "coco": read_coco,
    "labelme": read_labelme,
    "yolo": read_yolo,
    "voc": read_label_map_files,
    "cvat": read_cvat,
    "labelstudio": read_label_studio,
    "hub": read_columns,
    "annotated": read_annotated,
}
# Kinds whose annotations hold queries, so that there is no list of names.
WITHOUT_NAMES = ("hub", "annotated")
FAIL, SKIP = "fail", "skip"
TEMPLATE = "the {name}"
NO_SPLIT = None
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


@contextmanager
def _whole_file(output: Path) -> Iterator[tuple[Path, Path]]:
    """
    Places to write the file and a folder of pictures beside it to, which take their names once all went well.

    Raises:
        OSError: they cannot be written there. ValueError: the file is no `.jsonl`.
    """
    if output.suffix != JSONL:
        raise ValueError(f"--output must end in {JSONL}, got {output}")
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = pictures_beside(output)
    staged = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        (staged / "pictures").mkdir()
        yield staged / "lines", staged / "pictures"
        if any((staged / "pictures").iterdir()):
            (staged / "pictures").replace(pictures)
        (staged / "lines").replace(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def pictures_beside(output: Path) -> Path:
    """The folder beside a JSONL file for pictures that only lay inside of annotations."""
    return output.with_name(f"{output.stem}-images")


def to_jsonl(
    kind: str,
    source: str | Path,
    output: str | Path,
    images: str | Path | None = None,
    names: str | Path | None = None,
    queries: Sequence[str] = (TEMPLATE,),
    several: str = UNION,
    boxes: bool | None = None,
    negatives: int = 0,
    split: str | None = None,
    seed: int = 0,
    on_bad: str = FAIL,
    predictions: bool = False,
    least_score: float = 0.0,
    columns: tuple[str, str, str] = ("image", "text", "mask"),
    quiet: bool = False,
) -> tuple[Tally, Counter]:
    """
    Convert annotations; what the command does.

    Args:
        kind: one of `KINDS`.
        source: file or folder of the annotations.
        output: the JSONL file to write.
        images: folder below which the pictures lie; by default that of the annotations.
        names: file of class names, where the annotations have numbers or colours only.
        queries: templates with `{name}`.
        several: `"union"`, `"list"` or `"each"`, see [`Composer`].
        boxes: whether a box counts as a filled mask; None for the custom of the format.
        negatives: lines per picture about names that it lacks.
        split: name of the split of all lines; by default as the annotations say.
        seed: of the templates and negatives.
        on_bad: at a picture or annotation that makes no sense: `"fail"`, or `"skip"` the picture and count it.
        predictions: whether a model's predictions count where nobody annotated.
        least_score: predictions of a lower score are left out.
        columns: those of image, text and mask, of a data set of the Hub.
        quiet: show no progress bar.

    Returns:
        What was taken and left out, and the number of lines by split and attribute.

    Raises:
        OSError, ValueError: something cannot be read or written, or nothing is left; no file is written then.
    """
    source, output, tally = Path(source), Path(output), Tally()
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of annotations; there are: {', '.join(KINDS)}")
    check_templates(queries)
    if source.suffix.lower() in ARCHIVES and source.is_file():
        raise ValueError(f"{source} is an archive: unpack it and name the folder or the file inside")
    if negatives and kind in WITHOUT_NAMES:
        raise ValueError(f"--negatives needs a list of names, which {kind} has not; expected 0, got {negatives}")
    # What has no folder here, a data set of the Hub, holds its pictures itself.
    folder = Path(images if images is not None else source if source.is_dir() else source.parent)
    folder = Path() if images is None and kind in WITHOUT_NAMES and not source.exists() else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder} is not a folder")
    names_file = None if names is None else Path(names)
    if names_file is not None and not names_file.is_file():
        raise FileNotFoundError(f"--names {names_file} is no file")
    reading = Reading(
        source,
        PictureFinder(folder, tally),
        tally,
        names_file,
        boxes,
        split,
        takes_predictions=predictions,
        least_score=least_score,
        columns=columns,
    )
    composer = Composer(
        output, pictures_beside(output), queries, several, negatives, checked_seed(seed, "--seed"), tally
    )
    return tally, _convert(KINDS[kind](reading), composer, reading, output, on_bad, quiet)


def _convert(
    annotated: Iterator[Entry], composer: Composer, reading: Reading, output: Path, on_bad: str, quiet: bool
) -> Counter:
    """Write the lines about annotated pictures; the number of them by split and attribute."""
    counts, tally = Counter(), reading.tally
    with _whole_file(output) as (lines, pictures), open(lines, "w", encoding="utf-8") as file:
        for read in tqdm(annotated, unit=" pictures", disable=quiet or None):
            mark = tally.mark() if on_bad == SKIP else None
            try:
                found = read()
            except (OSError, ValueError) as error:
                if mark is None:
                    raise
                tally.return_to(mark)
                tally.leave("a picture that cannot be used", one_line(error))
                continue
            if found.picture.content is not None:
                _keep_picture(pictures, pictures_beside(output), found.picture)
            for line in composer.lines(found):
                _write(file, line, counts)
        for line in composer.denials(tuple(reading.names)):
            _write(file, line, counts)
        splits = dict.fromkeys(split for split, _ in counts)
        if NO_SPLIT in splits and len(splits) > 1:
            raise ValueError(
                f"{reading.source}: some pictures belong to a split ({', '.join(filter(None, splits))}) and others to "
                "none; name one for all with --split"
            )
        if not counts:
            raise ValueError("; ".join((f"{reading.source} holds nothing that can be asked for", *tally.table())))
    return counts


def _keep_picture(staged: Path, folder: Path, picture: Picture) -> None:
    if folder.exists():
        raise FileExistsError(
            f"pictures are to go to {folder}, which exists already: remove it or name another --output"
        )
    file = staged / picture.path
    if file.exists() and file.read_bytes() != picture.content:
        raise ValueError(f"two pictures inside of annotations are called {picture.path}")
    file.write_bytes(picture.content)


def _write(file, line: dict, counts: Counter) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    attribute = line.get("attribute") or (
        "res" if len(line["masks"]) == 1 else "multi_rs" if line["masks"] else "fp_res"
    )
    counts[line.get("split", NO_SPLIT), attribute] += 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    usage, examples = __doc__.split("\n", 1)
    parser = CommandParser(
        "python -m uground.training.data.to_jsonl",
        description=usage,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("source", metavar="SOURCE", help="file or folder of the annotations")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures (default: that of the annotations)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument(
        "--names", metavar="FILE", help="list of class names, or data.yaml, where there are numbers only"
    )
    parser.add_argument(
        "--query", action="append", metavar="TEXT", help=f'template, such as the default "{TEMPLATE}"; may stand again'
    )
    parser.add_argument(
        "--several",
        choices=SEVERAL,
        default=UNION,
        help="several objects of a name: one mask of all, one line with a list of masks, or a line each",
    )
    parser.add_argument("--boxes", choices=["take", "leave"], help="take a box for a filled mask, or leave it out")
    parser.add_argument("--negatives", type=int, default=0, help="lines per picture about names that it lacks")
    parser.add_argument("--split", help="split of all lines; by default as the annotations say")
    parser.add_argument("--seed", type=seed_number, default=0, help="of templates and negatives")
    parser.add_argument("--on-bad", choices=[FAIL, SKIP], default=FAIL, help="at a picture that cannot be used")
    parser.add_argument(
        "--predictions", action="store_true", help="take what a model predicted where nobody annotated (labelstudio)"
    )
    parser.add_argument(
        "--columns",
        nargs=3,
        default=("image", "text", "mask"),
        metavar=("IMAGE", "TEXT", "MASK"),
        help="columns of a data set of the Hub (default: image text mask)",
    )
    parser.add_argument("--min-score", type=float, default=0.0, help="leave out predictions of a lower score")
    arguments = parser.parse_args(argv)
    if arguments.negatives < 0:
        parser.error(f"--negatives must be at least 0, got {arguments.negatives}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parse(argv)
    return run_command("to_jsonl", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    tally, counts = to_jsonl(
        arguments.kind,
        arguments.source,
        arguments.output,
        images=arguments.images,
        names=arguments.names,
        queries=arguments.query or (TEMPLATE,),
        several=arguments.several,
        boxes=None if arguments.boxes is None else arguments.boxes == "take",
        negatives=arguments.negatives,
        split=arguments.split,
        seed=arguments.seed,
        on_bad=arguments.on_bad,
        predictions=arguments.predictions,
        least_score=arguments.min_score,
        columns=tuple(arguments.columns),
    )
    for line in tally.table():
        print(line)
    by_split = {}
    for (split, attribute), count in counts.items():
        by_split.setdefault("no split" if split is NO_SPLIT else split, []).append(f"{count} {attribute}")
    parts = "; ".join(f"{split}: {', '.join(parts)}" for split, parts in by_split.items())
    print(f"{counts.total()} lines in {arguments.output} ({parts})")


if __name__ == "__main__":
    sys.exit(main())
