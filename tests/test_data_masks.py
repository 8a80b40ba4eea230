"""Masks from outside, against rasterisers of our own: RLE of every kind, polygons of every nesting, and refusals."""

import numpy as np
import pytest
from miniatures import SIZE, box_mask, compressed_rle, crowd_rle

from uground.training.data.masks import (
    decode_mask,
    encode_mask,
    has_area,
    is_empty,
    paint_polygon,
    read_mask,
    union_mask,
)
from uground.training.metric_modules import load_metric

NAN, INFINITY = float("nan"), float("inf")
HEIGHT, WIDTH = SIZE


def painted_runs(runs: list[int], size: tuple[int, int]) -> np.ndarray:
    """What an RLE of these runs means, pixel by pixel."""
    pixels = [value % 2 == 1 for value, run in enumerate(runs) for _ in range(run)]
    return np.array(pixels, dtype=bool).reshape(size[::-1]).T


def even_odd(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which pixel centres a polygon `(n, 2)` encloses, and how far each centre is from its outline."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    inside, distance = np.zeros(size, bool), np.full(size, np.inf)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 > rows) != (y1 > rows)
            inside ^= crosses & (columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
        along = ((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = np.clip(along, 0, 1)
        distance = np.minimum(distance, np.hypot(columns - x0 - along * (x1 - x0), rows - y0 - along * (y1 - y0)))
    return inside, distance


def test_runs_mean_what_they_say():
    draw = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(draw.integers(1, 9, 2).tolist())
        pixels = size[0] * size[1]
        cuts = np.sort(draw.integers(0, pixels + 1, draw.integers(0, 7)))
        runs = np.diff([0, *cuts, pixels]).tolist()  # with runs of nothing, also in the middle
        wanted, other = painted_runs(runs, size), draw.random(size) < 0.5
        rle = {"size": list(size), "counts": runs}
        np.testing.assert_array_equal(decode_mask(rle), wanted)
        assert is_empty(rle) == (not wanted.any())
        assert read_mask(rle, size, "x") == encode_mask(wanted)
        np.testing.assert_array_equal(decode_mask(union_mask([rle, encode_mask(other)], size)), wanted | other)
        for text in (True, False):
            np.testing.assert_array_equal(decode_mask(compressed_rle(other, text)), other)


def test_broken_counts_are_refused_or_mean_a_mask_of_the_size():
    draw = np.random.default_rng(1)
    refused = 0
    for _ in range(500):
        size = tuple(draw.integers(1, 9, 2).tolist())
        letters = list(compressed_rle(draw.random(size) < 0.5)["counts"])
        for _ in range(draw.integers(1, 4)):
            place = int(draw.integers(len(letters) + 1))
            letters[place : place + int(draw.integers(2))] = [chr(draw.integers(1, 200))] * int(draw.integers(2))
        try:
            assert decode_mask({"size": list(size), "counts": "".join(letters)}, "f:3").shape == size
        except ValueError as error:
            assert str(error).startswith("f:3: ")
            refused += 1
    assert refused > 250


def test_polygons_are_filled_as_a_rasteriser_of_our_own_fills_them():
    draw = np.random.default_rng(2)
    for number in range(100):
        # every fourth one leaves the image
        least, most = (-0.9, 1.9) if number % 4 == 0 else (0, 1)
        points = (draw.uniform(least, most, (draw.integers(3, 8), 2)) * (WIDTH, HEIGHT)).round(2)
        forms = points.ravel().tolist(), [points.ravel().tolist()], points.tolist(), [points.tolist()]
        masks = [decode_mask(read_mask(form, SIZE, "x")) for form in forms]
        assert all((mask == masks[0]).all() for mask in masks)
        wanted, distance = even_odd(points, SIZE)
        # What an outline cuts may go to either side.
        assert (masks[0] == wanted)[distance > 1].all()


BAD_RLES = [
    ({"size": None, "counts": [600]}, r"a size must be whole numbers of pixels, \[height, width\], got None"),
    ({"size": [20.9, 30.9], "counts": [600]}, r"a size must be whole numbers .* got \[20.9, 30.9\]"),
    ({"size": [True, 600], "counts": [600]}, "a size must be whole numbers"),
    ({"size": [20, 30, 1], "counts": [600]}, "a size must be whole numbers"),
    ({"size": [0, 30], "counts": []}, "a size must be whole numbers"),
    ({"size": [2**33, 2**33], "counts": [600]}, "a size may be at most"),
    ({"size": [20, 30], "counts": [6.5, 2.5, 591]}, "the counts of an RLE must be whole numbers or a text"),
    ({"size": [20, 30], "counts": [True, 599]}, "the counts of an RLE must be whole numbers or a text"),
    ({"size": [20, 30], "counts": None}, "the counts of an RLE must be whole numbers or a text, got None"),
    ({"size": [20, 30], "counts": [300, -1, 301]}, "a run of an RLE must be at least 0 pixels long, got -1"),
    ({"size": [20, 30], "counts": [10**400]}, "its RLE counts 1000.* pixels in one run, expected 600"),
    ({"size": [20, 30], "counts": []}, "its RLE counts 0 pixels, expected 600"),
    # 9 pixels of 600: pycocotools would go on into memory of others
    ({"size": [20, 30], "counts": "09"}, "its RLE counts 9 pixels, expected 600"),
    ({"size": [20, 30], "counts": "garbage"}, "must be compressed as COCO does, got 'garbage'"),
    ({"size": [20, 30], "counts": ""}, "must be compressed as COCO does"),
    ({"size": [20, 30], "counts": b"\xff"}, "must be compressed as COCO does"),
    ({"size": [20, 30], "counts": "\ud83d"}, "must be compressed as COCO does"),
    ({"size": [20, 30], "counts": "PPP"}, "must be compressed as COCO does"),
    ({"size": [20, 30], "counts": "P" * 20 + "0"}, "a run of an RLE takes at most 7 characters, got 21"),
    ({"size": [20, 30]}, r"an RLE must have size and counts, got \['size'\]"),
]


@pytest.mark.parametrize(("rle", "message"), BAD_RLES)
def test_an_rle_that_is_none_is_refused_wherever_it_enters(rle, message):
    for enter in (
        lambda: read_mask(rle, SIZE, "f:3"),
        lambda: read_mask([rle, crowd_rle(box_mask(0, 0, 4, 4))], SIZE, "f:3"),
        lambda: decode_mask(rle, "f:3"),
        lambda: is_empty(rle, "f:3"),
    ):
        with pytest.raises(ValueError, match="^f:3: .*" + message):
            enter()


def test_metrics_refuse_such_an_rle_too(tmp_path):
    metric = load_metric("grounding_iou", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="its RLE counts 9 pixels, expected 48"):
        metric.add(prediction=[{"size": [6, 8], "counts": "09"}], reference=[compressed_rle(np.ones((6, 8), bool))])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[NAN, 1, 2, 3, 4, 5]], r"the numbers of a polygon must be finite, got the point \(nan, 1\)"),
        ([[1, INFINITY], [2, 3], [4, 5]], "the numbers of a polygon must be finite"),
        ([[1, 2, 3, 4, 5e8, 6]], "lies far outside of the image, which is 30 wide and 20 high"),
        ([[1, 2, 3, 4, 5, -(10**400)]], "lies far outside of the image"),
        ([[True, 2, 3, 4, 5, 6]], "a polygon must be x, y pairs of numbers, got 6 values"),
        ([["1", 2, 3, 4, 5, 6]], "a polygon must be x, y pairs of numbers, got 6 values"),
        ([[None, 2, 3, 4, 5, 6]], "a polygon must be x, y pairs of numbers, got 6 values"),
        ([[1, 2, [3], 4, 5, 6]], "a polygon must be x, y pairs of numbers, got 6 values"),
        ([[1, 2, 3, 4, 5, 6], 7], "a polygon must be a list of numbers x, y, x, y, …, got 7"),
        (["abc"], "a polygon must be x, y pairs of numbers"),
        ([[[[1, 2], [3, 4], [5, 6]]]], "got lists nested 4 deep"),
        ([crowd_rle(box_mask(0, 0, 4, 4)), [1, 2, 3, 4, 5, 6]], "a polygon must be"),
    ],
)
def test_a_polygon_that_would_end_the_process_is_refused(segmentation, message):
    with pytest.raises(ValueError, match="^ann 7: .*" + message):
        read_mask(segmentation, SIZE, "ann 7")


