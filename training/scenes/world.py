"""Scenes: an endless world of drawn images with exact queries, answers and masks, made from a seed.

It stands in for the data sets that cannot be bundled: the tiny checkpoint is trained and measured on it, tests draw
from it. An example depends on (split, seed, index) only, never on how many are drawn. Splits use different random
streams, and some colour-kind combinations (`held_out`) are neither drawn nor named in training.

    python -m uground.training.scenes --preview 12 sheet.png --split test
    python -m uground.training.scenes --example examples/scene.png
"""

import argparse
from collections.abc import Collection, Iterator, Mapping
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from uground.command_line import CommandParser, run_command, seed_number
from uground.training.scenes.drawing import COLOURS, KINDS, ObjectPlan, Scene, choose, draw_scene, paint
from uground.training.scenes.queries import ATTRIBUTE_WEIGHTS, PAIR_TRIES, Grammar, Query

SPLITS = {"train": 0, "validation": 1, "test": 2}
WORD_LIMIT = 2**32  # a larger seed or index would be split in two words and could meet another stream
ATTRIBUTE_TRIES = 40

Attributes = Collection[str] | Mapping[str, float] | None


def held_out(split: str) -> frozenset[tuple[str, str]]:
    """The (colour, kind) combinations that only this evaluation split contains; empty for "train".

    One colour of each kind is held out, 14 of 112 combinations: colour number c with kind number k where
    (c + 3k) mod 8 = 6. Kinds of even number belong to validation, the others to test.
    """
    _check_split(split)
    parity = {"validation": 0, "test": 1}.get(split)
    return frozenset(
        (colour, kind)
        for k, kind in enumerate(KINDS)
        for c, colour in enumerate(COLOURS)
        if (c + 3 * k) % len(COLOURS) == 6 and k % 2 == parity
    )


