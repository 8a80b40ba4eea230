"""10,000 broken and whole inputs at the public entry points: nothing but sentences, and no wrong value.

    make fuzz
    python benchmarks/fuzz.py --count 10000 --seed 0 --seconds 900
    python benchmarks/fuzz.py --only masks:17          # one input again, with its traceback

An input may be refused by a `ValueError`, `OSError` or `TypeError` of one line that our code raised on purpose;
anything else is a failure, and so is a process that dies or hangs. What is taken is compared with code that shares
nothing with the package: a decoder of RLE, the even-odd rule at pixel centres, numpy for pixels and orientations.
Inputs are drawn from the seed, each by itself. Prints failures, and at the end one JSON line; the status is 1 if
anything failed. It is no part of CI: what it finds becomes a test there.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import transformers  # noqa: E402  (after the environment is set)
from fuzz_images import image_input  # noqa: E402
from fuzz_inputs import Refused, Wrong, broken_bytes, broken_json, odd_text  # noqa: E402
from fuzz_masks import line_input, mask_input  # noqa: E402
from PIL import Image  # noqa: E402

import uground  # noqa: E402
from uground import UGroundConfig, UGroundProcessor, tiny_checkpoint  # noqa: E402
from uground.apps.annotate import read_queries  # noqa: E402
from uground.processing.prompt_format import PromptFormat  # noqa: E402

ROOT = Path(uground.__file__).resolve().parent
# Of each kind, how many of 100 inputs.
SHARES = {"images": 25, "masks": 30, "lines": 15, "queries": 12, "config": 9, "tokenizer": 9}
# Seconds that one input may take.
PATIENCE = 20
# Inputs of one process: what one leaves behind shall not reach all the others.
CHUNK = 250
SENTENCE = 1500
PICTURE = Image.new("RGB", (30, 20))
FAILURES_SHOWN = 40
CHECKPOINT_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json")
CHECKPOINT_FILES += ("tokenizer_config.json", "chat_template.jinja")


class Checkpoint:
    """A copy of the small files of the bundled checkpoint, one of which may be broken, and its processor."""

    def __init__(self, folder: Path):
        self.folder, self.source = folder, Path(tiny_checkpoint())
        self.processor = UGroundProcessor.from_pretrained(self.source)

    def broken(self, rng: Random, names: tuple[str, ...]) -> Path:
        """Restore all files, break one; returns its path."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in CHECKPOINT_FILES:
            shutil.copyfile(self.source / name, self.folder / name)
        path = self.folder / rng.choice(names)
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_bytes(broken_json(rng, json.loads(path.read_text(encoding="utf-8"))))
        else:
            path.write_bytes(broken_bytes(rng, path.read_bytes()))
        return path


def config_input(rng: Random, folder: Path, checkpoint: Checkpoint) -> None:
    """A checkpoint's config, broken: refused with its file named, or whole enough to be saved and read again."""
    path = checkpoint.broken(rng, ("config.json",))
    try:
        config = UGroundConfig.from_pretrained(checkpoint.folder)
    except (ValueError, OSError, TypeError) as error:
        raise Refused(names=(path.name, str(checkpoint.folder))) from error
    config.save_pretrained(folder / "again")
    again = UGroundConfig.from_pretrained(folder / "again")
    if json.dumps(again.to_dict(), sort_keys=True) != json.dumps(config.to_dict(), sort_keys=True):
        raise Wrong("a config that was read, saved and read again differs")


def tokenizer_input(rng: Random, folder: Path, checkpoint: Checkpoint) -> None:
    """A processor's files, broken: refused with the folder or file named, or a processor that answers or refuses."""
    path = checkpoint.broken(rng, CHECKPOINT_FILES[2:])
    try:
        processor = UGroundProcessor.from_pretrained(checkpoint.folder)
    except (ValueError, OSError, TypeError) as error:
        raise Refused(names=(path.name, str(checkpoint.folder))) from error
    if processor.segment_token_id == processor.image_token_id:
        raise Wrong("two tokens share an id")
    try:
        processor(PICTURE, "the cup")
    except (ValueError, OSError, TypeError) as error:
        raise Refused from error


def query_input(rng: Random, folder: Path, checkpoint: Checkpoint) -> None:
    """A query of odd text: refused, or text and nothing else; and files of queries, cut where lines end only."""
    if rng.random() < 0.3:
        _query_file(rng, folder)
        return
    query = odd_text(rng)
    processor = checkpoint.processor
    try:
        (ids,) = processor(PICTURE, query)["input_ids"].tolist()
    except (ValueError, OSError, TypeError) as error:
        raise Refused from error
    if not query.strip():
        raise Wrong(f"a blank query {query!r} is taken")
    if processor.image_token in query and PromptFormat.of(processor).generation.strip() in query:
        return  # a whole prompt, in which an answer's special tokens are tokens
    for name, wanted in (("image", processor.num_image_tokens), ("segment", 0), ("reject", 0)):
        found = ids.count(getattr(processor, f"{name}_token_id"))
        if found != wanted:
            raise Wrong(f"the query {query!r} holds {found} {name} tokens, expected {wanted}")


