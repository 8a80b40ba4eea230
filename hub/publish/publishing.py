"""Publish a checkpoint, or an adapter, to the Hub: everything that makes it complete, in one commit.

    python -m uground.hub.publish runs/boats --repo-id someone/uground-boats --private --license apache-2.0
    python -m uground.hub.publish runs/boats --repo-id someone/uground-boats --dry-run
    python -m uground.hub.publish runs/boats-lora --repo-id someone/boats-lora --adapter --base-model someone/uground

The folder itself is left as it is. Weights must be safetensors, whole and finite, or nothing is sent. The token is the
one of `hf auth login` or of the variable HF_TOKEN. Run again after an error: what has arrived is not sent twice.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import logging

from uground.checkpoint_loading import load_processor
from uground.command_line import run_command
from uground.hub.publish.card import add_card_arguments, card_facts, write_card
from uground.hub.publish.closure import complete_folder, keep_files, refuse_facts
from uground.hub.publish.commit import add_repository_arguments, check_repo_id, commit_files, require_token
from uground.hub.publish.eval_entries import write_eval_entries
from uground.hub.publish.model_card import check_card
from uground.hub.publish.recipe_file import RECIPE_FILE
from uground.hub.weights.checkpoint_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter,
    load_checkpoint,
    read_config,
)
from uground.hub.weights.code_files import write_json
from uground.hub.weights.weight_files import name_some
from uground.modeling_uground.short_card import is_card_of_uground

# What is taken of a folder, whatever else lies there: logs, optimizer states and pickles stay at home.
TAKEN = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "README.md",
    "results.json",
    RECIPE_FILE,
    "example.json",
    "example*.png",
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
NEEDED_OF_PROCESSOR = ("processor_config.json", "tokenizer_config.json")


@contextmanager
def staged(
    source: str | os.PathLike,
    adapter: bool = False,
    example: bool = True,
    base_model: str | None = None,
    **facts: Any,
) -> Iterator[Path]:
    """
    A temporary folder with all that a repository should hold, made of a checkpoint folder that is only read.

    Args:
        source: the checkpoint folder, or the folder of an adapter.
        adapter: which of the two it is.
        example: ask the checkpoint about the example image, if it has no example yet.
        base_model: Hub id of an adapter's base, in place of the one its configuration names.
        facts: what the card says, as for [`uground.hub.publish.card.build_card`].

    Raises:
        OSError, ValueError: the folder cannot be published; the sentence says why.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"{str(source)!r} is no folder")
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter and not adapter:
        raise ValueError(f"{str(source)!r} holds an adapter: publish it with --adapter, or merge it first")
    if adapter and not is_adapter:
        raise ValueError(f"{str(source)!r} holds no adapter: there is no {ADAPTER_CONFIG}; leave --adapter out")
    with tempfile.TemporaryDirectory(prefix="uground-publish-") as made:
        folder = Path(made)
        if adapter:
            _stage_adapter(source, folder, base_model, facts)
        else:
            _stage_checkpoint(source, folder, example, facts)
        card = check_card((folder / "README.md").read_text(encoding="utf-8"))
        # What the card says, be it ours or the user's, in the form that the Hub reads now.
        write_eval_entries(folder, card.data.eval_results)
        yield folder


def _stage_checkpoint(source: Path, folder: Path, example: bool, facts: dict) -> None:
    read_config(source)
    absent = [name for name in NEEDED_OF_PROCESSOR if not (source / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"the folder {str(source)!r} has no processor, it lacks {', '.join(absent)}: save the processor there too"
        )
    load_processor(source)
    model = load_checkpoint(source)
    _take(source, folder, (*TAKEN, *WEIGHTS))
    complete_folder(folder, example=example, model=model, **facts)


def _stage_adapter(source: Path, folder: Path, base_model: str | None, facts: dict) -> None:
    config = check_adapter(source)
    _take(source, folder, (*TAKEN, *ADAPTER_FILES))
    base = base_model or config.get("base_model_name_or_path")
    if not base or Path(base).exists() or base.count("/") != 1:
        raise ValueError(
            f"an adapter must name its base by Hub id, got {base!r}: give --base-model USER/NAME of the published base"
        )
    # A link would be followed: the file is written anew, the one of the user stays.
    (folder / ADAPTER_CONFIG).unlink()
    write_json(folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": base})
    card = folder / "README.md"
    # peft leaves an empty card with every adapter.
    if card.is_file() and is_card_of_uground(card.read_text(encoding="utf-8")):
        # The base goes to the configuration.
        refuse_facts({**facts, "base_models": None})
    else:
        keep_files(folder, facts)
        write_card(folder, **{**facts, "base_models": [base]})


def _take(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy small files and link large ones; links that lead out of the source are refused."""
    root = source.resolve()
    taken = sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    outside = [path.name for path in taken if not path.resolve().is_relative_to(root)]
    if outside:
        raise ValueError(
            f"the folder {str(source)!r} may only hold files of its own, {name_some(outside)} lead out of it"
        )
    for path in taken:
        if path.suffix == ".safetensors":
            os.symlink(path.resolve(), folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def publish(
    path: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    adapter: bool = False,
    example: bool = True,
    **facts: Any,
) -> str | None:
    """
    Publish a folder in one commit; what the command does.

    Args:
        path: checkpoint folder, or folder of an adapter with `adapter=True`.
        repo_id: `USER/NAME`; made if it does not exist.
        private: make it private.
        dry_run: print files, sizes and card, and use no network.
        example: see [`staged`].
        facts: what the card says, as for [`uground.hub.publish.card.build_card`].

    Returns:
        Address of the commit; `None` for a dry run.

    Raises:
        OSError: there is no token, the Hub cannot be reached, or it refuses.
        ValueError: the folder cannot be published; nothing was sent.
    """
    check_repo_id(repo_id)
    token = "" if dry_run else require_token()
    base_models = facts.get("base_models")
    base_model = base_models[0] if adapter and base_models else None
    with staged(path, adapter, example, base_model, repo_id=repo_id, **facts) as folder:
        if dry_run:
            print(listing(folder, repo_id))
            return None
        kind = "adapter" if adapter else "checkpoint"
        return commit_files(folder, repo_id, token, f"Publish {kind} with uground", private=private)


def listing(folder: Path, repo_id: str) -> str:
    """What would be sent: files with their sizes in bytes, and the card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    width = max(len(f"{size:,}") for size in sizes)
    lines = [f"{size:>{width},}  {path.relative_to(folder)}" for path, size in zip(files, sizes, strict=True)]
    total = f"{sum(sizes):,} bytes in {len(files)} files would go to {repo_id}, in one commit"
    return "\n".join([*lines, total, "", (folder / "README.md").read_text(encoding="utf-8")])


def main(argv: list[str] | None = None) -> int:
    usage, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground.hub.publish",
        description=usage,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="checkpoint folder, or folder of an adapter")
    add_repository_arguments(parser)
    parser.add_argument("--adapter", action="store_true", help="PATH holds a LoRA adapter")
    parser.add_argument("--no-example", action="store_true", help="do not ask the checkpoint about the example image")
    add_card_arguments(parser)
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    return run_command(parser.prog, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    address = publish(
        options.path,
        options.repo_id,
        private=options.private,
        dry_run=options.dry_run,
        adapter=options.adapter,
        example=not options.no_example,
        **card_facts(options),
    )
    if address is not None:
        print(address)
