"""SasP: which cells become points, in which order, and where the points lie."""

import pytest
import torch

from uground.modeling_uground.image_frames import ImageFrame, apply_matrices, grid_to_image
from uground.modeling_uground.prompt_points import (
    ABSENT,
    PointSettings,
    cell_centres,
    continuous_points,
    minmax,
    select_cells,
    selection_grid,
    similarity_points,
)


def select(scores, count, thresholds=(0.8, 0.2)):
    cells, labels = select_cells(torch.tensor([scores]), PointSettings(count, thresholds, 1))
    return cells[0].tolist(), labels[0].tolist()


SCORES = [0.5, 0.9, 0.1, -1.0, 0.8, 0.2, 0.4, 1.0, 0.0, -1.0]


def test_positive_from_the_top_then_negative_from_the_bottom_then_neutral_in_reading_order():
    cells, labels = select(SCORES, 8)
    assert cells == [7, 1, 4, 8, 2, 5, 0, 6]
    assert labels == [1, 1, 1, 0, 0, 0, -1, -1]


def test_only_the_first_are_taken():
    """With enough positive cells there is no negative point at all."""
    assert select(SCORES, 3) == ([7, 1, 4], [1, 1, 1])
    assert select(SCORES, 4) == ([7, 1, 4, 8], [1, 1, 1, 0])


def test_what_the_frame_does_not_show_is_never_chosen_and_missing_points_are_absent():
    cells, labels = select(SCORES, 12)
    assert set(cells[:8]).isdisjoint({3, 9}) and labels[8:] == [ABSENT] * 4


def test_ties_stay_in_reading_order():
    assert select([0.0, 1.0, 1.0, 0.0, 1.0], 5) == ([1, 2, 4, 0, 3], [1, 1, 1, 0, 0])


def test_each_map_is_selected_by_itself():
    scores = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.5, 0.0]])
    cells, labels = select_cells(scores, PointSettings(2, (0.8, 0.2), 1))
    assert cells.tolist() == [[1, 0], [0, 2]] and labels.tolist() == [[1, 0], [1, 0]]


def test_halving_the_grid_is_the_mean_of_four_and_minmax_comes_after_it():
    similarity = torch.tensor(
        [[[0.0, 4.0, 1.0, 1.0], [0.0, 0.0, 1.0, 5.0], [8.0, 8.0, 3.0, 3.0], [8.0, 8.0, 3.0, 3.0]]]
    )
    grid = selection_grid(similarity, ImageFrame("centre_crop", 2), (10, 10))
    torch.testing.assert_close(grid, torch.tensor([[[0.0, 1 / 7], [1.0, 2 / 7]]]))


def test_what_the_crop_cut_off_is_padded_with_minus_one():
    grid = selection_grid(torch.rand(2, 4, 4), ImageFrame("centre_crop", 4), (10, 20))
    assert grid.shape == (2, 4, 8)
    assert grid[..., :2].eq(-1).all() and grid[..., 6:].eq(-1).all() and grid[..., 2:6].ge(0).all()


def test_the_letterbox_keeps_its_valid_cells():
    similarity = torch.zeros(1, 4, 4)
    similarity[0, 3, 3] = 9.0  # padding, but it counts in the range
    similarity[0, 0, 0] = 4.5
    grid = selection_grid(similarity, ImageFrame("letterbox", 4), (10, 20))
    assert grid.shape == (1, 2, 4) and grid.max() == 0.5


def test_centres_are_whole_pixels_inside_of_the_image():
    cells = torch.tensor([[0, 3, 4, 7]])
    centres = cell_centres(cells, (2, 4), (5, 10))
    # Cells of 2.5 pixels: 1.25, 8.75 and 3.75 cut to whole numbers.
    assert centres.tolist() == [[[1, 1], [8, 1], [1, 3], [8, 3]]]
    assert cell_centres(torch.tensor([[1]]), (1, 2), (1, 1)).tolist() == [[[0, 0]]]


def whole_image(values, rows, columns, centres):
    """The definition, over all pixels, in float64."""
    image = (rows.double() @ values.double() @ columns.double().mT)[0]
    y, x = torch.meshgrid(torch.arange(image.shape[0]).double(), torch.arange(image.shape[1]).double(), indexing="ij")
    found = []
    for px, py in centres[0].tolist():
        weight = torch.exp(image - (x - px) ** 2 - (y - py) ** 2)
        found.append(torch.stack([(weight * x).sum(), (weight * y).sum()]) / weight.sum())
    return torch.stack(found)[None]


@pytest.mark.parametrize("image_hw", [(40, 60), (9, 70), (3, 2)])
def test_a_window_gives_what_the_whole_image_gives(image_hw):
    values = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1))
    matrices = grid_to_image((6, 6), ImageFrame("centre_crop", 12), image_hw)
    height, width = image_hw
    centres = torch.tensor([[[0, 0], [width - 1, height - 1], [width // 2, height // 3], [0, height - 1]]])
    found = continuous_points((values, *matrices), centres)
    torch.testing.assert_close(found.double(), whole_image(values, *matrices, centres), atol=3e-5, rtol=0)
    assert apply_matrices(values, *matrices).shape[1:] == image_hw


def points_of(similarity, settings=None, sizes=((40, 60), (60, 40)), image=(0, 1, 1)):
    return similarity_points(
        similarity,
        torch.tensor(image),
        list(sizes),
        ImageFrame("centre_crop", 24),
        settings or PointSettings(10, (0.8, 0.2), 2),
        ImageFrame("letterbox", 120),
    )


def test_the_gradient_through_the_points_is_that_of_finite_differences():
    values = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    matrices = grid_to_image((5, 5), ImageFrame("centre_crop", 10), (12, 16))
    centres = torch.tensor([[[3, 2], [15, 11], [8, 0]], [[0, 0], [7, 7], [12, 5]]])

    def points(given):
        return continuous_points((minmax(given), *matrices), centres)

    assert torch.autograd.gradcheck(points, values, eps=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(points(values).sum(), values)
    assert gradient.abs().max() > 1e-4


def test_segments_and_images_do_not_meet():
    similarity = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(4))
    points, labels = points_of(similarity)
    for number, image in enumerate((0, 1, 1)):
        alone, kinds = points_of(similarity[number : number + 1], image=(image,))
        torch.testing.assert_close(points[number], alone[0], atol=1e-5, rtol=0)
        assert torch.equal(labels[number], kinds[0])


def test_no_segment_and_a_constant_map_are_ordinary():
    points, labels = points_of(torch.zeros(0, 8, 8), image=())
    assert points.shape == (0, 10, 2) and labels.shape == (0, 10)
    constant = torch.full((1, 8, 8), 3.0, requires_grad=True)
    points, labels = points_of(constant, image=(0,))
    assert labels.eq(0).all() and points.isfinite().all()
    (gradient,) = torch.autograd.grad(points.sum(), constant)
    assert gradient.isfinite().all()


def test_minmax_of_each_map():
    assert minmax(torch.tensor([[[2.0, 4.0]], [[5.0, 5.0]]])).tolist() == [[[0.0, 1.0]], [[0.0, 0.0]]]
