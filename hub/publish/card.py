"""The model card of a checkpoint folder: look at it, or write it.

    python -m uground.hub.card PATH
    python -m uground.hub.card PATH --base-model liuhaotian/llava-v1.5-7b --license llama2 --recipe recipe.yaml --write

Figures come from `results.json`, which `uground.training.evaluate` writes; none can be given by hand.
"""

import argparse
import os
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from uground.command_line import run_command
from uground.hub.publish.model_card import CardFacts, build_model_card, check_card
from uground.hub.publish.recipe_file import RECIPE_FILE
from uground.hub.weights.checkpoint_folder import ADAPTER_CONFIG, read_config
from uground.modeling_uground import UGroundConfig
from uground.modeling_uground.checkpoint_files import read_json_object


def build_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base_models: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    recipe: str | os.PathLike | None = None,
    results_json: str | os.PathLike | None = None,
    config: UGroundConfig | None = None,
) -> ModelCard:
    """
    The card of a checkpoint folder, or of a folder with an adapter.

    Args:
        folder: the folder; its `results.json`, `recipe.yaml` and `example.json` are read where they exist.
        repo_id: where it lies or will lie on the Hub; by default the name of the folder stands in for it.
        base_models: Hub ids it was made from; an empty list says that it was trained from nothing.
        datasets: names of the training data; by default those that the recipe names.
        license: licence of the weights, as the Hub spells it.
        recipe: file with the recipe, instead of the folder's.
        results_json: file with the figures, instead of the folder's.
        config: the configuration, where the folder does not hold it yet.

    Raises:
        OSError: a file is missing.
        ValueError: a file does not hold what it should.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder")
    adapter = read_json_object(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    if adapter is not None and base_models is None:
        base = adapter.get("base_model_name_or_path")
        base_models = [base] if base and not Path(base).exists() else None
    recipe = _given_or_present(recipe, folder / RECIPE_FILE)
    recipe_text = recipe.read_text(encoding="utf-8") if recipe else None
    told = _told(recipe_text, recipe)
    if datasets is None:
        datasets = [str(name) for name in told.get("train_data") or []] or None
    if base_models is None and "/" in str(told.get("model")):
        base_models = [told["model"]]
    results = _given_or_present(results_json, folder / "results.json")
    example = _given_or_present(None, folder / "example.json")
    facts = CardFacts(
        repo_id=repo_id or folder.resolve().name,
        base_models=base_models,
        datasets=datasets,
        license=license,
        recipe=recipe_text,
        results=read_json_object(results) if results else None,
        example=read_json_object(example) if example else None,
        is_adapter=adapter is not None,
    )
    if config is None:
        config = _config_for_card(folder, adapter)
    return check_card(str(build_model_card(config, facts)))


def _told(recipe: str | None, path) -> dict:
    """The settings of a recipe."""
    try:
        told = yaml.safe_load(recipe or "") or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(told, dict):
        raise ValueError(f"the recipe {path} must hold settings by name, got a {type(told).__name__}")
    return told


def write_card(folder: str | os.PathLike, **facts: CardFacts) -> Path:
    """Write the card of [`build_card`], which `facts` go to, as `README.md` of the folder; returns its path."""
    path = Path(folder) / "README.md"
    build_card(folder, **facts).save(path)
    return path


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what a card says, shared by the commands that write one."""
    parser.add_argument("--base-model", action="append", metavar="ID", help="Hub id it was made from; may be repeated")
    parser.add_argument("--from-nothing", action="store_true", help="no base model: every weight was trained here")
    parser.add_argument("--dataset", action="append", metavar="NAME", help="training data; may be repeated")
    parser.add_argument("--license", help="licence of the weights, as the Hub spells it: apache-2.0, llama2, other")
    parser.add_argument("--recipe", metavar="FILE", help="recipe of the training (default: PATH/recipe.yaml)")
    parser.add_argument("--results", metavar="FILE", help="figures (default: PATH/results.json)")


def card_facts(options: argparse.Namespace) -> dict:
    """The flags of [`add_card_arguments`] as arguments of [`build_card`]."""
    if options.from_nothing and options.base_model:
        raise ValueError("give --base-model or --from-nothing, not both")
    return {
        "base_models": [] if options.from_nothing else options.base_model,
        "datasets": options.dataset,
        "license": options.license,
        "recipe": options.recipe,
        "results_json": options.results,
    }


def _config_for_card(folder: Path, adapter: dict | None) -> UGroundConfig | None:
    """Of the folder; of an adapter's base where that is a folder here, and otherwise unknown."""
    if adapter is None or (folder / "config.json").is_file():
        return read_config(folder)
    base = Path(adapter.get("base_model_name_or_path") or "")
    return read_config(base) if (base / "config.json").is_file() else None


def _given_or_present(given: str | os.PathLike | None, default: Path) -> Path | None:
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"{os.fspath(given)!r} is no file")
        return Path(given)
    return default if default.is_file() else None


def _run(options: argparse.Namespace) -> None:
    facts = {"repo_id": options.repo_id, **card_facts(options)}
    present = Path(options.path) / "README.md"
    if options.write:
        print(write_card(options.path, **facts))
    elif present.is_file():
        print(check_card(present.read_text(encoding="utf-8")))
    else:
        print(build_card(options.path, **facts))


def main(argv: list[str] | None = None) -> int:
    usage, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m uground.hub.card",
        description=f"{usage} Prints the card that PATH has, or else the one that publishing it would write.",
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="checkpoint folder, or folder of an adapter")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="name to use in the card")
    parser.add_argument("--write", action="store_true", help="write README.md, over one that is there")
    add_card_arguments(parser)
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _run(options))
