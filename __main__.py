"""Ask an image in words, get masks back.

python -m uground examples/scene.png "the small red boat" --output overlay.png
python -m uground photo.jpg "the cup" "whatever one can drink from" --model ./checkpoint --json
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from pycocotools import mask as coco_mask

import uground
from uground.checkpoint_loading import load_model, load_processor
from uground.command_line import LOADING_DTYPES, run_command
from uground.processing import ReferringSegmentationPipeline, draw_result, read_image


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground`."""
    usage, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground",
        description=f"{usage} Prints the answer to every query and one line per segment found.",
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="path or URL of an image")
    parser.add_argument("queries", metavar="QUERY", nargs="+", help="what to find or ask; several share the image")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the bundled tiny checkpoint)")
    parser.add_argument("--output", help="write a picture here: masks, contours, labels, and the similarity maps")
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
    check_output(args.output)
    if not 0.0 <= args.threshold <= 1.0:
        raise ValueError(f"--threshold must lie in 0..1, got {args.threshold:g}")
    image = read_image(args.image)
    pipe = load_pipeline(args.model, args.device, args.dtype)
    # Whoever says how long an answer may become knows what happens to longer ones.
    pipe.warns_of_cut = args.max_new_tokens is None
    selection = args.layer_selection
    results = pipe(
        image,
        args.queries,
        layer_selection=int(selection) if selection and selection.lstrip("-").isdigit() else selection,
        max_new_tokens=args.max_new_tokens,
        threshold=args.threshold,
        return_similarity=bool(args.output),
    )
    if args.output:
        draw_result(image, results).save(args.output)
    print(as_json(image, args.queries, results) if args.json else as_text(args.queries, results))
    if args.output and not args.json:
        print(f"overlay written to {args.output}")


def load_pipeline(model: str | None, device: str | None, dtype: str) -> ReferringSegmentationPipeline:
    """
    The pipeline of a checkpoint, run by the installed code, whatever code the checkpoint brings along.

    Raises:
        OSError, ValueError: there is no such checkpoint, it is not of UGround, or there is no such device.
    """
    path = str(uground.tiny_checkpoint()) if model is None else model
    check_device(device)
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


def check_output(output: str | None) -> None:
    """Raise an error in one sentence unless a picture can be written to `output`."""
    if output is None:
        return
    if not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of --output {output!r} does not exist")
    suffix = Path(output).suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"--output must end like a picture, such as .png or .jpg, got {output!r}")


def area_of(segment: dict) -> int:
    """Number of pixels of a mask."""
    return int(np.count_nonzero(np.asarray(segment["mask"])))


def as_text(queries: list[str], results: list[dict]) -> str:
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
                f"layer {segment['layer']}  area {area_of(segment)} px"
            )
    return "\n".join(lines)


def as_json(image: Image.Image, queries: list[str], results: list[dict]) -> str:
    """For programs: the size of the image, and per query the answer and its segments."""
    found = []
    for query, result in zip(queries, results, strict=True):
        segments = []
        for segment in result["segments"]:
            encoded = coco_mask.encode(np.asfortranarray(np.asarray(segment["mask"]) > 0, dtype=np.uint8))
            segments.append(
                {
                    **{name: segment[name] for name in ("label", "score", "box", "layer")},
                    "area": area_of(segment),
                    "mask": {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()},
                }
            )
        found.append({"query": query, "answer": result["answer"], "segments": segments})
    return json.dumps({"width": image.width, "height": image.height, "results": found}, indent=2)


if __name__ == "__main__":
    sys.exit(main())
