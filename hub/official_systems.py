"""The released systems of the LISA family: what each was made with that stands in no checkpoint.

READ and SESAME checkpoints hold the same tensors and nothing in them tells which is which, nor how READ picks its
points, so the system is said by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from uground.hub.official_names import (
    EMBEDDINGS,
    GATES,
    PROJECTOR,
    SAM_PREFIX,
    looks_like,
)

CLIP_GRID, LISA_GRID = 24, 16


@dataclass(frozen=True)
class OfficialSystem:
    """
    A system whose checkpoints can be converted.

    Attributes:
        title: its name as people write it.
        frame: what its LMM sees of an image.
        grid_side: image tokens along each axis.
        prompts: of its mask decoder.
        has_policy: whether it picks layers; without, segments are read at the last one.
        projector_layers: linear layers of its projector.
        brackets: whether the image stands between `<im_start>` and `<im_end>` unless the configuration says otherwise.
    """

    title: str
    frame: str
    grid_side: int = CLIP_GRID
    prompts: tuple[str, ...] = ("embedding",)
    has_policy: bool = False
    projector_layers: int = 2
    brackets: bool = True

    @property
    def required(self) -> tuple[str, ...]:
        """Tensors without which a checkpoint is none of this system."""
        last = f"{PROJECTOR}.2.weight" if self.projector_layers == 2 else f"{PROJECTOR}.weight"
        names = (f"{SAM_PREFIX}image_encoder.pos_embed", last, EMBEDDINGS)
        return (GATES, *names) if self.has_policy else names


SYSTEMS = {
    "uground": OfficialSystem("UGround", "letterbox", prompts=("embedding", "mask"), has_policy=True),
    "read": OfficialSystem("READ", "centre_crop", prompts=("embedding", "points")),
    "sesame": OfficialSystem("SESAME", "centre_crop"),
    "lisa": OfficialSystem("LISA", "centre_crop", grid_side=LISA_GRID, projector_layers=1),
}
# Constants of READ's code by the number of layers of its language model: points, the two thresholds, and how many
# cells of the token grid become one. Of the 13B model, as it was evaluated.
READ_POINTS = {32: (30, (0.8, 0.2), 2), 40: (60, (0.6, 0.2), 1)}


def check_system(source: str, shapes: Mapping[str, tuple], system: OfficialSystem, tokens=()) -> None:
    """
    Raise a `ValueError` that says what the checkpoint looks like, unless it can be one of the system.

    Args:
        source: what to call it.
        shapes: name to shape of its tensors.
        system: which it is said to be.
        tokens: of its tokenizer, as far as known.
    """
    for name in system.required:
        if name not in shapes:
            raise ValueError(
                f"{source} is no official {system.title} checkpoint, it lacks {name}; it looks like "
                f"{looks_like(shapes, tokens)}"
            )
    if not system.has_policy and GATES in shapes:
        raise ValueError(
            f"{source} is no official {system.title} checkpoint, it holds {GATES} of a layer policy; it looks like "
            "a UGround"
        )


def read_points(num_layers: int, given: tuple | None = None) -> tuple[int, tuple[float, float], int]:
    """
    How READ picks its points.

    Args:
        num_layers: of the language model.
        given: number of points, thresholds, down-sampling; each `None` where it is to follow from `num_layers`.

    Raises:
        ValueError: one is not given, and no released model has so many layers.
    """
    given = given or (None, None, None)
    if None in given and num_layers not in READ_POINTS:
        raise ValueError(
            f"how points are picked follows from 32 or 40 layers, got {num_layers}: name --num-points, "
            "--point-thresholds and --point-downsample"
        )
    known = READ_POINTS.get(num_layers, given)
    return tuple(mine if mine is not None else usual for mine, usual in zip(given, known, strict=True))
