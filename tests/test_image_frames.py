"""Changes of pixels as two matrices: equal to resizing step by step, for every kind of frame."""

import pytest
import torch
from torch.nn import functional as F

from uground.modeling_uground.image_frames import (
    ImageFrame,
    apply_matrices,
    grid_to_grid,
    grid_to_image,
    inside_windows,
    resize_rows,
)

# No frame here is one cell wide: PyTorch resizes a single column with a filter wrongly.
SIZES = [(37, 91), (91, 37), (48, 48), (3, 100), (300, 30), (64, 63)]


def resize(values, size, **options):
    return F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False, **options)[:, 0]


def maps(count=3, side=6, seed=0):
    return torch.randn(count, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "kind, image_hw, expected",
    [
        ("letterbox", (50, 100), ((0, 12), (0, 24))),
        ("letterbox", (100, 52), ((0, 24), (0, 12))),  # 52 · 0.24 = 12.48
        ("letterbox", (1, 1000), ((0, 1), (0, 24))),  # never nothing
        ("stretch", (50, 100), ((0, 24), (0, 24))),
        ("centre_crop", (50, 100), ((0, 24), (-12, 36))),
        ("centre_crop", (427, 640), ((0, 24), (-5, 29))),  # int(640 · 24/427) = 35, of which 11 stick out
    ],
)
def test_windows(kind, image_hw, expected):
    assert ImageFrame(kind, 24).windows(image_hw) == expected


def test_a_crop_whose_scaled_side_is_rounded_down_loses_a_ring_as_in_the_official_code():
    """int(355 · (12 / 355)) is 11, so that half of what sticks out is -1."""
    assert int(355 * (12 / 355)) == 11
    assert ImageFrame("centre_crop", 12).windows((355, 500)) == ((1, 11), (-2, 14))


@pytest.mark.parametrize("image_hw", SIZES)
def test_letterbox_to_image_is_resize_crop_resize(image_hw):
    frame = ImageFrame("letterbox", 32)
    (_, bottom), (_, right) = frame.windows(image_hw)
    expected = resize(resize(maps(), (32, 32))[:, :bottom, :right], image_hw)
    found = apply_matrices(maps(), *grid_to_image((6, 6), frame, image_hw))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("image_hw", SIZES)
def test_stretch_to_image_is_resize_resize(image_hw):
    expected = resize(resize(maps(), (32, 32)), image_hw)
    found = apply_matrices(maps(), *grid_to_image((6, 6), ImageFrame("stretch", 32), image_hw))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("image_hw", [(37, 91), (91, 37), (48, 48), (355, 500)])
def test_centre_crop_to_image_is_resize_pad_resize(image_hw):
    frame = ImageFrame("centre_crop", 12)
    (top, bottom), (left, right) = frame.windows(image_hw)
    padded = F.pad(resize(maps(), (12, 12)), (-left, right - 12, -top, bottom - 12))
    found = apply_matrices(maps(), *grid_to_image((6, 6), frame, image_hw))
    torch.testing.assert_close(found, resize(padded, image_hw), atol=2e-6, rtol=0)


def test_what_a_crop_cut_off_gets_nothing():
    rows, columns = grid_to_image((4, 4), ImageFrame("centre_crop", 8), (8, 24))
    full = apply_matrices(torch.ones(1, 4, 4), rows, columns)[0]
    assert full[:, 8:16].eq(1).all()
    assert full[:, :8].eq(0).all() and full[:, 16:].eq(0).all()


@pytest.mark.parametrize("image_hw", SIZES)
@pytest.mark.parametrize("other", ["letterbox", "stretch"])
def test_to_another_frame_goes_through_the_pixels_of_the_image(image_hw, other):
    frame, target = ImageFrame("letterbox", 32), ImageFrame(other, 16)
    image = apply_matrices(maps(), *grid_to_image((6, 6), frame, image_hw))
    (_, bottom), (_, right) = target.windows(image_hw)
    expected = F.pad(resize(image, (bottom, right), antialias=True), (0, 16 - right, 0, 16 - bottom))
    found = apply_matrices(maps(), *grid_to_grid((6, 6), frame, image_hw, target))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    inside = inside_windows(target, image_hw)
    assert inside.sum() == bottom * right and inside[:bottom, :right].all()


def test_the_image_may_lie_elsewhere_than_the_frame_would_round_it():
    rows, columns = grid_to_image((4, 4), ImageFrame("letterbox", 8), (10, 10), windows=((0, 4), (0, 8)))
    assert rows[:, 2:].eq(0).all() or rows[-1, 2] < 0.5  # the lower half is padding
    torch.testing.assert_close(rows.sum(1), torch.ones(10))
    torch.testing.assert_close(columns.sum(1), torch.ones(10))


def test_area_is_the_share_of_each_cell():
    assert resize_rows(torch.tensor([[0.0], [1.0], [1.0], [1.0]]), 2, "area").tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize("kind", ["letterbox", "stretch", "centre_crop"])
def test_points_land_where_their_pixels_do(kind):
    """The corner pixels of what a frame shows of a 40 x 80 image, in a frame of 20 pixels."""
    frame = ImageFrame(kind, 20)
    points = frame.points_to_frame(torch.tensor([[0.0, 0.0], [80.0, 40.0], [40.0, 20.0]]), (40, 80))
    expected = {
        "letterbox": [[0, 0], [20, 10], [10, 5]],
        "stretch": [[0, 0], [20, 20], [10, 10]],
        "centre_crop": [[-10, 0], [30, 20], [10, 10]],
    }
    assert points.tolist() == expected[kind]


def test_an_unknown_frame_is_refused():
    with pytest.raises(ValueError, match="a frame must be one of .*letterbox.*, got 'round'"):
        ImageFrame("round", 8)
