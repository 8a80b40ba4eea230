"""
Runs what README, docs and the heads of recipes tell a user to run, in one process; `test_documented_commands.py` lays
out what the commands speak of and looks at what they say.

It works in the folder it is started in, which has the names that the pages use: `examples/`, `recipes/`, `hub/`. Every
other name a command takes (`PATH`, `photos/`, `mine.jsonl`, …) is what an earlier command left there, or else the
stand-in that `STAND_INS` has for it, copied from the folder given as argument. Commands run word by word as they are
printed, but for `SMALLER`. Nothing here turns a warning off.
"""

import importlib
import re
import runpy
import shlex
import shutil
import sys
import time
import traceback
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml")))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)
INLINE = re.compile(r"`([^`\n]+)`")
LAUNCHER = re.compile(r"accelerate launch --config_file (\S+) (?:--num_processes \d+ )?-m (.*)")
# A module without arguments is named, not called; scripts run without.
COMMAND = re.compile(r"python (-m uground\S*) \S|python ((?:benchmarks|examples)/\S+\.py)")

# (what the command begins with, a word of it, the stand-in for this word)
STAND_INS = (
    (r"\S+to_jsonl labelme", r"labelme/", "labelme"),
    (r"\S+to_jsonl yolo", r"data\.yaml", "data.yaml"),
    (r"\S+to_jsonl voc", r"VOC2012/", "voc"),
    (r"\S+to_jsonl voc", r"names\.txt", "names.txt"),
    (r"\S+to_jsonl cvat", r"annotations\.xml", "annotations.xml"),
    (r"\S+to_jsonl labelstudio", r"export\.json", "export.json"),
    (r"\S+to_jsonl annotated", r"annotated/", "annotated"),
    (r"\S+to_jsonl coco", r"instances\.json", "instances.json"),
    (r"", r"photos/", "photos"),
    (r"", r"mine\.jsonl(?=$|:)", "mine.jsonl"),
    (r"\S+annotate", r"queries\.txt", "queries.txt"),
    (r"\S+annotate", r"asked\.jsonl", "asked.jsonl"),
    (r"\S+publish_data", r"prepared/refcoco", "prepared"),
    (r".* refcoco ", r"DIR", "refcoco"),
    (r".* reasonseg ", r"DIR", "reasonseg"),
    (r"\S+convert_official (?!.*--system)", r"SRC", "official"),
    (r"\S+convert_official .*--system read", r"SRC", "read"),
    (r"\S+convert_official", r"CLIP", "clip"),
    (r"\S+convert_official", r"DIR", "tokenizer"),
    (r"", r"PATH|runs/boats", "checkpoint"),
    (r"", r"ADAPTER|runs/boats-lora", "adapter"),
    (r"\S+finetune", r"(uground|read)-\d+b", "untrained"),
)
# Numbers that the reader chooses.
NUMBERS = {"N": "1"}
# Places that a command fills; whatever stands there from before is not meant.
FILLED = ("--output", "--sheet", "--output_dir")

FEW_STEPS = "--max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
FEW_STEPS += " --dataloader_num_workers 0 --dataloader_prefetch_factor None --eval_strategy no --eval_scene_count 0"
# What makes a command small (the last of two flags counts), by what it begins with.
SMALLER = (
    (r"\S+finetune", FEW_STEPS),
    (r"\S+evaluate .*--count", "--count 2"),
    (r"\S+evaluate", "--batch-size 2 --max-new-tokens 24"),
    (r"\S+(prepare|publish_data) scenes", "--count 2"),
    # READ's points follow from 32 or 40 layers; the stand-in has fewer.
    (r"\S+convert_official .*--system read", "--num-points 30 --point-thresholds 0.8 0.2 --point-downsample 2"),
    (r"benchmarks/rejection", "--count 2"),
    (r"benchmarks/bench_inference", "--scale tiny --rounds 1 --only states"),
    (r"benchmarks/bench_states", "--layers 2 --rows 2 --rounds 1"),
    (r"benchmarks/bench_train_memory", "--layers 2 --width 64 --segments 1 --queries 1 --rounds 1"),
    (r"benchmarks/sam_prompts", "--scenes 8"),
    # Even where they are small these take too long: ten seconds of fitting probes, half a minute of fresh processes.
    (r"benchmarks/(probe_kinds|bench_load)", "--help"),
)


def heads(text: str) -> str:
    """The comments of a YAML file, without their marks."""
    return "\n".join(re.sub("^# ?", "", line) for line in text.splitlines() if line.startswith("#"))


