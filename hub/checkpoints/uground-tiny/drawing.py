"""Pictures for people: what was found in an image, and the maps it came from. PIL only."""

import colorsys
from bisect import bisect
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .argument_checks import check_whole

# Shorter panels are enlarged, so that small images and their labels can be read.
MIN_PANEL_SIDE = 384
# Longer ones are made smaller: a photograph of 24 megapixels is looked at on a screen all the same.
MAX_PANEL_SIDE = 1024
# Of a panel of the least size; larger ones have larger letters and lines.
FONT_SIZE = 15
MARGIN = 8
RIM = 2
# Panels of a query that stand side by side; further ones begin a new line.
PANELS_ACROSS = 4
# What is not found keeps so much of its brightness and of its colour.
DIMMED, KEPT_COLOUR = 0.45, 0.3
# Each hue is this far from the last around the colour circle: the golden ratio keeps any number of them apart.
HUE_STEP = 0.618034
# Low to high values of a map, interpolated linearly: dark blue, teal, yellow; and how much of it covers the image.
HEAT = np.array([[20, 24, 82], [33, 145, 140], [253, 231, 37]], dtype=np.float32)
HEAT_COVER = 0.6
# The variance of a probability is at most this.
MAX_UNCERTAINTY = 0.25


def draw_overlay(image: Image.Image, segments: list[dict], min_side: int = MIN_PANEL_SIDE) -> Image.Image:
    """
    Show segments in their image: each in its own colours with a contour around it and a label with its score, and
    everything else dimmed. Without any the image stays as it is.

    Args:
        image: the image that was asked about, of any mode.
        segments: of a pipeline result: `"mask"` (PIL image of 0 and 255 in image size), `"label"`, `"score"`, `"box"`.
        min_side: the picture is enlarged until its shorter side has this many pixels, but the longer one no more than
            `MAX_PANEL_SIDE`; a larger image is made smaller to that.

    Returns:
        An RGB picture.

    Raises:
        ValueError: a mask does not have the size of the image, or `min_side` is no number of pixels.
    """
    size = _panel_size(image.size, min_side)
    panel = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    masks = []
    for segment in segments:
        if segment["mask"].size != image.size:
            raise ValueError(f"a mask must have the size of its image {image.size}, got {segment['mask'].size}")
        masks.append(segment["mask"].convert("L").resize(size, Image.Resampling.BILINEAR).point(_binary))
    if any(mask.getbbox() for mask in masks):
        found = Image.new("L", size, 0)
        for mask in masks:
            found.paste(255, mask=mask)
        panel = Image.composite(panel, _dimmed(panel), found)
    line = round(_enlargement(size))
    for number, mask in enumerate(masks):
        panel.paste(segment_color(number), mask=_contour(mask, (RIM + 1) * line))
        # Nearest to the thing, which may be of the colour of its contour.
        panel.paste("white", mask=_contour(mask, line))
    taken: list[tuple[int, int, int, int]] = []
    for number, (segment, mask) in enumerate(zip(segments, masks, strict=True)):
        box = mask.getbbox()
        if box is not None:
            text = f"{number + 1} {segment['label']} {segment['score']:.2f}"
            _write_label(panel, (box[0], box[1]), text, segment_color(number), taken)
    return panel


