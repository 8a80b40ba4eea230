"""What a scene is made of and how it is drawn: kinds, colours, sizes, textures, backgrounds, visible masks.

A scene is drawn from one `numpy.random.Generator` and nothing else, so equal generators give equal pixels. Objects
are painted one after another; the mask of an object is what is still visible of it once all are painted.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 32, 38),
    "green": (38, 152, 58),
    "blue": (32, 84, 208),
    "yellow": (248, 220, 40),
    "orange": (244, 130, 16),
    "purple": (138, 50, 172),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}
SIZES = {"small": (38, 52), "large": (78, 108)}  # longest extent in pixels; the gap between the two is never used
TEXTURES = ("plain", "striped", "dotted")
TEXTURE_WEIGHTS = (0.5, 0.25, 0.25)
GEOMETRIC = ("circle", "square", "triangle", "star", "cross", "ring")  # what a query calls a "shape"
THINGS = ("tree", "house", "boat", "fish", "key", "cup", "car", "umbrella")
KINDS = GEOMETRIC + THINGS

IMAGE_SIZES = ((256, 256), (256, 208), (208, 256), (256, 192), (192, 256), (224, 256))  # width, height
OBJECT_COUNTS, OBJECT_COUNT_WEIGHTS = (2, 3, 4, 5), (0.12, 0.3, 0.33, 0.25)
MAX_LARGE = 3
MIN_VISIBLE_PIXELS = 250
MIN_VISIBLE_SHARE = 0.6
SUPERSAMPLING = 2
DARK, LIGHT = -0.42, 0.5  # tones of details: share of the way to black or to white
TEXTURE_TONE = 0.42


@dataclass(frozen=True)
class SceneObject:
    """One object. `mask` (H, W) bool holds its visible pixels; `extent` is its drawn longest side in pixels."""

    kind: str
    colour: str
    size: str
    texture: str
    extent: float
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Visible box (x0, y0, x1, y1) in pixels, the far edges exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the visible box, in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `image` is RGB, `objects` are in painting order (the last one lies on top)."""

    image: Image.Image
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class ObjectPlan:
    """An object that is decided but not yet painted. `position` is a wished (x, y) centre in pixels, or None."""

    kind: str
    colour: str
    size: str
    texture: str
    extent: float
    position: tuple[float, float] | None = None


class Pen:
    """Draws polygons of the unit frame (x right, y down, longest side -1..1) as a silhouette and a tone layer."""

    def __init__(self, side: int, scale: float, angle: float, flip: bool):
        self.side, self.scale = side, scale
        cos, sin = math.cos(angle), math.sin(angle)
        mirror = -1.0 if flip else 1.0
        self.matrix = (cos * mirror, -sin, sin * mirror, cos)
        self.silhouette = Image.new("L", (side, side), 0)
        self.tones = Image.new("L", (side, side), 128)
        self._shape, self._tone = ImageDraw.Draw(self.silhouette), ImageDraw.Draw(self.tones)

    def _place(self, points) -> list[tuple[float, float]]:
        a, b, c, d = self.matrix
        half = self.side / 2
        return [(half + self.scale * (a * x + b * y), half + self.scale * (c * x + d * y)) for x, y in points]

    def polygon(self, *points: Any, tone: float = 0.0) -> None:
        placed = self._place(points)
        self._shape.polygon(placed, fill=255)
        self._tone.polygon(placed, fill=round(128 + 127 * tone))

    def ellipse(self, x: float, y: float, rx: float, ry: float, tone: float = 0.0) -> None:
        self.polygon(*arc(x, y, rx, ry), tone=tone)

    def box(self, x0: float, y0: float, x1: float, y1: float, tone: float = 0.0) -> None:
        self.polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1), tone=tone)

    def hole(self, x: float, y: float, rx: float, ry: float) -> None:
        self._shape.polygon(self._place(arc(x, y, rx, ry)), fill=0)


