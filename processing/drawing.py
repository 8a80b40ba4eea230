"""Pictures for people: masks laid over an image, and the similarity maps they came from. PIL only."""

import colorsys
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Shorter panels are enlarged, so that small images and their labels can be read.
MIN_PANEL_SIDE = 384
# Of a panel of that size; larger ones have larger letters and lines, up to the greatest enlargement.
FONT_SIZE = 15
MARGIN = 8
RIM = 2
MAX_ENLARGEMENT = 5.0
TINT = 0.45
# Each hue is this far from the last around the colour circle: the golden ratio keeps any number of them apart.
HUE_STEP = 0.618034
# Low to high similarity, interpolated linearly: dark blue, teal, yellow.
HEAT = np.array([[20, 24, 82], [33, 145, 140], [253, 231, 37]], dtype=np.float32)


def draw_overlay(image: Image.Image, segments: list[dict], min_side: int = MIN_PANEL_SIDE) -> Image.Image:
    """
    Lay segments over their image: tint, contour, and a label with the score.

    Args:
        image: the image that was asked about, of any mode.
        segments: of a pipeline result: `"mask"` (PIL image of 0 and 255 in image size), `"label"`, `"score"`, `"box"`.
        min_side: the picture is enlarged until its shorter side has this many pixels.

    Returns:
        An RGB picture.

    Raises:
        ValueError: a mask does not have the size of the image.
    """
    image = image.convert("RGB")
    size = _panel_size(image.size, min_side)
    panel = image.resize(size, Image.Resampling.BICUBIC)
    masks = []
    for segment in segments:
        if segment["mask"].size != image.size:
            raise ValueError(f"a mask must have the size of its image {image.size}, got {segment['mask'].size}")
        masks.append(segment["mask"].convert("L").resize(size, Image.Resampling.BILINEAR).point(_binary))
    for number, mask in enumerate(masks):
        tint = Image.blend(panel, Image.new("RGB", size, segment_color(number)), TINT)
        panel.paste(tint, mask=mask)
    for number, mask in enumerate(masks):
        rim = RIM * _enlargement(size)
        panel.paste("white", mask=_contour(mask, 1.5 * rim))
        panel.paste(segment_color(number), mask=_contour(mask, rim))
    taken: list[tuple[int, int, int, int]] = []
    for number, (segment, mask) in enumerate(zip(segments, masks, strict=True)):
        box = mask.getbbox()
        if box is not None:
            text = f"{number + 1} {segment['label']} {segment['score']:.2f}"
            _write_label(panel, (box[0], box[1]), text, segment_color(number), taken)
    return panel


def draw_similarity(
    image: Image.Image,
    similarity_map: np.ndarray | torch.Tensor,
    min_side: int = MIN_PANEL_SIDE,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """
    Show a similarity map as a heat map over its image, in grey.

    Args:
        image: the image that was asked about.
        similarity_map (`(h, w)`): one value per image token that sees image, rows first; any range.
        min_side: as in [`draw_overlay`].
        box: the part of the image that the map covers, x0, y0, x1, y1 in pixels; by default all of it.

    Returns:
        An RGB picture of the size [`draw_overlay`] gives the same image. A constant map is drawn as its lowest value.
    """
    size = _panel_size(image.size, min_side)
    values = np.asarray(similarity_map, dtype=np.float32)
    spread = float(values.max() - values.min())
    values = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    warmth = np.stack([np.interp(values, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    grey = image.convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    x0, y0, x1, y1 = (0, 0, *image.size) if box is None else box
    across, down = size[0] / image.width, size[1] / image.height
    place = round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down)
    covered = (place[2] - place[0], place[3] - place[1])
    heat = Image.fromarray(warmth.astype(np.uint8)).resize(covered, Image.Resampling.NEAREST)
    grey.paste(Image.blend(grey.crop(place), heat, 0.6), place)
    return grey


def draw_result(image: Image.Image, results: dict | list[dict], min_side: int = MIN_PANEL_SIDE) -> Image.Image:
    """
    One row per query: the overlay with the answer below it, and beside it the similarity map of each segment.

    Args:
        image: the image that was asked about.
        results: a result of the pipeline, or a list of them about the same image. Maps are drawn for segments that
            have one (`return_similarity=True`).
        min_side: as in [`draw_overlay`].

    Returns:
        An RGB picture.
    """
    results = [results] if isinstance(results, Mapping) else list(results)
    rows = []
    for result in results:
        segments = result["segments"]
        panels = [_with_caption(draw_overlay(image, segments, min_side), result["answer"])]
        for number, segment in enumerate(segments):
            if "similarity_map" in segment:
                panel = draw_similarity(image, segment["similarity_map"], min_side, segment.get("similarity_box"))
                caption = f"{number + 1} similarity at layer {segment['layer']}: {segment['label']}"
                panels.append(_with_caption(panel, caption, segment_color(number)))
        rows.append(_stack(panels, axis=0))
    return _stack(rows, axis=1)


def segment_color(number: int) -> tuple[int, int, int]:
    """RGB colour of the segment of this number, bright, and apart from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb((number * HUE_STEP) % 1.0, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _panel_size(size: tuple[int, int], min_side: int) -> tuple[int, int]:
    scale = max(1.0, min_side / min(size))
    return round(size[0] * scale), round(size[1] * scale)


def _binary(value: int) -> int:
    return 255 if value > 127 else 0


def _enlargement(size: tuple[int, int]) -> float:
    return min(MAX_ENLARGEMENT, max(1.0, min(size) / MIN_PANEL_SIDE))


def _contour(mask: Image.Image, radius: float) -> Image.Image:
    """Pixels nearer to the edge of a mask than `radius`: a box blur is neither 0 nor 255 there."""
    return mask.filter(ImageFilter.BoxBlur(radius)).point(_between)


def _between(value: int) -> int:
    return 255 if 0 < value < 255 else 0


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
    draw.rectangle(box, fill=color)
    draw.text((x + margin / 2, y + height / 2), text, font=font, fill=_readable_on(color), anchor="lm")


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable_on(color) -> str:
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _shorten(text: str, font, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _with_caption(panel: Image.Image, text: str, color=(255, 255, 255)) -> Image.Image:
    """A panel with a line of text in a strip below it."""
    scale = _enlargement(panel.size)
    font, margin = ImageFont.load_default(FONT_SIZE * scale), MARGIN * scale
    strip = round(FONT_SIZE * scale + 2 * margin)
    picture = Image.new("RGB", (panel.width, panel.height + strip), color)
    picture.paste(panel)
    line = _shorten(text, font, panel.width - 2 * margin)
    place = (margin, panel.height + strip / 2)
    ImageDraw.Draw(picture).text(place, line, font=font, fill=_readable_on(color), anchor="lm")
    return picture


def _stack(panels: list[Image.Image], axis: int) -> Image.Image:
    """Panels in a row (axis 0) or a column (axis 1), on white."""
    lengths = [panel.size[axis] for panel in panels]
    across = max(panel.size[1 - axis] for panel in panels)
    length = sum(lengths) + MARGIN * (len(panels) - 1)
    picture = Image.new("RGB", (length, across) if axis == 0 else (across, length), "white")
    place = 0
    for panel, side in zip(panels, lengths, strict=True):
        picture.paste(panel, (place, 0) if axis == 0 else (0, place))
        place += side + MARGIN
    return picture


__all__ = ["draw_overlay", "draw_result", "draw_similarity", "segment_color"]
