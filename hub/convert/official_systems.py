"""The released systems of the LISA family: what each was made with that stands in no checkpoint.

READ and SESAME checkpoints hold the same tensors and nothing in them tells which is which, nor how READ picks its
points, so the system is said by name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from uground.hub.convert.official_names import (
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
    """

    title: str
    frame: str
    grid_side: int = CLIP_GRID
    prompts: tuple[str, ...] = ("embedding",)
    has_policy: bool = False
    projector_layers: int = 2

    @property
    def projector_weight(self) -> str:
        """The first layer of the projector, which takes what the vision tower gives."""
        return f"{PROJECTOR}.0.weight" if self.projector_layers == 2 else f"{PROJECTOR}.weight"

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


def find_system(
    source: str, shapes: Mapping[str, tuple], name: str | None, tokens: Collection[str] = ()
) -> OfficialSystem:
    """
    The system that a checkpoint is said to be; without a word a UGround, which its layer policy tells.

    Args:
        source: what to call it.
        shapes: name to shape of its tensors.
        name: a key of `SYSTEMS`, or `None`.
        tokens: of its tokenizer, as far as known.

    Raises:
        ValueError: it cannot be one of that system; the sentence says what is missing and what it looks like.
    """
    if name is not None and name not in SYSTEMS:
        raise ValueError(f"the system must be one of {', '.join(SYSTEMS)}, got {name!r}")
    system = SYSTEMS[name or "uground"]
    for required in system.required:
        if required not in shapes:
            hint = "" if name else "; name another system with --system"
            raise ValueError(
                f"{source} is no official {system.title} checkpoint, it lacks {required}{hint}; it looks like "
                f"{looks_like(shapes, tokens)}"
            )
    if not system.has_policy and GATES in shapes:
        raise ValueError(
            f"{source} is no official {system.title} checkpoint, it holds {GATES} of a layer policy; it looks like "
            "UGround"
        )
    return system


@dataclass(frozen=True)
class PointArguments:
    """
    What was said of how READ picks its points; `None` where it is to follow from the number of layers.

    Attributes:
        num_points: points per segment.
        thresholds: from where on a cell is positive, and up to where negative.
        downsample: image tokens along each axis that make one cell.
    """

    num_points: int | None = None
    thresholds: tuple[float, float] | None = None
    downsample: int | None = None

    @property
    def is_given(self) -> bool:
        return (self.num_points, self.thresholds, self.downsample) != (None, None, None)

    @property
    def is_whole(self) -> bool:
        return None not in (self.num_points, self.thresholds, self.downsample)

    def check(self, system: OfficialSystem, num_layers: int | None) -> None:
        """
        Raise a `ValueError` unless a model of the system can be made with these.

        Args:
            system: which one it is.
            num_layers: of its language model; what is not said must follow from it.
        """
        has_points = "points" in system.prompts
        if self.is_given and not has_points:
            raise ValueError(
                f"--num-points, --point-thresholds and --point-downsample are READ's, and {system.title} has no points"
            )
        for flag, value in (("--num-points", self.num_points), ("--point-downsample", self.downsample)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.downsample is not None and system.grid_side % self.downsample:
            raise ValueError(
                f"--point-downsample must divide the {system.grid_side} x {system.grid_side} token grid, "
                f"got {self.downsample}"
            )
        if self.thresholds is not None:
            high, low = self.thresholds
            if not 0.0 <= low < high <= 1.0:
                raise ValueError(
                    "--point-thresholds must be two numbers in 0..1, that of positive points above that of negative "
                    f"ones, got {high} {low}"
                )
        if has_points and not self.is_whole and isinstance(num_layers, int) and num_layers not in READ_POINTS:
            raise ValueError(
                f"how READ picks its points follows from {' or '.join(map(str, READ_POINTS))} layers, got "
                f"{num_layers}: name --num-points, --point-thresholds and --point-downsample"
            )

    def settings(self, num_layers: int) -> dict:
        """Of `UGroundConfig`, completed by what READ's code has for a language model of so many layers."""
        names = ("num_points", "point_thresholds", "point_downsample")
        given = (self.num_points, self.thresholds, self.downsample)
        usual = READ_POINTS.get(num_layers, given)
        return {
            name: mine if mine is not None else other for name, mine, other in zip(names, given, usual, strict=True)
        }
