"""Commands and snippets of README, docs and recipes run as printed, and say nothing unasked."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import loopback_hub
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from documented_commands import PAGES, documented
from loopback_hub import TOKEN, LoopbackHub, Repository, StoredFile
from miniatures import (
    HEIGHT,
    WIDTH,
    box_mask,
    box_polygon,
    compressed_rle,
    refer_family,
    reference,
    save_image,
    save_json,
)
from official_case import DATA, TINY, write_llama_tokenizer
from test_assemble import write_llava, write_qwen, write_sam
from test_data_reason import reason_seg
from test_merge_lora import write_adapter
from test_to_jsonl import coco, labelme, pairs, yolo_line
from test_to_jsonl_tools import (
    CUP,
    FORMS,
    TREE,
    cvat,
    cvat_polygon,
    label_map,
    region,
    rows_of,
    save_palette,
    share_points,
    task,
)
from tiny import tiny_model, tiny_sam2_config
from tiny_processor import tiny_processor
from transformers import Sam2Model

import uground
from uground.hub.weights.code_files import write_code
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.training.data.prepared import write_prepared
from uground.training.scenes import scenes

ROOT = Path(uground.__file__).parent
# What Python shows by default of what libraries warn of; raised, so that the traceback tells where it comes from.
SHOWN = ("FutureWarning", "UserWarning", "RuntimeWarning")
# Progress is no warning, but goes the same way.
NO_BARS = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
BAR = re.compile(r"\s*\d+%\|.*|\s*")


def write_annotations(shelf: Path) -> None:
    """What the converters read, each in its own words, about the pictures of `photos`."""
    for name in ("a", "a1"):
        save_image(shelf / "photos" / f"{name}.png")
    images = [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    cup = {"image_id": 1, "category_id": 1, "segmentation": [box_polygon(*CUP)]}
    save_json(shelf / "instances.json", coco([cup], images))
    save_image(shelf / "labelme" / "a.png")
    save_json(shelf / "labelme" / "a.json", labelme([{"label": "cup", "points": pairs(box_polygon(*CUP))}]))
    for split in ("train", "val"):
        save_image(shelf / "data.yaml beside" / "images" / split / "a.jpg")
        labels = shelf / "data.yaml beside" / "labels" / split / "a.txt"
        labels.parent.mkdir(parents=True)
        labels.write_text(yolo_line(0, box_polygon(*CUP)))
    (shelf / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cup\n")
    save_palette(shelf / "voc" / "SegmentationClass" / "a.png", label_map((1, CUP), (2, TREE)), {})
    save_image(shelf / "voc" / "JPEGImages" / "a.jpg")
    (shelf / "names.txt").write_text("background\ncup\ntree\n")
    (shelf / "annotations.xml").write_text(cvat(cvat_polygon("cup", CUP)))
    polygon = region("polygonlabels", "cup", points=share_points(box_polygon(*CUP)), closed=True)
    save_json(shelf / "export.json", [task(polygon)])
    segment = {"label": "cup", "score": 0.9, "box": [2, 2, 8, 8], "layer": 1, "mask": compressed_rle(box_mask(*CUP))}
    row = {"image": "a.png", "query_index": 0, "query": "the cup", "answer": "It is [SEG].", "segments": [segment]}
    (shelf / "annotated").mkdir()
    parquet.write_table(pa.Table.from_pylist([{**row, "error": None}]), shelf / "annotated" / "part-00000000.parquet")


def write_data(shelf: Path) -> None:
    """Data sets as their authors lay them out, prepared ones, a file of one's own, and queries."""
    references = [reference(n, 10, split, "cup") for n, split in enumerate(("train", "val", "testA", "testB"))]
    refer_family(shelf / "refcoco", "refcoco", "refs(unc).p", references)
    for split in ("train", "val", "test"):
        reason_seg(shelf / "reasonseg", split)
    examples = []
    for number, example in enumerate(scenes("train", 2, seed=0)):
        (shelf / "prepared-images").mkdir(exist_ok=True)
        example["image"].save(shelf / "prepared-images" / f"{number}.png")
        examples.append({**example, "image": str(shelf / "prepared-images" / f"{number}.png"), "subset": None})
    write_prepared(examples, shelf / "prepared", "train")
    lines = [
        {"image": f"photos/{name}.png", "query": "the cup", "masks": [[box_polygon(*CUP)]], "split": split}
        for name, split in (("a", "train"), ("a1", "val"))
    ]
    (shelf / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(shelf / "photos", shelf / "mine.jsonl beside" / "photos")
    (shelf / "queries.txt").write_text("the small red boat\n")
    (shelf / "asked.jsonl").write_text(json.dumps({"image": "0", "queries": ["the bus", "the red sign"]}) + "\n")


def write_checkpoints(shelf: Path, checkpoint: Path) -> None:
    """Models, adapters and released weights that commands take from a folder."""
    # Without its card, as training leaves one.
    shutil.copytree(checkpoint, shelf / "checkpoint", ignore=shutil.ignore_patterns("README.md"))
    write_adapter(shelf / "adapter", UGroundForReferringSegmentation.from_pretrained(checkpoint))
    tiny_model().save_pretrained(shelf / "untrained")
    tiny_processor().save_pretrained(shelf / "untrained")
    for name in ("official", "read"):
        shutil.copytree(DATA / f"{name}_tiny" / "official", shelf / name)
    shutil.copytree(TINY / "clip", shelf / "clip")
    (shelf / "tokenizer").mkdir()
    write_llama_tokenizer(shelf / "tokenizer", 116, ("[SEG]", "[REJ]", "<im_start>", "<im_end>"))


def fill(hub: LoopbackHub, folder: Path) -> None:
    """What the pages name by its id of the Hub, each as a tiny one of its kind."""
    folder.mkdir()
    write_llava(folder / "llava")
    write_sam(folder / "sam")
    write_qwen(folder / "qwen", "qwen3_vl")
    Sam2Model(tiny_sam2_config()).save_pretrained(folder / "sam2")
    shutil.copytree(DATA / "read_tiny" / "clip", folder / "clip")
    mask, feature = FORMS["pictures"]
    (folder / "data").mkdir()
    rows_of([mask], ["the red cup"], feature).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    models = {
        "llava-hf/llava-1.5-7b-hf": "llava",
        "facebook/sam-vit-huge": "sam",
        "Qwen/Qwen3-VL-4B-Instruct": "qwen",
        "facebook/sam2.1-hiera-large": "sam2",
        "openai/clip-vit-large-patch14-336": "clip",
    }
    held = [("model", name, source) for name, source in models.items()]
    for repo_type, name, source in (*held, ("dataset", "USER/NAME", "data"), ("dataset", "user/dataset", "data")):
        paths = sorted(path for path in (folder / source).rglob("*") if path.is_file())
        files = {
            path.relative_to(folder / source).as_posix(): StoredFile(
                path.read_bytes(), path.name.endswith(loopback_hub.LFS_SUFFIXES)
            )
            for path in paths
        }
        hub.repositories[repo_type, name] = Repository(repo_type, name)
        hub.repositories[repo_type, name].commit("main", "whole", files)


@pytest.fixture
def workspace(tmp_path):
    """A folder with the names that the pages use, as a clone has them; and beside it the stand-ins."""
    work, shelf = tmp_path / "work", tmp_path / "shelf"
    shelf.mkdir()
    checkpoint = shutil.copytree(uground.tiny_checkpoint(), work / "hub" / "checkpoints" / "uground-tiny")
    write_code(checkpoint)
    for name in ("examples", "recipes"):
        (work / name).symlink_to(ROOT / name)
    write_annotations(shelf)
    write_data(shelf)
    write_checkpoints(shelf, checkpoint)
    return work, shelf


def test_launchers_are_told_everything():
    """`accelerate launch` without a configuration lists every value that it has to choose."""
    for page in (ROOT / "Makefile", *PAGES):
        commands = re.findall(r"accelerate launch .*", page.read_text(encoding="utf-8"))
        assert all("--config_file" in command for command in commands), page


def test_commands_are_found_in_fences_lines_and_heads(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python benchmarks/rejection.py --count 3` or `python -m uground.training.finetune`.\n"
        "```bash\npython -m uground a.png \"the # cup\" \\\n    --json   # says so\npip install x\n```\n"
        "```\naccelerate launch --config_file recipes/accelerate/ddp.yaml -m uground.apps.annotate --input x\n```\n"
    )  # fmt: skip
    assert documented(page) == [
        ["uground", "a.png", "the # cup", "--json"],
        ["uground.apps.annotate", "--input", "x"],
        ["benchmarks/rejection.py", "--count", "3"],
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "# About.\n# python -m uground.hub.card \\\n#     PATH\nmodel: x  # python -m uground.hub.no x\n"
    )
    assert documented(recipe) == [["uground.hub.card", "PATH"]]


def test_what_users_are_told_to_run_runs_and_says_nothing_unasked(workspace, tmp_path, monkeypatch):
    work, shelf = workspace
    monkeypatch.setattr(loopback_hub, "USER", "USER")
    flags = [flag for kind in SHOWN for flag in ("-W", f"error::{kind}")]
    script = Path(__file__).with_name("documented_commands.py")
    with LoopbackHub() as hub:
        fill(hub, tmp_path / "hub")
        told = {**os.environ, **NO_BARS, **hub.environment(str(tmp_path / "home")), "HF_TOKEN": TOKEN}
        ran = subprocess.run(
            [sys.executable, *flags, str(script), str(shelf)],
            env=told,
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
        )
        published = {name for kind, name in hub.repositories if name.startswith("USER/")}
    said = [line for line in ran.stderr.splitlines() if not BAR.fullmatch(line)]
    assert (ran.returncode, said) == (0, []), ran.stdout + ran.stderr
    assert {"USER/boats", "USER/boats-lora", "USER/cups", "USER/scenes"} < published
    assert (work / "runs" / "own-data" / "sheet.png").is_file() and (work / "overlay.png").is_file()