def draw_map(
    image: Image.Image,
    values: np.ndarray | torch.Tensor,
    min_side: int = MIN_PANEL_SIDE,
    box: tuple[float, float, float, float] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Image.Image:
    """
    Show a map over its image, in grey, with a bar below that says what its colours mean.

    Args:
        image: the image that was asked about.
        values (`(h, w)`): one value per image token that sees image, or per pixel; rows first; any range.
        min_side: as in [`draw_overlay`].
        box: what the map covers, x0, y0, x1, y1 in pixels of the image; by default all of it. What lies outside of the
            image, as where the last tokens see padding, is not drawn.
        bounds: values of the ends of the bar; by default the least and the greatest of the map.

    Returns:
        An RGB picture, as wide as [`draw_overlay`] gives the same image, and higher by the bar. A constant map is
        drawn as its lowest value.
    """
    size = _panel_size(image.size, min_side)
    values = np.asarray(values, dtype=np.float32)
    low, high = (float(values.min()), float(values.max())) if bounds is None else bounds
    cells = Image.fromarray((values - low) / (high - low) if high > low else np.zeros_like(values))
    panel = image.convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    x0, y0, x1, y1 = (0, 0, *image.size) if box is None else box
    across, down = size[0] / image.width, size[1] / image.height
    place = (x0 * across, y0 * down, x1 * across, y1 * down)
    left, top, right, bottom = (round(max(0, min(side, most))) for side, most in zip(place, size * 2, strict=True))
    inside = left, top, right, bottom
    if inside[0] < inside[2] and inside[1] < inside[3]:
        # Cells of the map by the pixels of the panel: from where on it begins, and how large they are there.
        scale = (cells.width / (place[2] - place[0]), cells.height / (place[3] - place[1]))
        source = tuple((inside[side] - place[side % 2]) * scale[side % 2] for side in range(4))
        covered = (inside[2] - inside[0], inside[3] - inside[1])
        source = (max(0.0, source[0]), max(0.0, source[1]), min(cells.width, source[2]), min(cells.height, source[3]))
        # Values before colours: a map as large as a photograph has many more of them than the panel has pixels.
        heat = Image.fromarray(_heat(np.asarray(cells.resize(covered, Image.Resampling.NEAREST, box=source))))
        panel.paste(Image.blend(panel.crop(inside), heat, HEAT_COVER), inside)
    return _stack([panel, _color_bar(panel.width, low, high, _enlargement(size))], axis=1, gap=0)


def draw_similarity(
    image: Image.Image,
    similarity_map: np.ndarray | torch.Tensor,
    min_side: int = MIN_PANEL_SIDE,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """A similarity map over its image, see [`draw_map`]."""
    return draw_map(image, similarity_map, min_side, box)


def draw_result(image: Image.Image, results: dict | list[dict], min_side: int = MIN_PANEL_SIDE) -> Image.Image:
    """
    One row per query: the overlay under the query and over the answer, and beside it the maps of each segment.

    Args:
        image: the image that was asked about.
        results: a result of the pipeline, or a list of them about the same image. Similarity maps are drawn for
            segments that have one (`return_similarity=True`), and what layers disagree about (`layer_selection="mc"`).
        min_side: as in [`draw_overlay`].

    Returns:
        An RGB picture.

    Raises:
        ValueError: there is no result, or a mask does not have the size of the image.
    """
    results = [results] if isinstance(results, Mapping) else list(results)
    if not results:
        raise ValueError("there must be a result to draw, got none")
    rows = []
    for result in results:
        panels = _panels(image, result, min_side)
        lines = [_stack(panels[at : at + PANELS_ACROSS], axis=0) for at in range(0, len(panels), PANELS_ACROSS)]
        rows.append(_stack(lines, axis=1))
    return _stack(rows, axis=1)


def segment_color(number: int) -> tuple[int, int, int]:
    """RGB colour of the segment of this number, bright, and apart from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb((number * HUE_STEP) % 1.0, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _panels(image: Image.Image, result: Mapping, min_side: int) -> list[Image.Image]:
    """The overlay of a result, and the maps of its segments."""
    segments, query = result["segments"], getattr(result, "query", None)
    below = [result["answer"], *_remarks(result)]
    overlay = draw_overlay(image, segments, min_side)
    scale = _enlargement(_panel_size(image.size, min_side))
    panels = [_with_lines(overlay, [query] if query else [], below, scale)]
    last_layer = getattr(result, "last_layer", None)
    for number, segment in enumerate(segments):
        name, color = f"{number + 1} {segment['label']}", segment_color(number)
        if "similarity_map" in segment:
            layer = f"layer {segment['layer']}{'' if last_layer is None else f' of {last_layer}'}"
            panel = draw_similarity(image, segment["similarity_map"], min_side, segment.get("similarity_box"))
            panels.append(_with_lines(panel, [name], [f"similarity at {layer}"], scale, color))
        if "uncertainty" in segment:
            panel = draw_map(image, segment["uncertainty"], min_side, bounds=(0.0, MAX_UNCERTAINTY))
            said = f"variance of the mask over layers, agreement {segment['agreement']:.2f}"
            panels.append(_with_lines(panel, [name], [said], scale, color))
    return panels


def _remarks(result: Mapping) -> list[str]:
    """What cannot be seen in an overlay: what is not there, and masks without a pixel."""
    absent = getattr(result, "absent", ())
    lines = [f"not found: {', '.join(absent)}"] if absent else []
    empty = [f"{n} {one['label']}" for n, one in enumerate(result["segments"], 1) if not one["mask"].getbbox()]
    return [*lines, f"empty masks: {', '.join(empty)}"] if empty else lines


def _panel_size(size: tuple[int, int], min_side: int) -> tuple[int, int]:
    check_whole("min_side", min_side)
    scale = min(max(1.0, min_side / min(size)), max(MAX_PANEL_SIDE, min_side) / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _binary(value: int) -> int:
    return 255 if value > 127 else 0


def _enlargement(size: tuple[int, int]) -> float:
    """How many times larger than in the least panel letters and lines are, in one of this size."""
    return max(1.0, min(size) / MIN_PANEL_SIDE)


def _dimmed(panel: Image.Image) -> Image.Image:
    """A panel darker and greyer."""
    dark = Image.blend(panel.convert("L").convert("RGB"), panel, KEPT_COLOUR)
    return dark.point(lambda value: value * DIMMED)


def _contour(mask: Image.Image, width: int) -> Image.Image:
    """Pixels outside of a mask that are no further from it than `width`, so that all of its own can be seen."""
    near = mask.filter(ImageFilter.BoxBlur(width)).point(lambda value: 255 if value > 0 else 0)
    near.paste(0, mask=mask)
    return near


def _heat(values: np.ndarray) -> np.ndarray:
    """Colours of values in 0..1: `(h, w, 3)` uint8."""
    values = np.clip(values, 0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, stops, channel) for channel in HEAT.T], axis=-1).round().astype(np.uint8)


def _color_bar(width: int, low: float, high: float, scale: float) -> Image.Image:
    """The colours from low to high in a strip of white, with the values of its ends."""
    font, margin = ImageFont.load_default(FONT_SIZE * scale), round(MARGIN * scale)
    height = round(FONT_SIZE * scale)
    strip = Image.new("RGB", (width, height + 2 * margin), "white")
    pen, middle = ImageDraw.Draw(strip), strip.height / 2
    texts = [f"{value:.3g}" for value in (low, high)]
    room = [round(font.getlength(text)) + margin for text in texts]
    bar = width - sum(room) - 2 * margin
    if bar > 0:
        colors = _heat(np.linspace(0, 1, bar)[None])
        strip.paste(Image.fromarray(colors).resize((bar, height)), (margin + room[0], margin))
        pen.text((margin, middle), texts[0], font=font, fill="black", anchor="lm")
        pen.text((width - margin, middle), texts[1], font=font, fill="black", anchor="rm")
    return strip


def _write_label(panel: Image.Image, corner, text: str, color, taken: list[tuple[int, int, int, int]]) -> None:
    """Write text in a filled box above a corner, moved inside of the panel and below the labels already there."""
    draw = ImageDraw.Draw(panel)
    scale = _enlargement(panel.size)
    font, margin = ImageFont.load_default(FONT_SIZE * scale), MARGIN * scale
    text = _shorten(text, font, panel.width - margin)
    width, height = font.getlength(text) + margin, FONT_SIZE * scale + margin
    x = max(0, min(corner[0], panel.width - width))
    y = max(0, corner[1] - height)
    while any(_overlap((x, y, x + width, y + height), other) for other in taken) and y + 2 * height <= panel.height:
        y += height
    box = (x, y, x + width, y + height)
    taken.append(box)
    # The last row and column of a rectangle are painted too, and may be the thing's.
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=color)
    draw.text((x + margin / 2, y + height / 2), text, font=font, fill=_readable_on(color), anchor="lm")


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable_on(color) -> str:
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _shorten(text: str, font, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    lengths = range(1, len(text))
    return text[: bisect(lengths, width, key=lambda length: font.getlength(text[:length] + "…"))] + "…"


def _wrap(text: str, font, width: float) -> list[str]:
    """A text as lines of at most this width; a word that is longer is cut."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines, longer = [*lines, line], word
        line = longer
    return [_shorten(part, font, width) for part in (*lines, line)]


def _with_lines(
    panel: Image.Image, above: list[str], below: list[str], scale: float, color=(255, 255, 255)
) -> Image.Image:
    """A panel with texts in strips above and below it; a narrow panel stands in the middle of what they need."""
    font, margin = ImageFont.load_default(FONT_SIZE * scale), round(MARGIN * scale)
    width = max(panel.width, round(MIN_PANEL_SIDE * scale))
    strips = []
    for texts in (above, below):
        lines = [line for text in texts for line in _wrap(text, font, width - 2 * margin)]
        step = round(FONT_SIZE * scale * 1.3)
        strip = Image.new("RGB", (width, step * len(lines) + 2 * margin if lines else 0), color)
        pen = ImageDraw.Draw(strip)
        for number, line in enumerate(lines):
            place = (margin, margin + step * (number + 0.5))
            pen.text(place, line, font=font, fill=_readable_on(color), anchor="lm")
        strips.append(strip)
    middle = Image.new("RGB", (width, panel.height), color)
    middle.paste(panel, ((width - panel.width) // 2, 0))
    parts = [part for part in (strips[0], middle, strips[1]) if part.height]
    return _stack(parts, axis=1, gap=0)


def _stack(panels: list[Image.Image], axis: int, gap: int = MARGIN) -> Image.Image:
    """Panels in a row (axis 0) or a column (axis 1), on white."""
    lengths = [panel.size[axis] for panel in panels]
    across = max(panel.size[1 - axis] for panel in panels)
    length = sum(lengths) + gap * (len(panels) - 1)
    picture = Image.new("RGB", (length, across) if axis == 0 else (across, length), "white")
    place = 0
    for panel, side in zip(panels, lengths, strict=True):
        picture.paste(panel, (place, 0) if axis == 0 else (0, place))
        place += side + gap
    return picture


__all__ = ["draw_map", "draw_overlay", "draw_result", "draw_similarity", "segment_color"]