def _query_file(rng: Random, folder: Path) -> None:
    path = folder / "queries.txt"
    pieces = [rng.choice(["\n", "\r\n", "\u2028", "\x85", "\x0c", " ", "a", "é", "cup", "\r"]) for _ in range(20)]
    content = "".join(pieces).encode()
    path.write_bytes(content)
    wanted = [line.strip() for line in content.decode().replace("\r\n", "\n").split("\n")]
    try:
        (found,) = read_queries(str(path), ["1"])
    except (ValueError, OSError, TypeError) as error:
        raise Refused(names=(str(path),)) from error
    if found != [line for line in wanted if line]:
        raise Wrong(f"queries of {content!r} are {found}")


KINDS = {
    "images": image_input,
    "masks": mask_input,
    "lines": line_input,
    "queries": query_input,
    "config": config_input,
    "tokenizer": tokenizer_input,
}


def complaint(error: BaseException) -> str | None:
    """What is wrong with an outcome that is no plain success; None for a refusal as it should be."""
    if isinstance(error, Wrong):
        return f"wrong value: {error}"
    if not isinstance(error, Refused):
        return f"{type(error).__name__}: {error}"
    cause, text = error.__cause__, str(error.__cause__)
    if "\n" in text.strip() or not text.strip() or len(text) > SENTENCE:
        return f"no sentence: {type(cause).__name__} of {len(text)} characters: {text}"
    frames = traceback.extract_tb(cause.__traceback__)
    # A name of a file is what the system itself says of what is missing.
    raised = Path(frames[-1].filename).resolve()
    is_ours = raised.is_relative_to(ROOT) and "site-packages" not in raised.parts
    if not is_ours and not getattr(cause, "filename", None):
        return f"not raised by us: {type(cause).__name__} at {frames[-1].filename}:{frames[-1].lineno}: {text}"
    if error.names and not any(name in text for name in error.names):
        return f"names no file: {text}"
    return None


def run_one(kind: str, index: int, seed: int, folder: Path, checkpoint: Checkpoint) -> tuple[str, str | None]:
    """`taken`, `refused` or `failed` of one input, and what is wrong."""

    def give_up(*_):
        raise TimeoutError(f"no end after {PATIENCE} seconds")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        KINDS[kind](Random(f"{seed} {kind} {index}"), folder, checkpoint)
        return "taken", None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        wrong = complaint(error)
        return ("refused", None) if wrong is None else ("failed", wrong)
    finally:
        signal.alarm(0)


def _work(kind: str, indices: range, seed: int, results) -> None:
    """Send every input's outcome; the one before which the process dies is the one that killed it."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="uground-fuzz-") as made:
        checkpoint = Checkpoint(Path(made) / "checkpoint")
        for index in indices:
            folder = Path(made) / "input"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            results.send((index, *run_one(kind, index, seed, folder, checkpoint)))
    results.close()


def run_kind(kind: str, count: int, seed: int, deadline: float) -> tuple[Counter, list[str]]:
    """Outcomes of `count` inputs of a kind, in processes of `CHUNK` inputs each, and the failures."""
    context = multiprocessing.get_context("fork")
    outcomes, failures, start = Counter(), [], 0
    while start < count and time.monotonic() < deadline:
        end = min(start + CHUNK, count)
        receiving, sending = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(kind, range(start, end), seed, sending))
        worker.start()
        sending.close()
        try:
            while True:
                index, outcome, wrong = receiving.recv()
                outcomes[outcome] += 1
                start = index + 1
                if wrong is not None:
                    failures.append(f"{kind}:{index}: {' '.join(wrong.split())[:500]}")
        except EOFError:
            worker.join()
        if worker.exitcode != 0:
            outcomes["failed"] += 1
            failures.append(f"{kind}:{start}: the process ended with {worker.exitcode}")
            start += 1
    return outcomes, failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python benchmarks/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1800, help="after which no new chunk begins")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", metavar="KIND:INDEX", help="one input again, with its traceback")
    options = parser.parse_args(argv)
    if options.only:
        kind, _, index = options.only.partition(":")
        with tempfile.TemporaryDirectory(prefix="uground-fuzz-") as made:
            checkpoint = Checkpoint(Path(made) / "checkpoint")
            KINDS[kind](Random(f"{options.seed} {kind} {index}"), Path(made), checkpoint)
        return 0
    began = time.monotonic()
    report, failures = {}, []
    for kind in options.kinds:
        count = options.count * SHARES[kind] // 100
        outcomes, found = run_kind(kind, count, options.seed, began + options.seconds)
        report[kind] = {"inputs": sum(outcomes.values()), "asked": count, **outcomes}
        failures += found
    for failure in failures[:FAILURES_SHOWN]:
        print(failure, file=sys.stderr)
    if len(failures) > FAILURES_SHOWN:
        print(f"and {len(failures) - FAILURES_SHOWN} more", file=sys.stderr)
    done = sum(one["inputs"] for one in report.values())
    print(json.dumps({"fuzz": report, "inputs": done, "failures": len(failures), "seed": options.seed,
                      "seconds": round(time.monotonic() - began, 1)}))  # fmt: skip
    return 1 if failures or done < sum(one["asked"] for one in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
