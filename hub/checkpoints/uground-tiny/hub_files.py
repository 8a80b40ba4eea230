"""On the way to the Hub a model takes its code along and explains itself; on the way back it stays in its folder."""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .checkpoint_files import CheckpointFilesMixin, read_weight_map
from .short_card import is_card_of_uground, short_card

CARD_FILE = "README.md"
TEXT_AUTO_CLASS = "AutoModelForImageTextToText"
# What a checkpoint needs besides the model's own code, which the model does not import.
COMPANIONS = ("pipeline_uground.py", "processing_uground.py")


class HubFilesMixin(CheckpointFilesMixin):
    """
    For a `PreTrainedModel`: code of pipeline and processor with every save, a short card of ours on every push.

    Attributes:
        revision: what `from_pretrained` was asked for, of the repository that the model was loaded from.
    """

    revision: str | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedModel.save_pretrained`; all code that a checkpoint folder needs is saved too."""
        # The library notes one Auto class; by this one `pipeline("image-text-to-text")` finds the model.
        name = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), TEXT_AUTO_CLASS: name}
        super().save_pretrained(save_directory, *args, **kwargs)
        for weights in Path(save_directory).glob("*.safetensors"):
            give_usual_mode(weights)
        if kwargs.get("is_main_process", True):
            copy_companions(save_directory, self.config.name_or_path, self.revision)

    def prepare_upload(self, folder: str | os.PathLike, repo_id: str) -> None:
        """Complete a folder that `push_to_hub` is about to send, in which the base class has put an empty card."""
        copy_companions(folder, self.config.name_or_path, self.revision)
        path, card = Path(folder) / CARD_FILE, short_card(repo_id)
        if path.is_file():
            present = path.read_text(encoding="utf-8")
            if is_card_of_uground(present):
                return
            tags = ModelCard(present, ignore_metadata_errors=True).data.tags or []
            card.data.tags += [tag for tag in tags if tag not in card.data.tags]
        card.save(path)

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        self.prepare_upload(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def give_usual_mode(path: Path) -> None:
    """
    Let others read a file as far as the user lets them read new files.

    safetensors writes to a temporary file, which nobody else may read, and moves it into place.
    """
    if path.stat().st_mode & 0o777 != 0o600:
        return
    # The mask can only be read by making a file: setting it, even for a moment, would change it for all threads.
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()


def copy_companions(folder: str | os.PathLike, origin: str | None, revision: str | None = None) -> None:
    """
    Copy the code of processor and pipeline to a checkpoint folder.

    It is looked for beside the model's code, as in the installed package or in a repository's module cache, and then
    in the folder or repository that the model was loaded from. Code that is nowhere is left out: the processor brings
    its own when it is saved.

    Args:
        folder: to copy to.
        origin, revision: folder or repository that the model was loaded from, and which state of it.
    """
    target = Path(folder).resolve()
    wanted, seen = list(COMPANIONS), set()
    while wanted:
        name = wanted.pop()
        seen.add(name)
        source = _find_companion(name, origin or "", revision)
        if source is None:
            continue
        if source.resolve().parent != target:
            shutil.copyfile(source, target / name)
        # Of a repository, only what is asked for by name is fetched.
        wanted += {f"{module}.py" for module in get_relative_imports(source)} - seen


def _find_companion(name: str, origin: str, revision: str | None) -> Path | None:
    here = Path(__file__).resolve().parent
    for place in (here.with_name("processing"), here, Path(origin)):
        if (place / name).is_file():
            return place / name
    if not origin or Path(origin).exists():
        return None
    found = cached_file(
        origin,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def check_shard_names(folder: str | os.PathLike) -> None:
    """
    Raise an error if the index of a local checkpoint is none, or names files outside of its folder.

    Raises:
        ValueError: it does; the sentence names one.
    """
    if folder is not None and Path(folder, SAFE_WEIGHTS_INDEX_NAME).is_file():
        read_weight_map(Path(folder, SAFE_WEIGHTS_INDEX_NAME), needed=("weight_map",))


__all__ = ["CARD_FILE", "HubFilesMixin", "check_shard_names", "give_usual_mode"]
