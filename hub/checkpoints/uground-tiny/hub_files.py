"""On the way to the Hub a model takes its code along and explains itself; on the way back it stays in its folder."""

import json
import os
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .model_card import CardFacts, build_model_card, is_card_of_uground

CARD_FILE = "README.md"
# What a checkpoint needs besides the model's own code, which the model does not import.
COMPANIONS = ("pipeline_uground.py", "processing_uground.py")


class HubFilesMixin:
    """For a `PreTrainedModel`: code of pipeline and processor with every save, a model card of ours on every push."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Like `PreTrainedModel.save_pretrained`; all code that a checkpoint folder needs is saved too."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            copy_companions(save_directory, self.config)

    def prepare_upload(self, folder: str | os.PathLike, repo_id: str) -> None:
        """Complete a folder that `push_to_hub` is about to send, in which the base class has put an empty card."""
        copy_companions(folder, self.config)
        self.write_model_card(folder, CardFacts(repo_id=repo_id))

    def write_model_card(self, folder: str | os.PathLike, facts: CardFacts | None = None) -> Path:
        """
        Write the card of this model to a folder, unless one that speaks of UGround lies there.

        Args:
            folder: of the checkpoint.
            facts: what the configuration does not know.

        Returns:
            Path of the card.
        """
        path = Path(folder) / CARD_FILE
        card = build_model_card(self.config, facts or CardFacts())
        if path.is_file():
            present = path.read_text(encoding="utf-8")
            if is_card_of_uground(present):
                return path
            tags = ModelCard(present, ignore_metadata_errors=True).data.tags or []
            card.data.tags += [tag for tag in tags if tag not in card.data.tags]
        card.save(path)
        return path

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        self.prepare_upload(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def copy_companions(folder: str | os.PathLike, config) -> None:
    """
    Copy the code of processor and pipeline to a checkpoint folder.

    It is looked for beside the model's code, as in the installed package or in a repository's module cache, and then
    in the folder or repository that the model was loaded from. Code that is nowhere is left out: the processor brings
    its own when it is saved.
    """
    target = Path(folder).resolve()
    for name in COMPANIONS:
        source = _find_companion(name, config)
        if source is None:
            continue
        for path in map(Path, (source, *get_relative_import_files(source))):
            if path.is_file() and path.resolve().parent != target:
                shutil.copyfile(path, target / path.name)


def _find_companion(name: str, config) -> Path | None:
    here = Path(__file__).resolve().parent
    origin = getattr(config, "name_or_path", None) or ""
    for place in (here.with_name("processing"), here, Path(origin)):
        if (place / name).is_file():
            return place / name
    if not origin or Path(origin).exists():
        return None
    found = cached_file(
        origin,
        name,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def check_shard_names(folder: str | os.PathLike) -> None:
    """
    Raise an error if the index of a local checkpoint names files outside of its folder.

    Raises:
        ValueError: it does; the sentence names one.
    """
    if folder is None or not Path(folder, SAFE_WEIGHTS_INDEX_NAME).is_file():
        return
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights") from error
    for name in sorted(names, key=str):
        if not is_inside(name):
            raise ValueError(f"{index} must name files beside it, got {name!r}")


def is_inside(name: str) -> bool:
    """Whether a relative path of a repository stays in its folder."""
    if not isinstance(name, str) or not name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


__all__ = ["CARD_FILE", "HubFilesMixin", "check_shard_names", "is_inside"]
