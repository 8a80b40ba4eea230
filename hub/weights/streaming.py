"""From the tensors of several checkpoints to those of one model, one tensor at a time.

Both commands that build a checkpoint say what comes from where; that it is complete, fits and gets written is seen to
here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from uground.hub.weights.checkpoint_writer import ShardWriter
from uground.hub.weights.weight_files import TensorFile, WeightFiles, name_some


@dataclass(frozen=True)
class Target:
    """
    Where a source tensor goes.

    Attributes:
        name: in the model's state dict.
        shape: that the source tensor must have; `None` for any.
        change: what is done to it, after it has the dtype of the checkpoint to be.
    """

    name: str
    shape: tuple[int, ...] | None
    change: Callable[[Tensor], Tensor] | None = None


@dataclass
class Part:
    """
    The part of a model that comes from one checkpoint.

    Attributes:
        title: what to call the checkpoint in a sentence.
        weights: its files.
        rename: name in the files to the name used in `targets`; `None` for what is known to be of no use.
        targets: of every tensor that is needed.
    """

    title: str
    weights: WeightFiles
    rename: Callable[[str], str | None]
    targets: Mapping[str, Target]

    def check(self) -> None:
        """
        Compare what is there with what is needed, without reading any data.

        Raises:
            ValueError: tensors are missing, unexpected or of the wrong shape; the sentence names them.
        """
        found = {}
        for name, shape in self.weights.shapes.items():
            key = self.rename(name)
            if key is not None:
                found[key] = (name, shape)
        problems = []
        if missing := self.targets.keys() - found.keys():
            problems.append(f"missing {name_some(missing)}")
        if unexpected := found.keys() - self.targets.keys():
            problems.append(f"unexpected {name_some(found[key][0] for key in unexpected)}")
        misshapen = [
            f"{name} {shape} instead of {self.targets[key].shape}"
            for key, (name, shape) in found.items()
            if key in self.targets and self.targets[key].shape not in (None, shape)
        ]
        if misshapen:
            problems.append(f"wrong shape of {name_some(misshapen)}")
        if problems:
            raise ValueError(f"{self.title} does not make up a UGround: {'; '.join(problems)}")

    def write(self, writer: ShardWriter, dtype: torch.dtype, progress: tqdm) -> None:
        """Stream the tensors to a writer, file by file, so that only one file is mapped at a time."""
        for tensors in self.weights.by_file():
            for name in tensors:
                self._write_tensor(writer, tensors, name, dtype, progress)
            writer.let_go()

    def _write_tensor(self, writer: ShardWriter, tensors: TensorFile, name: str, dtype, progress: tqdm) -> None:
        key = self.rename(name)
        if key is None:
            return
        target = self.targets[key]
        tensor = tensors[name].to(dtype)
        if target.change is not None:
            tensor = target.change(tensor)
        writer.add(target.name, tensor)
        progress.update(tensor.nbytes)


def write_weights(
    folder: Path, parts: list[Part], new_tensors: Mapping[str, Tensor], dtype: torch.dtype, num_bytes: int
) -> None:
    """
    Write the weights of a model to a folder, with a progress bar.

    Args:
        folder: where to.
        parts: checked.
        new_tensors: by name in the model, for what comes from no checkpoint.
        dtype: of all floating tensors that come from a checkpoint.
        num_bytes: of the whole, for the progress bar.
    """
    writer = ShardWriter(folder)
    for name, tensor in new_tensors.items():
        writer.add(name, tensor)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Writing", disable=None) as progress:
        for part in parts:
            part.write(writer, dtype, progress)
    writer.finish()
