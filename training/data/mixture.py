"""Several sources of data as one, with sampling weights, drawn anew in each epoch, and a policy for what is broken."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from uground.processing.image_reading import read_image

logger = logging.get_logger(__name__)

BAD_SAMPLE_POLICIES = ("fail", "skip")
# So many bad samples in a row are no accident.
TRIES = 20


class Mixture:
    """
    Items of several sources.

    Each epoch takes of every source the share that its weight says. A source that is asked for fewer items than it
    has goes on in the next epoch where it stopped; one that is asked for more begins anew, in another order. What an
    epoch holds depends on the seed and the epoch only.

    Args:
        sources: sequences of items for the collator, `{"image", "examples"}` or an example each; they raise `OSError`
            or `ValueError` for an item that is broken.
        weights: share of each source, in any unit; by default its length.
        epoch_size: items per epoch; by default as many as the sources have together.
        seed: of the order.
        on_bad_sample: `"fail"` at a broken item, or `"skip"`: log it, count it and take the source's next one.
        check: raises `OSError` or `ValueError` for an item that a batch cannot hold, as `GroundingCollator.check`
            does; asked only where such an item can still be skipped.

    Raises:
        ValueError: an argument does not fit; see the sentence.
    """

    def __init__(
        self,
        sources: Sequence,
        weights: Sequence[float] | None = None,
        epoch_size: int | None = None,
        seed: int = 0,
        on_bad_sample: str = "fail",
        check: Callable[[dict], None] | None = None,
    ):
        weights = [float(len(source)) for source in sources] if weights is None else list(weights)
        if len(weights) != len(sources) or not sources:
            raise ValueError(f"one weight per source is needed: expected {len(sources)}, got {len(weights)}")
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights of sources must be at least 0 and not all 0, got {weights}")
        if on_bad_sample not in BAD_SAMPLE_POLICIES:
            raise ValueError(f"on_bad_sample must be one of {BAD_SAMPLE_POLICIES}, got {on_bad_sample!r}")
        self.sources, self.seed, self.on_bad_sample = list(sources), seed, on_bad_sample
        self.check = check if on_bad_sample == "skip" else None
        self.size = sum(map(len, sources)) if epoch_size is None else epoch_size
        if self.size < 1:
            raise ValueError(f"an epoch must hold at least 1 item, got {self.size}")
        self._counts = _apportion(np.asarray(weights) / sum(weights), self.size)
        # Workers are processes: what they find, and which epoch it is, is shared.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._skipped = torch.zeros(1, dtype=torch.long).share_memory_()
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    def __deepcopy__(self, memo):
        # A dataset copies its transform; all copies must hear of the epoch.
        return self

    def __len__(self) -> int:
        return self.size

    @property
    def skipped(self) -> int:
        """How many broken items were skipped so far by the workers of this process."""
        return int(self._skipped)

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch begins."""
        self._epoch.fill_(epoch)

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and item `(size,)` of each place in an epoch."""
        parts = []
        for number, (source, count) in enumerate(zip(self.sources, self._counts, strict=True)):
            places = np.arange(epoch * count, (epoch + 1) * count)
            rounds = places // max(1, len(source))
            items = np.empty(count, dtype=np.int64)
            for turn in np.unique(rounds):
                order = np.random.default_rng([self.seed, number, turn]).permutation(len(source))
                items[rounds == turn] = order[places[rounds == turn] % len(source)]
            parts.append((np.full(count, number), items))
        order = np.random.default_rng([self.seed, len(self.sources), epoch]).permutation(self.size)
        return np.concatenate([part[0] for part in parts])[order], np.concatenate([part[1] for part in parts])[order]

    def __getitem__(self, index: int) -> dict:
        """The item at a place of the current epoch, its image read."""
        epoch = int(self._epoch)
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, *self.plan(epoch))
        source, item = self.sources[self._plan[1][index]], int(self._plan[2][index])
        for attempt in range(TRIES):
            try:
                return self._read(source, (item + attempt) % len(source))
            except (OSError, ValueError) as error:
                if self.on_bad_sample == "fail":
                    raise
                self._skipped += 1
                logger.warning(f"a bad sample is skipped: {error}")
                last = error
        raise ValueError(f"{TRIES} samples in a row are bad, the last one because: {last}")

    def _read(self, source, item: int) -> dict:
        found = dict(source[item])
        found["image"] = read_image(found["image"], f"the image of {found.get('id', f'item {item}')}")
        if self.check is not None:
            self.check(found)
        return found

    def __call__(self, rows: dict) -> dict:
        """As a transform of a `datasets.Dataset` of places."""
        found = [self[index] for index in rows["index"]]
        return {
            "image": [item["image"] for item in found],
            "examples": [item["examples"] if item.get("examples") else [item] for item in found],
        }

    def dataset(self) -> Dataset:
        """The mixture as the trainer takes it."""
        return Dataset.from_dict({"index": list(range(self.size))}).with_transform(self)


class MixtureEpochs(TrainerCallback):
    """Tells a mixture which epoch begins."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run begins in the middle of an epoch; the margin is for rounding.
        self.mixture.set_epoch(int((state.epoch or 0.0) + 1e-6))


def _apportion(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `total` (largest remainders)."""
    exact = shares * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return counts.tolist()
