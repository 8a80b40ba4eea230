"""The example of a checkpoint folder: an image, a query about it, and what the checkpoint found."""

import json
import os
from pathlib import Path

from PIL import Image

from uground.checkpoint_loading import load_processor
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.processing import ReferringSegmentationPipeline, draw_result
from uground.training.scenes import example_scene

EXAMPLE_QUERY = "the small red boat"
EXAMPLE_TOKENS = 64


def write_example(
    folder: str | os.PathLike,
    model: UGroundForReferringSegmentation,
    image: Image.Image | None = None,
    query: str = EXAMPLE_QUERY,
) -> dict:
    """
    Ask a checkpoint about an image and write `example.png`, `example_overlay.png` and `example.json`.

    Args:
        folder: of the checkpoint, with its processor.
        model: the model of the folder.
        image: PIL image; by default the fixed scene that the package draws.
        query: the query about it.

    Returns:
        What `example.json` holds: `{"query", "answer", "segments": number of segments}`.
    """
    folder = Path(folder)
    image = example_scene().image if image is None else image
    processor = load_processor(folder)
    pipe = ReferringSegmentationPipeline(model=model, processor=processor, task="referring-segmentation")
    result = pipe(image, query, max_new_tokens=EXAMPLE_TOKENS, return_similarity=True)
    image.save(folder / "example.png")
    draw_result(image, result).save(folder / "example_overlay.png")
    example = {"query": query, "answer": result["answer"].strip(), "segments": len(result["segments"])}
    (folder / "example.json").write_text(json.dumps(example, indent=2) + "\n", encoding="utf-8")
    return example
