"""Writing a checkpoint folder that appears only when it is finished.

Everything is written beside the final place, in a folder that no loader takes for a checkpoint, and moved there at the
end: what was interrupted leaves nothing that looks finished.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from uground.hub.weights.code_files import stamp_config, write_code
from uground.hub.weights.weight_files import first_line
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.modeling_uground.hub_files import give_usual_mode
from uground.processing import UGroundProcessor

# A shard is kept in memory until it is full; together with what is read, this bounds the memory of a conversion.
MAX_SHARD_BYTES = 1_000_000_000
# Less than this is rather copied than written to a file of its own.
SMALL_SHARD_BYTES = 50_000_000
SINGLE_FILE = "model.safetensors"
# Config, code, tokenizer and index, generously.
SMALL_FILES_BYTES = 50_000_000


def check_output(output: Path) -> None:
    """
    Raise an error in one sentence unless a checkpoint may be written to `output`.

    Raises:
        OSError: it exists and is not empty, is a file, or its parent cannot be made.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise FileExistsError(f"the output folder {output} exists and is not empty")
    elif output.exists():
        raise FileExistsError(f"the output {output} is a file, expected a new or empty folder")


@contextmanager
def new_folder(output: str | os.PathLike, num_bytes: int = 0) -> Iterator[Path]:
    """
    A folder to write a checkpoint to, which becomes `output` if the block ends without an error and is deleted if not.

    Args:
        output: a path that does not exist, or an empty folder; its parents are made.
        num_bytes: how much is going to be written, to be refused at once where there is no room.

    Raises:
        OSError: see [`check_output`]; or there is not enough room.
    """
    output = Path(os.path.abspath(output))
    check_output(output)
    made = _make_parents(output.parent)
    try:
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes + SMALL_FILES_BYTES:
            raise OSError(
                f"there is not enough room for {output}: {(num_bytes + SMALL_FILES_BYTES) / 1e9:.1f} GB are needed, "
                f"{free / 1e9:.1f} GB are free"
            )
        partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
        partial.mkdir()
    except BaseException:
        _remove_parents(made)
        raise
    try:
        yield partial
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_parents(made)
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns the ones that are new, innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new


def _remove_parents(made: list[Path]) -> None:
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class ShardWriter:
    """
    Writes tensors to safetensors files, the way `from_pretrained` reads them, holding one file's worth in memory.

    A file is no larger than `MAX_SHARD_BYTES`, unless one tensor alone is.

    Args:
        folder: where to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.total_bytes = 0
        self.total_parameters = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is written at the latest with [`finish`]."""
        if self._held and self._held_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self.flush()
        # safetensors refuses views of a storage that something else uses too.
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        self._held[name] = tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)
        self._held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.total_parameters += tensor.numel()

    def let_go(self) -> None:
        """Depend no longer on the file the tensors came from: write them, or copy them where they are few."""
        if self._held_bytes > SMALL_SHARD_BYTES:
            self.flush()
        self._held = {name: tensor.clone() for name, tensor in self._held.items()}

    def flush(self) -> None:
        """
        Write what is held.

        Raises:
            OSError: the file cannot be written, because the disk is full, for one.
        """
        if not self._held:
            return
        path = self.folder / self._part_name(len(self._written))
        try:
            save_file(self._held, path, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} cannot be written ({first_line(error)})") from error
        give_usual_mode(path)
        self._written.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    @staticmethod
    def _part_name(number: int) -> str:
        return f"part-{number}.safetensors"

    def finish(self) -> None:
        """Write the rest, give the files their names and write the index."""
        self.flush()
        count = len(self._written)
        weight_map = {}
        for number, names in enumerate(self._written):
            file = SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / self._part_name(number), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            metadata = {"total_parameters": self.total_parameters, "total_size": self.total_bytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            path = self.folder / f"{SINGLE_FILE}.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_all_but_weights(folder: Path, model: UGroundForReferringSegmentation, processor: UGroundProcessor) -> None:
    """
    Write what a checkpoint has besides weights: configuration, code, processor, pipeline.

    Args:
        folder: where to.
        model: a `UGroundForReferringSegmentation`, on any device, the meta device included.
        processor: a `UGroundProcessor`, or `None` for a checkpoint without one.
    """
    model.save_pretrained(folder, state_dict={})
    if processor is not None:
        processor.save_pretrained(folder)
    # Saving a model copies the files of the model alone.
    write_code(folder)
    stamp_config(folder)