@cache
def allowed_pairs(split: str) -> frozenset[tuple[str, str]]:
    """The (colour, kind) combinations that may be drawn and named in a split: all but those of the other splits."""
    _check_split(split)
    foreign = {pair for other in SPLITS if other != split for pair in held_out(other)}
    return frozenset((colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in foreign)


def scene(split: str, seed: int, index: int) -> Scene:
    """The drawn scene number `index` of a stream: its image and its objects with their visible masks."""
    return draw_scene(_generator(split, seed, index), allowed_pairs(split), held_out(split))


def scene_queries(
    split: str, seed: int, index: int, queries: int = 1, attributes: Attributes = None, pairs: int = 0
) -> tuple[Scene, list[Query]]:
    """A scene and `queries` different queries about it; the first n are the same for any larger number.

    pairs: how many minimal pairs the queries begin with, each of two queries; fewer where the scene has no more, or
    `queries` leaves no room. attributes, of the other queries: names to choose from (keeping the default weights among
    them) or a mapping name -> weight; None for the default mix. Returns the `Scene` and a list of `Query`, whose
    phrases hold the indices of the objects they mean.
    """
    names, weights = _attribute_mix(attributes)
    drawn = scene(split, seed, index)
    asked = _pairs(Grammar(drawn, allowed_pairs(split), _generator(split, seed, index, 0)), min(pairs, queries // 2))
    while len(asked) < queries:
        rng = _generator(split, seed, index, len(asked) + 1)
        asked.append(_ask(Grammar(drawn, allowed_pairs(split), rng), names, weights, {query.text for query in asked}))
    return drawn, asked


def _ask(grammar: Grammar, names: tuple[str, ...], weights: tuple[float, ...], taken: set[str]) -> Query:
    """A query of a random attribute; of another one where the scene has none, a repetition as the last resort."""
    repeated = None
    for _ in range(ATTRIBUTE_TRIES):
        attribute = choose(grammar.rng, names, weights)
        for _ in range(ATTRIBUTE_TRIES):
            query = grammar.query(attribute)
            if query and query.text not in taken:
                return query
            repeated = query or repeated
    assert repeated is not None, "draw_scene promises a scene about which every attribute can be asked"
    return repeated


def _pairs(grammar: Grammar, count: int) -> list[Query]:
    """Queries of `count` minimal pairs, either of a pair first, or of as many as could be found."""
    asked: list[Query] = []
    for _ in range(PAIR_TRIES if count else 0):
        pair = grammar.pair()
        if pair and not {query.text for query in pair} & {query.text for query in asked}:
            asked += pair if grammar.rng.random() < 0.5 else reversed(pair)
        if len(asked) == 2 * count:
            break
    return asked


def scene_group(
    split: str, seed: int, index: int, queries: int = 1, attributes: Attributes = None, pairs: int = 0
) -> tuple[Image.Image, list[dict]]:
    """One image and its examples in the common schema; all of them hold this same image object."""
    drawn, asked = scene_queries(split, seed, index, queries, attributes, pairs)
    examples = []
    for number, query in enumerate(asked):
        meant = [phrase for phrase in query.phrases if phrase.targets]
        masks = [np.logical_or.reduce([drawn.objects[i].mask for i in phrase.targets]) for phrase in meant]
        examples.append(
            {
                "id": f"scenes-{split}-{seed}-{index}-{number}",
                "image": drawn.image,
                "query": query.text,
                "answer": query.answer,
                "phrases": [phrase.text for phrase in meant],
                "masks": [_to_rle(mask) for mask in masks],
                "ignore": None,
                "attribute": query.attribute,
            }
        )
    return drawn.image, examples


def scene_examples(split: str, seed: int, index: int, queries: int = 1, attributes: Attributes = None) -> list[dict]:
    """The examples of scene number `index`, in the common schema."""
    return scene_group(split, seed, index, queries, attributes)[1]


def scenes(
    split: str = "train",
    count: int = 1000,
    seed: int = 0,
    queries_per_scene: int = 1,
    attributes: Attributes = None,
) -> Iterator[dict]:
    """Yields `count` examples in the common schema, `queries_per_scene` about each image (which they share).

    split: "train", "validation" or "test"; any seed gives new examples of that split. attributes: as in
    `scene_queries`. Masks are visible pixels at image size. Raises ValueError for an unknown split or attribute or a
    number out of range.
    """
    if count < 0 or queries_per_scene < 1:
        raise ValueError(
            f"count must be at least 0 and queries_per_scene at least 1, got {count} and {queries_per_scene}"
        )
    _generator(split, seed, 0)
    _attribute_mix(attributes)
    return _stream(split, count, seed, queries_per_scene, attributes)


def _stream(split: str, count: int, seed: int, queries_per_scene: int, attributes: Attributes) -> Iterator[dict]:
    for start in range(0, count, queries_per_scene):
        group = scene_examples(split, seed, start // queries_per_scene, queries_per_scene, attributes)
        yield from group[: count - start]


class SceneGroups:
    """A map-style dataset (for `torch.utils.data.DataLoader`) whose items are the example lists of one scene each."""

    def __init__(
        self,
        split: str = "train",
        scene_count: int = 1000,
        seed: int = 0,
        queries: int = 1,
        attributes: Attributes = None,
    ):
        _generator(split, seed, 0)
        _attribute_mix(attributes)
        self.split, self.scene_count, self.seed = split, scene_count, seed
        self.queries, self.attributes = queries, attributes

    def __len__(self) -> int:
        return self.scene_count

    def __getitem__(self, index: int) -> list[dict]:
        if not 0 <= index < self.scene_count:
            raise IndexError(f"scene index must be in 0..{self.scene_count - 1}, got {index}")
        return scene_examples(self.split, self.seed, index, self.queries, self.attributes)


def corpus(count: int, seed: int = 0, split: str = "train") -> Iterator[str]:
    """Yields the query and the answer of `count` examples, as text to train a tokenizer on."""
    for example in scenes(split, count, seed, queries_per_scene=8):
        yield example["query"]
        yield example["answer"]


def example_scene() -> Scene:
    """The fixed scene of examples/scene.png: one small red boat among a large blue boat, a tree, a fish and a cup."""
    plans = (
        ObjectPlan("boat", "blue", "large", "plain", 108, (84, 84)),
        ObjectPlan("tree", "green", "large", "plain", 106, (238, 84)),
        ObjectPlan("boat", "red", "small", "plain", 52, (232, 206)),
        ObjectPlan("fish", "orange", "large", "striped", 92, (80, 222)),
        ObjectPlan("cup", "red", "small", "plain", 46, (154, 160)),
    )
    return paint(np.random.default_rng(8), plans, 304, 280)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _generator(split: str, seed: int, index: int, *more: int) -> np.random.Generator:
    _check_split(split)
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < WORD_LIMIT:
            raise ValueError(f"{name} must be in 0..{WORD_LIMIT - 1}, got {value}")
    return np.random.default_rng(np.random.SeedSequence((SPLITS[split], seed, index, *more)))


def _attribute_mix(attributes: Attributes) -> tuple[tuple[str, ...], tuple[float, ...]]:
    mix = ATTRIBUTE_WEIGHTS if attributes is None else attributes
    if not isinstance(mix, Mapping):
        mix = {name: ATTRIBUTE_WEIGHTS.get(name, 0.0) for name in mix}
    unknown = sorted(set(mix) - set(ATTRIBUTE_WEIGHTS))
    if unknown or isinstance(attributes, str):
        raise ValueError(f"attributes must be a list from {', '.join(ATTRIBUTE_WEIGHTS)}, got {attributes!r}")
    if not sum(mix.values()) > 0 or min(mix.values()) < 0:
        raise ValueError(f"attribute weights must be at least 0 and not all 0, got {dict(mix)}")
    return tuple(mix), tuple(mix.values())


def _to_rle(mask: np.ndarray) -> dict:
    """COCO RLE {"size": [H, W], "counts": str} of an (H, W) bool mask."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


TINTS = ((255, 0, 200), (0, 235, 255), (160, 255, 0))  # one per mask; none of them is a colour of the world
CELL_WIDTH, TEXT_HEIGHT, SHEET_COLUMNS = 540, 84, 3


def tinted(image: Image.Image, masks: list[np.ndarray]) -> Image.Image:
    """The image in grey tones with each (H, W) bool mask laid over it in its own tint, with a contour."""
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32) * 0.75
    for mask, tint in zip(masks, TINTS, strict=False):
        padded = np.pad(mask, 1)
        inner = np.logical_and.reduce([np.roll(padded, shift, axis) for shift in (-1, 1) for axis in (0, 1)])[
            1:-1, 1:-1
        ]
        share = np.where(mask & ~inner, 1.0, np.where(mask, 0.55, 0.0))[..., None]
        grey = grey * (1 - share) + np.array(tint, np.float32) * share
    return Image.fromarray(grey.astype(np.uint8))


def preview(examples: list[dict]) -> Image.Image:
    """A contact sheet: per example the image, beside it the masks in tints, below them attribute, query and answer."""
    cell_height = 264 + TEXT_HEIGHT
    columns = min(SHEET_COLUMNS, len(examples))
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * CELL_WIDTH, rows * cell_height), (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for number, example in enumerate(examples):
        left, top = number % columns * CELL_WIDTH, number // columns * cell_height
        masks = [coco_mask.decode(rle).astype(bool) for rle in example["masks"]]
        sheet.paste(example["image"], (left + 8, top + 8))
        sheet.paste(tinted(example["image"], masks), (left + 16 + example["image"].width, top + 8))
        lines = [f"[{example['attribute']}] {example['query']}", "> " + example["answer"]]
        text = "\n".join(_wrapped(line, font, CELL_WIDTH - 16) for line in lines)
        pen.multiline_text((left + 8, top + 268), text, fill=(0, 0, 0), font=font)
    return sheet


def _wrapped(text: str, font, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m uground.training.scenes", description="Draw scenes to look at.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--preview",
        nargs=2,
        metavar=("N", "OUT.png"),
        help="write a contact sheet of N examples: image, masks, query, answer",
    )
    what.add_argument("--example", metavar="OUT.png", help="write the fixed scene of examples/scene.png")
    parser.add_argument("--split", choices=tuple(SPLITS), default="train")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--queries-per-scene", type=int, default=1, metavar="Q")
    parser.add_argument("--attributes", nargs="+", choices=tuple(ATTRIBUTE_WEIGHTS), help="only these")
    options = parser.parse_args(arguments)
    if options.preview:
        count = options.preview[0]
        if not count.isdecimal() or not 1 <= int(count) <= 300:
            parser.error(f"--preview N must be a whole number in 1..300, got {count!r}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = _parse(arguments)
    return run_command("scenes", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.preview:
        count, path = int(options.preview[0]), options.preview[1]
        drawn = scenes(options.split, count, options.seed, options.queries_per_scene, options.attributes)
        preview(list(drawn)).save(path)
    else:
        path = options.example
        example_scene().image.save(path)
    print(path)
