"""Reading tensors by name out of checkpoint files, of any layout, one at a time.

Files are mapped into memory, so that a tensor costs memory only while it is in use, and no code of a file is run:
pickles are read with `weights_only=True`. Every error is one sentence that names the file.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uground.modeling_uground.checkpoint_files import read_weight_map

# What a folder of weights may hold, the first found is read: an index or the one file.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# Downloaded of a Hub repository; pickles only where there are no safetensors.
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


def name_some(names: Collection[str], shown: int = 5) -> str:
    """A few names, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class TensorFile(Mapping):
    """
    The tensors of one file by name; a context manager, after which nothing of the file is kept.

    Args:
        path: a `.safetensors` file, or a pickle of PyTorch (`.bin`, `.pth`, `.pt`).
        kind: what to call the file in an error.

    Attributes:
        shapes: name to shape, known without reading any data.

    Raises:
        OSError: the file is absent, a folder, truncated or damaged.
        ValueError: it holds anything but tensors by name.
    """

    def __init__(self, path: str | os.PathLike, kind: str = "file"):
        self.path = os.fspath(path)
        self.kind = kind
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{kind} {self.path} is not a file")
        self._content = self._open_safetensors() if self.path.endswith(".safetensors") else self._open_pickle()

    def _open_safetensors(self):
        try:
            handle = safe_open(self.path, framework="pt")
            self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error
        return handle

    def _open_pickle(self) -> dict[str, Tensor]:
        try:
            # Only files in the zip format, the one since PyTorch 1.6, can be mapped.
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        except pickle.UnpicklingError as error:
            forbidden = re.search(r"GLOBAL (\S+)", str(error))
            if forbidden is None:
                raise OSError(f"{self.kind} {self.path} is no file of torch tensors, or it is damaged") from error
            held = f"holds more than tensors ({forbidden[1]})"
            raise ValueError(f"{self.kind} {self.path} {held} and is not read") from error
        except Exception as error:  # the readers raise whatever damaged bytes lead them to
            raise self._damaged(error) from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.kind} {self.path} holds a {type(content).__name__}, expected tensors by name")
        others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(f"{self.kind} {self.path} holds more than tensors by name: {name_some(others)}")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in content.items()}
        return content

    def _damaged(self, error: Exception) -> OSError:
        reason = first_line(error)
        return OSError(f"{self.kind} {self.path} cannot be read, it may be truncated or damaged ({reason}).")

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; its data stay in the file until they are looked at."""
        if isinstance(self._content, dict):
            return self._content[name]
        try:
            return self._content.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_error) -> None:
        self._content = {}


class WeightFiles:
    """
    The tensors of a checkpoint, in one or more files.

    Args:
        path: a folder with safetensors or pickles, with an index or in one file; or one such file.
        kind: what to call a file in an error.

    Attributes:
        path: as given.
        files: the files, in the order in which they are read.
        shapes: name to shape of every tensor.

    Raises:
        OSError: there are no weights, or a file is absent, truncated or damaged.
        ValueError: the index is no index, a tensor stands in two files or not where the index says, or a file holds
            anything but tensors.
    """

    def __init__(self, path: str | os.PathLike, kind: str = "weight file"):
        self.path = Path(path)
        self.kind = kind
        folder = self.path
        index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
        weight_map = {} if index is None else read_weight_map(index, needed=("weight_map",))
        if index is not None:
            self.files = [folder / name for name in sorted(set(weight_map.values()))]
            absent = [file.name for file in self.files if not file.is_file()]
            if absent:
                raise FileNotFoundError(f"{index} names {name_some(absent)}, which the folder does not hold")
        elif folder.is_dir():
            self.files = [folder / name for name in SINGLE_FILES if (folder / name).is_file()][:1]
        else:
            self.files = [folder]
        if not self.files:
            expected = " or ".join((*INDEX_FILES, *SINGLE_FILES))
            raise FileNotFoundError(f"the folder {folder} holds no weights, expected {expected}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Path] = {}
        for file in self.files:
            self._scan(file)
        for name, file in weight_map.items():
            if self._places.get(name) != folder / file:
                raise ValueError(f"{index} says that {name} stands in {file}, but it does not")

    def _scan(self, file: Path) -> None:
        with TensorFile(file, self.kind) as tensors:
            for name, shape in tensors.shapes.items():
                if name in self.shapes:
                    raise ValueError(f"{name} stands in both {self._places[name]} and {file.name}")
                self.shapes[name] = shape
                self._places[name] = file

    def dtype_of(self, name: str) -> torch.dtype:
        """Data type of one tensor."""
        with TensorFile(self._places[name], self.kind) as tensors:
            return tensors[name].dtype

    def by_file(self) -> Iterator[TensorFile]:
        """The files one after another, each closed before the next is opened."""
        for file in self.files:
            with TensorFile(file, self.kind) as tensors:
                yield tensors


def resolve_folder(source: str | os.PathLike, kind: str, weights: bool = True) -> Path:
    """
    A local folder as it is, or a Hub repository, downloaded.

    Args:
        source: folder or Hub id.
        kind: what to call it in an error.
        weights: whether the weights are wanted too.

    Raises:
        OSError: it is a file, or neither a folder nor a repository that can be reached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"the {kind} {source} is a file, expected a folder or a Hub id")
    try:
        wanted = [*SMALL_FILES, "*.safetensors"] if weights else [*SMALL_FILES]
        folder = Path(snapshot_download(str(source), allow_patterns=wanted))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    except HFValidationError as error:
        raise FileNotFoundError(f"the {kind} {source} is neither a folder nor a Hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(
            f"the {kind} {source} is no folder, and it could not be fetched from the Hub ({first_line(error)})"
        ) from error
    return folder
