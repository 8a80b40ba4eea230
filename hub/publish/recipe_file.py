"""What a run was told, as a recipe beside its weights: the model card shows it, and `finetune --config` reads it."""

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from uground.hub.publish.run_files import LENGTH_SETTINGS, SETTINGS_THAT_MATTER

RECIPE_FILE = "recipe.yaml"
BATCH_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def write_recipe(folder: str | Path, arguments: Any, config: Any) -> Path:
    """
    Write what shaped the result of a run; nothing of where it ran, and of files here the names only.

    Args:
        folder: to write `recipe.yaml` to.
        arguments: `FinetuneArguments`; what was left at its default is left out.
        config: the `UGroundTrainingConfig`.

    Returns:
        The file.
    """
    told = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
    told = {field.name: told[field.name] for field in fields(arguments) if told[field.name] != _default(field)}
    told |= {name: getattr(config, name) for name in (*BATCH_SETTINGS, *LENGTH_SETTINGS, *SETTINGS_THAT_MATTER)}
    recipe = {name: _plain(value) for name, value in told.items() if value is not None}
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / RECIPE_FILE
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _default(field: Field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value):
    """A value as YAML holds it; a path of this machine by its last part."""
    value = getattr(value, "value", value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, str) and Path(value).exists():
        return Path(value).name
    return value
