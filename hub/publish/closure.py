"""The code that travels with a checkpoint, and what else makes a checkpoint folder complete.

The code is the flat closure of `modeling_uground/` and `processing/`: the entry files and all that they import of
their folders, side by side, so that `trust_remote_code=True` runs them where `uground` is not installed.

    python -m uground.hub.closure PATH --from-nothing --dataset scenes --license apache-2.0 --recipe recipes/tiny.yaml

completes a folder in place; `uground.hub.publish` does so in a copy.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, logging

from uground.command_line import run_command
from uground.hub.publish.card import add_card_arguments, card_facts, write_card
from uground.hub.publish.example import write_example
from uground.hub.publish.recipe_file import RECIPE_FILE
from uground.hub.weights.checkpoint_folder import load_checkpoint
from uground.hub.weights.code_files import stamp_config, write_code
from uground.modeling_uground import UGroundForReferringSegmentation


def complete_folder(
    folder: str | os.PathLike,
    example: bool = True,
    model: UGroundForReferringSegmentation | None = None,
    replace_card: bool = False,
    **facts: Any,
) -> None:
    """
    Add what a checkpoint folder lacks of a complete one, in place; weights and processor must lie there.

    Written anew: code, stamps in the configuration, figures and recipe where they are given. Written where absent:
    generation configuration, example image with overlay, model card.

    Args:
        folder: with weights, `config.json`, processor and tokenizer.
        example: ask the checkpoint about the example image, and draw the answer.
        model: the model of the folder, if it is loaded already.
        replace_card: write the card anew even if there is one.
        facts: what the card says, as for [`uground.hub.publish.card.write_card`].

    Raises:
        OSError, ValueError: the folder is not usable; the sentence says why. `facts` are given, but the card stays.
    """
    folder = Path(folder)
    has_card = (folder / "README.md").is_file()
    if has_card and not replace_card:
        refuse_facts(facts)
    config = stamp_config(folder)
    write_code(folder)
    keep_files(folder, facts)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(config.get_text_config()).save_pretrained(folder)
    if example and not (folder / "example_overlay.png").is_file():
        write_example(folder, load_checkpoint(folder) if model is None else model)
    if replace_card or not has_card:
        write_card(folder, **facts)


def refuse_facts(facts: dict) -> None:
    """
    For a folder whose card stays as it is: refuse facts that only a new card would tell.

    Raises:
        ValueError: names those that are given.
    """
    told = [name for name, value in facts.items() if name != "repo_id" and value is not None]
    if told:
        raise ValueError(
            f"there is a README.md already, which is taken as it is, so {', '.join(told)} would go nowhere: write it "
            "anew with `python -m uground.hub.card PATH --write`, or remove it"
        )


def keep_files(folder: Path, facts: dict) -> None:
    """Copy figures and recipe to a folder, where they are given."""
    for fact, name in (("results_json", "results.json"), ("recipe", RECIPE_FILE)):
        if facts.get(fact) is not None:
            _keep(Path(facts[fact]), folder / name)


def _keep(source: Path, target: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} is no file")
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m uground.hub.closure",
        description="Add what a checkpoint folder lacks: code, stamps, generation settings, example and model card.",
    )
    parser.add_argument("path", metavar="PATH", help="checkpoint folder, with its processor")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="name to use in the card")
    parser.add_argument("--replace-card", action="store_true", help="write the card anew, over one that is there")
    parser.add_argument("--no-example", action="store_true", help="do not ask the checkpoint about the example image")
    add_card_arguments(parser)
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    return run_command(parser.prog, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    facts = {"repo_id": options.repo_id, **card_facts(options)}
    complete_folder(options.path, example=not options.no_example, replace_card=options.replace_card, **facts)
    print(options.path)