def arc(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0, steps: int = 28) -> None:
    """Points of an elliptic arc around (x, y); angles in degrees, 0 to the right, 90 downwards."""
    angles = np.radians(np.linspace(start, end, steps))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _circle(pen: Pen):
    pen.ellipse(0, 0, 1, 1)


def _square(pen: Pen):
    pen.box(-0.9, -0.9, 0.9, 0.9)


def _triangle(pen: Pen):
    pen.polygon((0, -0.95), (1, 0.8), (-1, 0.8))


def _star(pen: Pen):
    turns = [-90 + 36 * i for i in range(10)]
    radii = [1.0, 0.42] * 5
    pen.polygon(
        *[(r * math.cos(math.radians(t)), r * math.sin(math.radians(t))) for t, r in zip(turns, radii, strict=True)]
    )


def _cross(pen: Pen):
    pen.box(-0.95, -0.33, 0.95, 0.33)
    pen.box(-0.33, -0.95, 0.33, 0.95)


def _ring(pen: Pen):
    pen.ellipse(0, 0, 1, 1)
    pen.hole(0, 0, 0.55, 0.55)


def _tree(pen: Pen):
    pen.box(-0.17, 0.2, 0.17, 1.0, tone=DARK)
    for x, y, radius in ((-0.36, 0.02, 0.42), (0.36, 0.02, 0.42), (-0.22, -0.42, 0.42), (0.22, -0.42, 0.42)):
        pen.ellipse(x, y, radius, radius)
    pen.ellipse(0, -0.62, 0.38, 0.38)
    pen.ellipse(0, -0.1, 0.4, 0.4)


def _house(pen: Pen):
    pen.box(0.38, -0.9, 0.62, -0.2, tone=DARK)
    pen.box(-0.76, -0.1, 0.76, 0.95)
    pen.polygon((0, -0.98), (1, -0.06), (-1, -0.06), tone=DARK)
    pen.box(-0.5, 0.2, -0.14, 0.52, tone=LIGHT)
    pen.box(0.14, 0.3, 0.52, 0.95, tone=DARK)


def _boat(pen: Pen):
    pen.box(-0.08, -0.95, 0.06, 0.4, tone=DARK)
    pen.polygon((0.12, -0.9), (0.86, 0.22), (0.12, 0.22), tone=LIGHT)
    pen.polygon((-0.14, -0.7), (-0.14, 0.22), (-0.74, 0.22), tone=LIGHT)
    pen.polygon((-1, 0.32), (1, 0.32), (0.62, 0.86), (-0.62, 0.86))


def _fish(pen: Pen):
    pen.polygon((-0.35, 0.0), (-1, -0.56), (-0.82, 0.0), (-1, 0.56), tone=DARK)
    pen.polygon((-0.1, -0.35), (0.15, -0.72), (0.4, -0.3), tone=DARK)
    pen.ellipse(0.22, 0, 0.78, 0.5)
    pen.ellipse(0.62, -0.12, 0.12, 0.12, tone=0.95)
    pen.ellipse(0.65, -0.12, 0.06, 0.06, tone=-0.95)


def _key(pen: Pen):
    pen.ellipse(-0.52, 0, 0.48, 0.48)
    pen.box(-0.15, -0.16, 1.0, 0.16)
    pen.box(0.36, 0.1, 0.58, 0.46)
    pen.box(0.76, 0.1, 1.0, 0.54)
    pen.hole(-0.54, 0, 0.22, 0.22)


def _cup(pen: Pen):
    pen.ellipse(0.6, -0.05, 0.4, 0.42, tone=DARK)
    pen.hole(0.6, -0.05, 0.19, 0.21)
    pen.polygon((-0.92, -0.7), (0.6, -0.7), (0.44, 0.72), (-0.76, 0.72))
    pen.ellipse(-0.16, -0.7, 0.76, 0.17, tone=DARK)