@pytest.mark.parametrize("point", [[NAN, 1], [1, INFINITY], [1e9, 1], [10**400, 1], ["1", 2], [True, 1], 7])
def test_a_painted_point_is_checked_as_well(point):
    with pytest.raises(ValueError, match="^ann 7: "):
        paint_polygon(np.zeros(SIZE, np.uint8), [[1, 1], [5, 1], point], 1, "ann 7")


def test_sizes_that_no_picture_has_are_refused():
    triangle = [[1, 1, 5, 1, 5, 5]]
    for size in ((NAN, 3), (0, 3), (-1, 3), ("a", 3), (3.5, 4), None, 5, (3,)):
        with pytest.raises(ValueError, match="^x: the image: a size must be whole numbers of pixels"):
            read_mask(triangle, size, "x")
    for size in ((70000, 2), (2**20, 2**20), (60000, 60000)):
        with pytest.raises(ValueError, match="^x: the image: a size may be at most 65535 pixels a side and"):
            read_mask(triangle, size, "x")
    with pytest.raises(ValueError, match="a polygon's outline may be .* pixels long"):
        read_mask([[0, 0, 15000, 9000] * 2000 + [0, 1]], (10000, 16000), "x")


def test_what_holds_no_area_is_no_polygon():
    assert not has_area([1, 1, 5, 5]) and not has_area([0.1, 0.1, 0.2, 0.2, 0.3, 0.3]) and not has_area([2, 2] * 4)
    assert has_area([0, 0, 5, 0, 5, 0.01])
    line, triangle = [2, 2, 4, 4, 8, 8], [10, 2, 16, 2, 16, 8]
    assert is_empty(read_mask([line], SIZE, "x"))
    assert read_mask([line, triangle], SIZE, "x") == read_mask([triangle], SIZE, "x")