def documented(page: Path) -> list[list[str]]:
    """The commands of a page in order, as words: a module or a script, and its arguments."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall("^```", text, flags=re.M)) % 2 == 0, f"{page.name}: a fence is open at its end"
    lines = heads(text) if page.suffix == ".yaml" else "\n".join(block for _, block in FENCED.findall(text))
    lines += "\n" + "\n".join(INLINE.findall("" if page.suffix == ".yaml" else FENCED.sub("", text)))
    found = []
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        launched = LAUNCHER.fullmatch(line.strip())
        if launched:
            assert (ROOT / launched[1]).is_file(), f"{page.name}: {line}: there is no {launched[1]}"
            line = f"python -m {launched[2]}"
        called = COMMAND.match(line.strip())
        if called:
            words = shlex.split(line, comments=True)
            found.append(words[2:] if called[1] else words[1:])
    return found


def lay_out(words: list[str], shelf: Path, laid: dict[str, str]) -> None:
    """Put in place what a command takes, and take away what it would find where it writes."""
    taken = []
    for before, word in zip(words, words[1:], strict=False):
        (taken.append if before not in FILLED else take_away)(word)
    if "--config" in words:
        recipe = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        taken += [recipe["model"], *recipe.get("train_data", ())]
        take_away(recipe["output_dir"])
    for word in taken:
        for begins, names, stand_in in STAND_INS:
            name = re.match(names, word)
            if name is None or not re.match(begins, " ".join(words)):
                continue
            place = name[0].rstrip("/")
            if Path(place).exists() and laid.get(place, stand_in) == stand_in:
                continue
            take_away(place)
            laid[place] = stand_in
            for source, target in ((shelf / stand_in, place), (shelf / f"{stand_in} beside", ".")):
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                elif source.is_file():
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, target)


def take_away(place: str) -> None:
    path = Path(place)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # Where converters put pictures that they bring along.
    shutil.rmtree(path.with_name(f"{path.stem}-images"), ignore_errors=True)


def run(words: list[str]) -> object:
    """What the command ends with, as its process would."""
    name, arguments = words[0], [NUMBERS.get(word, word) for word in words[1:]]
    for begins, flags in SMALLER:
        if re.match(begins, " ".join(words)):
            arguments = arguments + flags.split()
    try:
        if name.endswith(".py"):
            sys.argv = [name, *arguments]
            sys.path.insert(0, str((ROOT / name).parent))
            runpy.run_path(str(ROOT / name), run_name="__main__")
            return 0
        for module in (name, f"{name}.__main__"):
            main = getattr(importlib.import_module(module), "main", None)
            if main is not None:
                return main(arguments)
        raise AssertionError(f"there is no {name}.main")
    except SystemExit as stop:
        return stop.code


def as_in_a_new_process() -> None:
    """Undo what a command set for its whole process."""
    # Imported here, since README's own Python comes first.
    importlib.import_module("transformers").logging.set_verbosity_warning()
    importlib.import_module("processes").forget_process_group()


def snippets(page: str, names: dict) -> None:
    """Run the Python of a page."""
    blocks = [block for kind, block in FENCED.findall((ROOT / page).read_text(encoding="utf-8")) if kind == "python"]
    assert blocks, page
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def main(shelf: Path) -> None:
    # The first thing imported, as a user would whose checkpoint came from the Hub.
    names: dict = {}
    snippets("README.md", names)
    assert "[SEG]" in names["result"]["answer"] and names["result"]["segments"]

    laid: dict[str, str] = {}
    done, failed = set(), 0
    for page in PAGES:
        for words in documented(page):
            if tuple(words) in done:
                continue
            done.add(tuple(words))
            said = f"{page.relative_to(ROOT)}: {shlex.join(words)}"
            print(f"--- {said}", flush=True)
            begun = time.process_time()
            try:
                as_in_a_new_process()
                lay_out(words, shelf, laid)
                status = run(words)
            except Exception:
                status = traceback.format_exc()
            if status:
                failed += 1
                print(f"{said} ended with {status}", file=sys.stderr, flush=True)
            print(f"--- {time.process_time() - begun:.1f} s", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(done)} commands failed")
    as_in_a_new_process()

    snippets("docs/data.md", {})
    snippets("docs/finetuning.md", {})
    masks = importlib.import_module("numpy").ones((1, 4, 4), dtype=bool)
    snippets("docs/evaluation.md", {"masks": masks, "targets": masks})
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    given = {"image": "examples/scene.png", "queries": ["the tree"], "torch": torch}
    given |= {name: getattr(transformers, name) for name in ("AutoModel", "BitsAndBytesConfig")}
    # Last of all it has the mask path compiled, at the next use.
    snippets("docs/speed.md", names | given)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