def _car(pen: Pen):
    pen.polygon((-0.62, -0.02), (-0.38, -0.5), (0.36, -0.5), (0.66, -0.02))
    pen.polygon((-1, 0.0), (0.8, -0.06), (1, 0.08), (1, 0.4), (-1, 0.4))
    pen.polygon((-0.46, -0.04), (-0.3, -0.38), (-0.05, -0.38), (-0.05, -0.04), tone=LIGHT)
    pen.polygon((0.06, -0.04), (0.06, -0.38), (0.29, -0.38), (0.5, -0.04), tone=LIGHT)
    for x in (-0.54, 0.54):
        pen.ellipse(x, 0.38, 0.26, 0.26, tone=-0.75)
        pen.ellipse(x, 0.38, 0.1, 0.1, tone=LIGHT)


def _umbrella(pen: Pen):
    pen.box(-0.08, -0.1, 0.08, 0.72, tone=DARK)
    pen.polygon(*arc(0.24, 0.68, 0.32, 0.3, 0, 180, 14), *arc(0.24, 0.68, 0.15, 0.14, 180, 0, 14), tone=DARK)
    canopy = arc(0, 0.02, 1, 0.96, 180, 360)
    for x in (0.67, 0.0, -0.67):
        canopy += arc(x, 0.02, 0.33, 0.2, 0, -180, 10)
    pen.polygon(*canopy)
    for x in (-0.335, 0.335):
        pen.polygon((0, -0.9), (x - 0.04, -0.02), (x + 0.04, -0.02), tone=DARK)


OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "tree": _tree,
    "house": _house,
    "boat": _boat,
    "fish": _fish,
    "key": _key,
    "cup": _cup,
    "car": _car,
    "umbrella": _umbrella,
}


def _texture_tone(rng: np.random.Generator, texture: str, side: int, extent: float) -> np.ndarray:
    """(side, side) float32 in 0..1: where the second tone of a textured object goes."""
    if texture == "plain":
        return np.zeros((side, side), np.float32)
    turn = rng.uniform(0, math.pi)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    u = x * math.cos(turn) + y * math.sin(turn)
    if texture == "striped":
        period = max(9.0, 0.17 * extent)
        return np.clip(0.5 + 2.5 * np.sin(u * (2 * math.pi / period)), 0, 1)
    period = max(10.0, 0.19 * extent)
    v = y * math.cos(turn) - x * math.sin(turn)
    du, dv = (u % period) - period / 2, (v % period) - period / 2
    return np.clip(0.32 * period + 0.5 - np.sqrt(du * du + dv * dv), 0, 1)


