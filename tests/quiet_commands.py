"""Runs the commands and snippets of README and docs in one process; `test_quiet.py` looks at what they say.

The arguments are an empty folder to work in and the bundled checkpoint to ask. Nothing here turns a warning off.
"""

import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER, CHECKPOINT = Path(sys.argv[1]), sys.argv[2]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.S)
DATA = [
    {"query": "the small red boat", "masks": [[[12, 8, 40, 8, 40, 30, 12, 30]]]},
    {"query": "the yellow car", "masks": []},
]
# Small, and on a CPU; all else is what the recipe says.
FEW_STEPS = ["--max_steps", "1", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]


def snippets(page: str, names: dict, **words: str) -> None:
    """Run the Python of a page, with other words where it names what is not here."""
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks, page
    for block in blocks:
        for word, other in words.items():
            block = block.replace(word, other)
        exec(compile(block, page, "exec"), names)


def command(module: str, *arguments) -> None:
    """Run `python -m module arguments`."""
    try:
        status = importlib.import_module(module).main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    assert not status, f"{module} ended with {status}"


def main() -> None:
    image = ROOT / "examples" / "scene.png"
    mine = FOLDER / "mine.jsonl"
    mine.write_text("".join(json.dumps({"image": str(image), **line}) + "\n" for line in DATA))
    queries = FOLDER / "queries.txt"
    queries.write_text("the small red boat\n")
    (FOLDER / "photos").mkdir()
    (FOLDER / "photos" / "scene.png").write_bytes(image.read_bytes())
    at = {name: FOLDER / name for name in ("lora", "merged", "prepared", "results", "annotated")}

    # The first thing imported, as a user would whose checkpoint came from the Hub.
    names: dict = {}
    snippets("README.md", names, **{"hub/checkpoints/uground-tiny": CHECKPOINT, "examples/scene.png": str(image)})
    assert "[SEG]" in names["result"]["answer"] and names["result"]["segments"]

    # These leave the verbosity of transformers as it is, so they come before those that do not.
    command("uground.training.data.prepare", "scenes", "--split", "test", "--count", 2, "--output", at["prepared"])
    own, pictures = FOLDER / "own.jsonl", ROOT / "examples" / "own-data" / "pictures"
    command("uground.training.data.to_jsonl", "coco", pictures.parent, "--images", pictures, "--output", own)
    command("uground.training.check_data", own, "--sheet", FOLDER / "own.png")
    told = ["--train_data", f"{own}:train", "--output_dir", FOLDER / "own-data", *FEW_STEPS]
    told += ["--model", CHECKPOINT, "--dataloader_prefetch_factor", "None"]
    command("uground.training.finetune", "--config", ROOT / "recipes" / "tiny-own-data.yaml", *told)
    command("uground.training.check_data", mine, "--sheet", FOLDER / "sheet.png")
    told = ["--model", CHECKPOINT, "--train_data", mine, "--output_dir", at["lora"], "--bf16", "false", *FEW_STEPS]
    command("uground.training.finetune", "--config", ROOT / "recipes" / "llava-7b-lora.yaml", *told)
    told = ["--dataset", "scenes", "--split", "test", "--count", 2, "--layers", "last", "argmax", "mc"]
    command("uground.training.evaluate", "--model", CHECKPOINT, *told, "--batch-size", 2, "--output", at["results"])
    snippets("docs/data.md", {}, **{"refcoco-prepared": str(at["prepared"]), "val": "test"})
    masks = importlib.import_module("numpy").ones((1, 4, 4), dtype=bool)
    snippets("docs/evaluation.md", {"masks": masks, "targets": masks})
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    given = {"image": str(image), "queries": ["the tree"], "path": CHECKPOINT, "torch": torch}
    given |= {name: getattr(transformers, name) for name in ("AutoModel", "BitsAndBytesConfig")}
    # Last of all it has the mask path compiled, at the next use.
    snippets("docs/speed.md", names | given)

    command("uground.__main__", image, "the small red boat", "--output", FOLDER / "overlay.png")
    command("uground.__main__", image, "the tree and whatever can swim", "the yellow car", "--json")
    told = ["--input", FOLDER / "photos", "--queries", queries, "--output", at["annotated"]]
    command("uground.apps.annotate", *told, "--model", CHECKPOINT)
    command("uground.hub.merge_lora", at["lora"], "--base", CHECKPOINT, "--output", at["merged"])
    command("uground.hub.card", at["merged"])
    command("uground.hub.publish", at["merged"], "--repo-id", "USER/boats", "--dry-run")
    told = ["--adapter", "--base-model", "USER/base", "--dry-run"]
    command("uground.hub.publish", at["lora"], "--repo-id", "USER/boats-lora", *told)


if __name__ == "__main__":
    main()
