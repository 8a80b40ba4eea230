"""What a trainer logs between two logs: sums over micro-batches and processes, divided once."""

import torch
from accelerate import Accelerator


class RunningMeans:
    """
    Means of named quantities, exact for any layout of the data in micro-batches and processes.

    Args:
        denominators: name of a quantity to the name of what its sum is divided by, which is itself added up.
    """

    def __init__(self, denominators: dict[str, str]):
        self.denominators = denominators
        self._names = [*denominators, *sorted(set(denominators.values()))]
        self._sums: torch.Tensor | None = None

    def add(self, sums: dict[str, torch.Tensor | float], device: torch.device | str) -> None:
        """Add a micro-batch's sums; a name that is left out adds nothing. Nothing waits for the device."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        added = torch.stack([zero + _detached(sums.get(name, 0.0)) for name in self._names])
        self._sums = added if self._sums is None else self._sums + added

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Means over all that was added on all processes since the last call; without an entry where nothing was.

        Every process must call it.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self._names), dtype=torch.float64, device=accelerator.device)
        self._sums = None
        totals = dict(zip(self._names, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        return {name: totals[name] / totals[by] for name, by in self.denominators.items() if totals[by] > 0}


def _detached(value):
    return value.detach().double() if isinstance(value, torch.Tensor) else value