def object_patch(rng: np.random.Generator, plan: ObjectPlan) -> tuple[np.ndarray, np.ndarray]:
    """Draws one object on its own patch: pixels (s, s, 3) float32 in 0..255 and coverage (s, s) float32 in 0..1."""
    side = 2 * math.ceil(plan.extent * 0.66) + 4
    pen = Pen(
        side * SUPERSAMPLING,
        plan.extent * SUPERSAMPLING / 2,
        math.radians(rng.uniform(-12, 12)),
        bool(rng.random() < 0.5),
    )
    OUTLINES[plan.kind](pen)
    coverage = np.asarray(pen.silhouette.reduce(SUPERSAMPLING), np.float32) / 255
    tone = (np.asarray(pen.tones.reduce(SUPERSAMPLING), np.float32) - 128) / 127
    second = _texture_tone(rng, plan.texture, side, plan.extent) * TEXTURE_TONE
    # Light colours get a darker second tone, dark ones a lighter one, so the texture shows on all of them.
    base = np.array(COLOURS[plan.colour], np.float32)
    light = base @ np.array([0.3, 0.59, 0.11], np.float32) > 125
    tone = np.where(np.abs(tone) > 0.02, tone, -second if light else second)
    # Black can only get lighter and white darker; weaker tones keep both away from the grey of the ground.
    if plan.colour == "black":
        tone = 0.75 * np.abs(tone)
    elif plan.colour == "white":
        tone = -0.7 * np.abs(tone)
    inner = np.minimum.reduce([np.roll(coverage, shift, axis) for shift in (-1, 1) for axis in (0, 1)])
    tone = tone + (0.3 if plan.colour == "black" else -0.3) * (coverage - inner)  # a rim parts equal colours
    base = base + rng.uniform(-9, 9, 3).astype(np.float32)
    amount = np.minimum(np.abs(tone), 1)[..., None]
    pixels = base * (1 - amount) + np.where(tone > 0, 255.0, 0.0)[..., None] * amount
    return np.clip(pixels, 0, 255).astype(np.float32), coverage


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A muted low-contrast ground: (height, width, 3) float32 in 0..255."""
    tone = rng.uniform(128, 188) + rng.uniform(-9, 9, 3)
    strength = rng.uniform(5, 13)
    style = rng.integers(4)
    if style == 0:  # a slow gradient
        turn = rng.uniform(0, 2 * math.pi)
        x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
        pattern = 1.6 * (x * math.cos(turn) + y * math.sin(turn))
    elif style == 1:  # soft clouds
        cells = rng.normal(0, 1, (int(rng.integers(5, 16)),) * 2).astype(np.float32)
        pattern = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR))
    else:  # checks or stripes
        period = int(rng.integers(10, 34))
        columns, rows = np.arange(width) // period % 2, (np.arange(height) // period % 2)[:, None]
        pattern = (
            (columns ^ rows)
            if style == 2
            else np.broadcast_to(rows if rng.random() < 0.5 else columns, (height, width))
        )
        pattern = pattern * 1.4 - 0.7
    grain = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(1, 4))
    ground = (pattern * strength).astype(np.float32) + grain
    return ground[..., None] + tone.astype(np.float32)


def _paste(canvas: np.ndarray, patch: np.ndarray, coverage: np.ndarray, left: int, top: int) -> np.ndarray:
    """Paints a patch whose ink lies inside the canvas; returns the (H, W) bool silhouette."""
    height, width = canvas.shape[:2]
    side = coverage.shape[0]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = coverage[inside][..., None]
    canvas[y0:y1, x0:x1] += alpha * (patch[inside] - canvas[y0:y1, x0:x1])
    silhouette = np.zeros((height, width), bool)
    silhouette[y0:y1, x0:x1] = coverage[inside] >= 0.5
    return silhouette


def _ink_box(coverage: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _find_place(rng, plan: ObjectPlan, coverage, painted, width: int, height: int) -> tuple[int, int] | None:
    """A (left, top) for the patch that leaves every painted object visible enough, or None where no try gave one."""
    x0, y0, x1, y1 = _ink_box(coverage)
    ink = coverage[y0:y1, x0:x1] >= 0.5
    free_x, free_y = width - (x1 - x0), height - (y1 - y0)
    if min(free_x, free_y) < 0 or ink.sum() < MIN_VISIBLE_PIXELS:
        return None
    # Little overlap where there is room for it, then as much as is allowed; a wished place gets one try.
    shares = [0.9] * 12 + [MIN_VISIBLE_SHARE] * 12 if plan.position is None else [MIN_VISIBLE_SHARE]
    for share in shares:
        if plan.position is None:
            left, top = int(rng.integers(free_x + 1)), int(rng.integers(free_y + 1))
        else:
            left = int(np.clip(plan.position[0] - (x1 - x0) / 2, 0, free_x))
            top = int(np.clip(plan.position[1] - (y1 - y0) / 2, 0, free_y))
        window = np.s_[top : top + y1 - y0, left : left + x1 - x0]
        if all(
            np.count_nonzero(visible) - np.count_nonzero(visible[window] & ink)
            >= max(MIN_VISIBLE_PIXELS, share * whole)
            for _, visible, whole in painted
        ):
            return left - x0, top - y0
    return None


def paint(rng: np.random.Generator, plans: Collection[ObjectPlan], width: int, height: int) -> Scene:
    """Paints the planned objects in order; one that finds no place where the others stay visible is left out."""
    canvas = background(rng, width, height)
    painted: list[tuple[ObjectPlan, np.ndarray, int]] = []  # plan, visible mask, whole area
    for plan in plans:
        patch, coverage = object_patch(rng, plan)
        place = _find_place(rng, plan, coverage, painted, width, height)
        if place is None:
            continue
        silhouette = _paste(canvas, patch, coverage, *place)
        for _, mask, _ in painted:
            mask &= ~silhouette
        painted.append((plan, silhouette, int(silhouette.sum())))
    image = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    return Scene(
        image, tuple(SceneObject(p.kind, p.colour, p.size, p.texture, p.extent, mask) for p, mask, _ in painted)
    )


def choose(rng: np.random.Generator, items: Sequence, weights: Sequence[float] | None = None) -> Any:
    """One of `items`; a plain-Python pick, many times faster than `Generator.choice` on short lists."""
    if weights is None:
        return items[int(rng.integers(len(items)))]
    return items[min(int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights))), len(items) - 1)]


def plan_objects(
    rng: np.random.Generator, pairs: Collection[tuple[str, str]], favoured: Collection[tuple[str, str]] = ()
) -> list[ObjectPlan]:
    """Decides 2 to 5 objects, no two alike in (kind, colour, size, texture), at least one of a kind of its own.

    pairs: the (colour, kind) combinations that may appear. favoured: a subset that is chosen from more often (the
    held-out combinations of an evaluation split). Objects often share a kind or a colour, so that one word is seldom
    enough to tell them apart.
    """
    pairs, favoured = sorted(pairs), sorted(favoured)
    count = choose(rng, OBJECT_COUNTS, OBJECT_COUNT_WEIGHTS)
    plans: list[ObjectPlan] = []
    while len(plans) < count:
        options = favoured if favoured and rng.random() < 0.25 else pairs
        if plans and (likeness := rng.random()) < 0.6:
            model = plans[int(rng.integers(len(plans)))]
            options = [
                (colour, kind)
                for colour, kind in pairs
                if (kind == model.kind if likeness < 0.3 else colour == model.colour)
            ]
        colour, kind = choose(rng, options)
        many_large = sum(plan.size == "large" for plan in plans) >= MAX_LARGE
        size = "small" if many_large or rng.random() < 0.5 else "large"
        texture = choose(rng, TEXTURES, TEXTURE_WEIGHTS)
        low, high = SIZES[size]
        if kind in ("key", "umbrella") and size == "small":
            low = 46  # thin silhouettes: below this too few pixels are left
        plan = ObjectPlan(kind, colour, size, texture, float(rng.uniform(low, high)))
        kinds = [other.kind for other in plans] + [kind]
        alike = any(other[:4] == (kind, colour, size, texture) for other in map(_traits, plans))
        lonely = any(kinds.count(name) == 1 for name in kinds)
        if not alike and (lonely or len(kinds) < 2):
            plans.append(plan)
    return plans


def _traits(plan: ObjectPlan) -> tuple[str, str, str, str]:
    return plan.kind, plan.colour, plan.size, plan.texture


def draw_scene(
    rng: np.random.Generator, pairs: Collection[tuple[str, str]], favoured: Collection[tuple[str, str]] = ()
) -> Scene:
    """Draws a random scene with at least two objects, one of them the only one of its kind."""
    while True:
        width, height = choose(rng, IMAGE_SIZES)
        plans = sorted(
            plan_objects(rng, pairs, favoured), key=lambda plan: plan.size
        )  # "large" < "small": big ones first
        scene = paint(rng, plans, width, height)
        kinds = [item.kind for item in scene.objects]
        if len(kinds) >= 2 and any(kinds.count(kind) == 1 for kind in kinds):
            return scene
