"""Overlays and similarity maps: right pixels coloured, right sizes, whatever the image and the number of segments."""

import numpy as np
import pytest
from PIL import Image

from uground.processing.drawing import draw_overlay, draw_result, draw_similarity, segment_color


def segment(size, box, label="the cup", **fields):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return {"mask": mask, "label": label, "score": 0.5, "box": list(box), "layer": 3, **fields}


def test_overlay_tints_the_mask_and_nothing_else():
    image = Image.new("RGB", (400, 400), (100, 100, 100))
    drawn = np.asarray(draw_overlay(image, [segment(image.size, (100, 200, 300, 380))])).astype(int)
    assert drawn.shape == (400, 400, 3)
    tint = np.array(segment_color(0))
    assert np.abs(drawn[300, 200] - (0.55 * 100 + 0.45 * tint)).max() <= 1
    assert (drawn[100, 350] == 100).all() and (drawn[395, 50] == 100).all()
    assert (drawn[300, 99] == tint).all() or (drawn[300, 100] == tint).all()


def test_small_images_are_enlarged_and_large_ones_kept():
    for size, expected in (((64, 32), (768, 384)), ((500, 900), (500, 900)), ((20, 20), (384, 384))):
        image = Image.new("RGB", size)
        assert draw_overlay(image, []).size == expected
        assert draw_similarity(image, np.zeros((2, 2))).size == expected


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
    constant = np.asarray(draw_similarity(image, np.full((2, 2), 7.0)))
    assert (constant == constant[0, 0]).all()


def test_result_puts_maps_beside_and_queries_below():
    image = Image.new("RGB", (384, 384))
    with_map = segment(image.size, (10, 10, 60, 60), similarity_map=np.eye(3))
    one = draw_result(image, {"answer": "it is [SEG].", "segments": [with_map]})
    assert one.width == 384 * 2 + 8 and one.height > 384
    both = draw_result(image, [{"answer": "it is [SEG].", "segments": [with_map]}, {"answer": "no", "segments": []}])
    assert both.width == one.width and both.height == 2 * one.height + 8


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size of its image \(40, 30\), got \(30, 40\)"):
        draw_overlay(Image.new("RGB", (40, 30)), [segment((30, 40), (0, 0, 5, 5))])
