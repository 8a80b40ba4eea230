"""The code that travels with a checkpoint, and the stamps in its configuration that name it.

The code is the flat closure of `modeling_uground/` and `processing/`: the entry files and all that they import of
their folders, side by side, so that `trust_remote_code=True` runs them where `uground` is not installed.
"""

import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from uground.hub.weights.checkpoint_folder import read_config
from uground.modeling_uground.checkpoint_files import read_json_object
from uground.modeling_uground.configuration_uground import CODE_VERSION, CUSTOM_PIPELINES, UGroundConfig

PACKAGE = Path(__file__).resolve().parents[2]
ENTRY_FILES = (
    "modeling_uground/configuration_uground.py",
    "modeling_uground/modeling_uground.py",
    "processing/processing_uground.py",
    "processing/pipeline_uground.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_uground.UGroundConfig",
    "AutoModel": "modeling_uground.UGroundForReferringSegmentation",
    "AutoModelForImageTextToText": "modeling_uground.UGroundForReferringSegmentation",
    "AutoProcessor": "processing_uground.UGroundProcessor",
}


def code_files() -> dict[str, Path]:
    """
    The flat closure: name in the checkpoint folder to file of this package.

    Raises:
        ValueError: two files would get the same name.
    """
    files: dict[str, Path] = {}
    for entry in ENTRY_FILES:
        path = PACKAGE / entry
        for source in (path, *map(Path, get_relative_import_files(path))):
            if files.setdefault(source.name, source) != source:
                raise ValueError(f"{source} and {files[source.name]} would be one file in a checkpoint folder")
    return dict(sorted(files.items()))


def write_code(folder: str | os.PathLike) -> list[str]:
    """Copy the flat closure to a folder, over an older one; returns the names of the files."""
    files = code_files()
    for name, source in files.items():
        shutil.copyfile(source, Path(folder) / name)
    return list(files)


def stamp_config(folder: str | os.PathLike) -> UGroundConfig:
    """
    Make `config.json` (and `processor_config.json`) name this code, its version and its pipeline.

    Raises:
        OSError: there is no `config.json`.
        ValueError: it is no configuration of UGround.
    """
    config = read_config(folder)
    path = Path(folder) / "config.json"
    content = read_json_object(path)
    content |= {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES, "uground_version": CODE_VERSION}
    write_json(path, content)
    processor = path.with_name("processor_config.json")
    if processor.is_file():
        content = read_json_object(processor)
        # The parts of a processor carry the same entry; one loaded from a repository names that repository.
        for part in (content, content.get("image_processor"), content.get("sam_image_processor")):
            if part is not None:
                part["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        write_json(processor, content)
    return config


def write_json(path: Path, content: dict) -> None:
    """Write JSON the way transformers does, so that what is unchanged stays the same byte for byte."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
