"""Ask an image in words, get masks back.

python -m uground examples/scene.png "the small red boat" --output overlay.png
python -m uground photo.jpg "the cup" "whatever one can drink from" --model ./checkpoint --json
cat photo.jpg | python -m uground - "the cup" --masks masks/ --coco found.json
"""

import argparse
import json
import os
import sys
import warnings
from io import BytesIO
from pathlib import Path

import torch
import transformers
from PIL import Image

import uground
from uground.checkpoint_loading import load_model, load_processor
from uground.command_line import LOADING_DTYPES, run_command, seed_number
from uground.processing import GroundingResult, ReferringSegmentationPipeline, draw_result, read_image
from uground.processing.image_reading import opened_picture
from uground.whole_files import write_whole

# What stands for standard input among the arguments.
STANDARD_INPUT = "-"


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground`."""
    usage, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground",
        description=f"{usage} Prints the answer to every query and one line per segment found.",
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="path or URL of an image, or - for standard input")
    parser.add_argument("queries", metavar="QUERY", nargs="+", help="what to find or ask; several share the image")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the bundled tiny checkpoint)")
    parser.add_argument("--output", help="write a picture here: masks, contours, labels, and the similarity maps")
    parser.add_argument("--masks", metavar="DIR", help="write one PNG of 0 and 255 per segment to this new folder")
    parser.add_argument("--coco", metavar="FILE", help="write the segments as COCO annotations, a category per query")
    parser.add_argument("--json", action="store_true", help="print JSON; masks are COCO run-length encodings")
    parser.add_argument(
        "--layer-selection", help="layer a segment is read at: argmax, last, sample, mc or a number (default: model's)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: an accelerator if there is one)")
    parser.add_argument(
        "--dtype", choices=LOADING_DTYPES, default="auto", help="precision (default: that of the checkpoint)"
    )
    parser.add_argument("--max-new-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("--threshold", type=float, default=0.0, help="leave out segments with a lower score in 0..1")
    parser.add_argument(
        "--seed", type=seed_number, help="of what is drawn by lot, as by --layer-selection sample or mc"
    )
    parser.add_argument("--version", action="version", version=f"uground {uground.__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv: arguments after the program's name; by default those of the process.

    Returns:
        0, or 2 after an error, of which one line was written to stderr.
    """
    args = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(action="ignore"):
        return run_command("uground", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """
    Read the image, ask the model, print and draw.

    Raises:
        OSError, ValueError: an argument, the image or the checkpoint cannot be used.
    """
    for name in ("output", "masks", "coco"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, Path(path).expanduser())
    check_outputs(args)
    if not 0.0 <= args.threshold <= 1.0:
        raise ValueError(f"--threshold must lie in 0..1, got {args.threshold:g}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    check_device(args.device)
    image = read_input(args.image)
    pipe = load_pipeline(args.model, args.device, args.dtype)
    # Whoever says how long an answer may become knows what happens to longer ones.
    pipe.warns_of_cut = args.max_new_tokens is None
    selection = args.layer_selection
    if args.seed is not None:
        transformers.set_seed(args.seed)
    results = pipe(
        image,
        args.queries,
        layer_selection=int(selection) if selection and selection.lstrip("-").isdigit() else selection,
        max_new_tokens=args.max_new_tokens,
        threshold=args.threshold,
        return_similarity=bool(args.output),
    )
    written = write_outputs(args, image, results)
    print(as_json(image, args.queries, results) if args.json else as_text(args.queries, results))
    if not args.json:
        for line in written:
            print(line)


def read_input(source: str) -> Image.Image:
    """
    The image of a path, a URL or standard input.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    if source != STANDARD_INPUT:
        return read_image(str(Path(source).expanduser()) if source.startswith("~") else source)
    content = sys.stdin.buffer.read()
    if not content:
        raise ValueError("standard input must be a picture, got nothing")
    with opened_picture(BytesIO(content), "the image on standard input") as picture:
        picture.load()
        return read_image(picture.copy())


def write_outputs(args: argparse.Namespace, image: Image.Image, results: list[GroundingResult]) -> list[str]:
    """
    Write the overlay, the masks and the COCO file, each whole or not at all.

    Returns:
        A line on each.
    """
    lines = []
    if args.output:
        picture = draw_result(image, results)
        write_whole(args.output, lambda place: picture.save(place))
        lines.append(f"overlay written to {args.output}")
    if args.masks:
        count = sum(len(result["segments"]) for result in results)
        write_whole(args.masks, lambda place: write_masks(place, results))
        lines.append(f"{count} mask{'' if count == 1 else 's'} written to {args.masks}")
    if args.coco:
        name = "image" if args.image == STANDARD_INPUT else args.image
        content = json.dumps(as_coco(name, image, args.queries, results), indent=2) + "\n"
        write_whole(args.coco, lambda place: place.write_text(content, encoding="utf-8"))
        lines.append(f"annotations written to {args.coco}")
    return lines


def write_masks(folder: Path, results: list[GroundingResult]) -> None:
    """One picture per segment, named by the numbers of query and segment, from 1 on."""
    folder.mkdir()
    for query, result in enumerate(results, start=1):
        for number, segment in enumerate(result["segments"], start=1):
            segment["mask"].save(folder / f"query-{query:03d}-segment-{number:03d}.png")


def load_pipeline(model: str | None, device: str | None, dtype: str) -> ReferringSegmentationPipeline:
    """
    The pipeline of a checkpoint, run by the installed code, whatever code the checkpoint brings along.

    Raises:
        OSError, ValueError: there is no such checkpoint, it is not of UGround, or there is no such device.
    """
    path = str(uground.tiny_checkpoint()) if model is None else model
    processor = load_processor(path)
    return ReferringSegmentationPipeline(
        model=load_model(path, dtype=dtype),
        processor=processor,
        task="referring-segmentation",
        device=device,
    )


def check_device(device: str | None) -> None:
    """Raise a `ValueError` unless `device` is one that PyTorch can use here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_outputs(args: argparse.Namespace) -> None:
    """Raise an error in one sentence unless everything that is to be written can be."""
    given = {name: getattr(args, name) for name in ("output", "masks", "coco") if getattr(args, name) is not None}
    for name, path in given.items():
        parent = path.absolute().parent
        if not parent.is_dir():
            raise FileNotFoundError(f"the folder of --{name} {str(path)!r} does not exist")
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"the folder of --{name} {str(path)!r} cannot be written to")
        if name != "masks" and path.is_dir():
            raise IsADirectoryError(f"--{name} must name a file, got the folder {str(path)!r}")
    if len({path.absolute() for path in given.values()}) < len(given):
        raise ValueError(f"{' and '.join(f'--{name}' for name in given)} must name different places")
    if args.output is not None and Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output must end like a picture, such as .png or .jpg, got {str(args.output)!r}")
    if args.masks is not None and args.masks.exists() and (not args.masks.is_dir() or any(args.masks.iterdir())):
        raise FileExistsError(f"--masks must name a new or an empty folder, got {str(args.masks)!r}")


def as_coco(name: str, image: Image.Image, queries: list[str], results: list[GroundingResult]) -> dict:
    """A COCO file of one image; its categories are the queries, numbered from 1 on."""
    categories = {query: number for number, query in enumerate(dict.fromkeys(queries), start=1)}
    annotations: list[dict] = []
    for query, result in zip(queries, results, strict=True):
        annotations += result.to_coco(1, categories[query], first_id=len(annotations) + 1)
    return {
        "images": [{"id": 1, "file_name": name, "width": image.width, "height": image.height}],
        "categories": [{"id": number, "name": query} for query, number in categories.items()],
        "annotations": annotations,
    }


def as_text(queries: list[str], results: list[GroundingResult]) -> str:
    """For people: query, answer, and one line per segment."""
    lines = []
    for query, result in zip(queries, results, strict=True):
        lines += [f"> {query}", result["answer"]]
        if not result["segments"]:
            lines.append("  no segment")
        for number, segment in enumerate(result["segments"], start=1):
            box = ",".join(map(str, segment["box"]))
            lines.append(
                f"  {number}  label {segment['label']!r}  score {segment['score']:.3f}  box {box}  "
                f"layer {segment['layer']}  area {segment.area} px"
            )
    return "\n".join(lines)


def as_json(image: Image.Image, queries: list[str], results: list[GroundingResult]) -> str:
    """For programs: the size of the image, and per query the answer and its segments."""
    found = []
    for query, result in zip(queries, results, strict=True):
        written = result.to_dict()
        found.append({name: written[name] for name in ("answer", "absent", "segments")} | {"query": query})
    return json.dumps({"width": image.width, "height": image.height, "results": found}, indent=2)


if __name__ == "__main__":
    sys.exit(main())
