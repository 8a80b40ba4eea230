"""Overlays and maps: right pixels in right colours, right sizes, whatever the image and the number of segments."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from uground.processing import GroundingResult, drawing
from uground.processing.drawing import (
    HEAT,
    HEAT_COVER,
    draw_map,
    draw_overlay,
    draw_result,
    draw_similarity,
    segment_color,
)


def segment(size, box, label="the cup", **fields):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return {"mask": mask, "label": label, "score": 0.5, "box": list(box), "layer": 3, **fields}


def test_objects_keep_their_colours_and_the_rest_is_dimmed():
    pixels = np.random.default_rng(0).integers(40, 256, (400, 500, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    boxes = [(100, 200, 300, 380), (20, 60, 90, 160), (320, 300, 450, 390)]
    drawn = np.asarray(draw_overlay(image, [segment(image.size, box) for box in boxes])).astype(int)
    assert drawn.shape == pixels.shape
    free = np.ones(pixels.shape[:2], dtype=bool)
    # Away from the labels above them, and from the contours of others.
    for left, top, right, bottom in boxes[1:]:
        assert (drawn[top:bottom, left:right] == pixels[top:bottom, left:right]).all()
    for left, top, right, bottom in boxes:
        free[max(0, top - 40) : bottom + 5, max(0, left - 5) : right + 150] = False
        assert (drawn[bottom, right - 2] == 255).all() and (drawn[bottom + 1, right - 2] != 255).any()
    assert (drawn[free].max(-1) < pixels[free].max(-1)).all()
    assert (drawn[free].sum(-1) < 0.6 * pixels[free].sum(-1)).all()


def test_contours_have_the_colour_of_their_number():
    image = Image.new("RGB", (400, 400), (100, 100, 100))
    drawn = np.asarray(
        draw_overlay(image, [segment(image.size, (100, 50, 300, 150)), segment(image.size, (9, 200, 60, 300))])
    )
    assert (drawn[152, 200] == segment_color(0)).all() and (drawn[302, 30] == segment_color(1)).all()


@pytest.mark.parametrize("segments", [[], [(0, 0, 0, 0)]])
def test_without_anything_found_nothing_is_dimmed(segments):
    image = Image.new("RGB", (400, 400), (10, 200, 30))
    drawn = draw_overlay(image, [segment(image.size, box) for box in segments])
    assert np.array_equal(np.asarray(drawn), np.asarray(image))


def test_small_images_are_enlarged_and_large_ones_made_smaller():
    for size, expected in (
        ((64, 32), (768, 384)),
        ((500, 900), (500, 900)),
        ((20, 20), (384, 384)),
        ((6000, 4000), (1024, 683)),
        ((4000, 9), (1024, 2)),
        ((3, 30), (102, 1024)),
    ):
        image = Image.new("RGB", size)
        assert draw_overlay(image, []).size == expected
        drawn = draw_similarity(image, np.zeros((2, 2)))
        assert drawn.width == expected[0] and drawn.height > expected[1]
    photo = Image.new("RGB", (6000, 4000))
    found = [segment(photo.size, (0, 0, 900, 900), similarity_map=np.eye(3)) for _ in range(6)]
    drawn = draw_result(photo, {"answer": "[SEG] " * 6, "segments": found})
    assert drawn.width == 4 * 1024 + 3 * 8 and drawn.height < 3 * 1024


@pytest.mark.parametrize("min_side", [0, -5, 3.5, "large"])
def test_a_side_is_a_number_of_pixels(min_side):
    with pytest.raises(ValueError, match=r"^min_side must be .*, got "):
        draw_overlay(Image.new("RGB", (9, 9)), [], min_side)


def test_label_has_a_background_of_its_colour_inside_of_the_picture():
    image = Image.new("L", (384, 384), 0)
    segments = [segment(image.size, (380, 0, 384, 4), "a very long label " * 10)]
    drawn = np.asarray(draw_overlay(image, segments))
    top = drawn[:25]
    assert (top == segment_color(0)).all(-1).sum() > 3000
    assert (top == 255).all(-1).any() or (top == 0).all(-1).any()


def test_segments_have_distinct_colours():
    colors = np.array([segment_color(number) for number in range(8)]).astype(int)
    distances = np.abs(colors[:, None] - colors[None]).max(-1) + 255 * np.eye(8, dtype=int)
    assert distances.min() > 40


def test_similarity_is_brightest_where_it_is_highest():
    image = Image.new("RGB", (400, 400), (100, 100, 100))
    drawn = np.asarray(draw_similarity(image, np.array([[-5.0, 1.0], [0.0, 30.0]]))).astype(int)
    assert drawn[300, 300].sum() > drawn[100, 300].sum() > drawn[100, 100].sum()
    constant = np.asarray(draw_similarity(image, np.full((2, 2), 7.0)))[:400]
    assert (constant == constant[0, 0]).all()


def test_a_map_as_large_as_a_photograph_is_coloured_where_it_is_drawn(monkeypatch):
    """And not at its 24 million pixels, of which a picture with several maps took minutes."""
    coloured, heat, image = [], drawing._heat, Image.new("RGB", (6000, 4000))
    monkeypatch.setattr(drawing, "_heat", lambda values: coloured.append(values.size) or heat(values))
    values = np.zeros((4000, 6000), dtype=np.float32)
    values[:, 3000:] = 0.25
    drawn = np.asarray(draw_map(image, values, bounds=(0.0, 0.25)))
    assert sum(coloured) <= drawn.shape[0] * drawn.shape[1]
    for column, colour in ((100, HEAT[0]), (900, HEAT[-1])):
        assert np.abs(drawn[300, column] - HEAT_COVER * colour).max() <= 1


def test_the_bar_goes_from_the_least_to_the_greatest_value():
    drawn = np.asarray(draw_map(Image.new("RGB", (400, 400)), np.array([[-5.0, 30.0]]))).astype(int)
    bar = drawn[400 + 15]
    colored = np.flatnonzero(bar.max(-1) - bar.min(-1) > 30)
    assert len(colored) > 250
    assert np.abs(bar[colored[0]] - HEAT[0]).max() < 3 and np.abs(bar[colored[-1]] - HEAT[-1]).max() < 3
    fixed = np.asarray(draw_map(Image.new("RGB", (400, 400)), np.full((2, 2), 0.2), bounds=(0.0, 0.2))).astype(int)
    assert np.abs(fixed[200, 200] - 0.6 * HEAT[-1]).max() < 3


def test_no_map_over_what_it_does_not_cover():
    image = Image.new("RGB", (400, 400), (100, 100, 100))
    values = np.array([[0.0, 1.0], [0.0, 1.0]])
    drawn = np.asarray(draw_similarity(image, values, box=(100, 0, 300, 400))).astype(int)
    assert (drawn[:400, :100] == 100).all() and (drawn[:400, 300:] == 100).all()
    # Tokens that see padding too: their part of the image is drawn at its place, the rest nowhere.
    drawn = np.asarray(draw_similarity(image, values, box=(0, 0, 600, 400))).astype(int)
    assert (drawn[200, 299] == drawn[200, 0]).all() and (drawn[200, 301] == drawn[200, 399]).all()
    assert (drawn[200, 299] != drawn[200, 301]).any()


def test_result_puts_maps_beside_and_queries_below():
    image = Image.new("RGB", (384, 384))
    with_map = segment(image.size, (10, 10, 60, 60), similarity_map=np.eye(3))
    one = draw_result(image, {"answer": "it is [SEG].", "segments": [with_map]})
    assert one.width == 384 * 2 + 8 and one.height > 384
    other = {"answer": "no", "segments": []}
    both = draw_result(image, [{"answer": "it is [SEG].", "segments": [with_map]}, other])
    assert both.width == one.width and both.height == one.height + draw_result(image, other).height + 8
    with pytest.raises(ValueError, match="there must be a result to draw, got none"):
        draw_result(image, [])


def written(monkeypatch, draw):
    """Texts that a drawing writes."""
    texts, original = [], ImageDraw.ImageDraw.text

    def text(self, place, line, *args, **kwargs):
        texts.append(line)
        return original(self, place, line, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    draw()
    return texts


def test_query_names_and_layers_stand_in_the_picture(monkeypatch):
    image = Image.new("RGB", (500, 400))
    segments = [
        segment(image.size, (10, 10, 60, 60), similarity_map=np.eye(3)),
        segment(image.size, (0, 0, 0, 0), "the lid", uncertainty=np.zeros((400, 500)), agreement=0.75),
    ]
    result = GroundingResult("it is …", segments, query="a cup, a lid and a tree", absent=["the tree"], last_layer=6)
    texts = written(monkeypatch, lambda: draw_result(image, result))
    assert texts[:2] == ["1 the cup 0.50", "a cup, a lid and a tree"]
    for line in ("it is …", "not found: the tree", "empty masks: 2 the lid", "similarity at layer 3 of 6", "0.25"):
        assert line in texts
    assert "variance of the mask over layers, agreement 0.75" in texts


def test_long_queries_are_wrapped_and_not_cut(monkeypatch):
    image, words = Image.new("RGB", (2000, 8)), [f"word{number}" for number in range(40)]
    result = GroundingResult("no", [], query=" ".join(words))
    texts = written(monkeypatch, lambda: draw_result(image, result))
    assert " ".join(texts[:-1]).split() == words and len(texts) > 3


@pytest.mark.parametrize("width", [0, 20, 55, 100, 10_000])
def test_a_shortened_text_is_the_longest_that_fits(width):
    font, text = ImageFont.load_default(15), "a word that is long " * 20
    fitting = [n for n in range(len(text)) if font.getlength(text[:n] + "…") <= width]
    expected = text if font.getlength(text) <= width else text[: max(fitting, default=0)] + "…"
    assert drawing._shorten(text, font, width) == expected


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size of its image \(40, 30\), got \(30, 40\)"):
        draw_overlay(Image.new("RGB", (40, 30)), [segment((30, 40), (0, 0, 5, 5))])
