"""What the mask decoder is told: segment projection, similarity maps in both scalings, mask prompts."""

import math

import pytest
import torch

from torch.nn import functional as F

from uground.modeling_uground.image_frames import ImageFrame, apply_matrices, grid_to_grid, grid_to_image
from uground.modeling_uground.prompts import SegmentProjection, build_mask_prompts
from uground.modeling_uground.similarity import PADDING_VALUE, SimilarityScaling


def layer(count: int, number: int = 0) -> torch.Tensor:
    return torch.full((count,), number)


def test_the_projection_is_linear_relu_linear():
    projection = SegmentProjection(3, 2)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    states = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    hidden = states @ projection.linear_1.weight.T + projection.linear_1.bias
    assert (hidden < 0).any() and (hidden > 0).any()
    expected = hidden * (hidden > 0) @ projection.linear_2.weight.T + projection.linear_2.bias
    torch.testing.assert_close(projection(states), expected)
    assert projection.linear_1.weight.shape == (3, 3)


def test_minmax_maps_each_segment_to_its_own_unit_range():
    similarity = torch.tensor([[[-2.0, 0.0], [2.0, 6.0]], [[10.0, 11.0], [14.0, 12.0]]])
    maps = SimilarityScaling("minmax", 3, 16)(similarity, layer(2))
    assert maps.tolist() == [[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.25], [1.0, 0.5]]]


def test_scaled_divides_by_the_root_of_the_width_and_adds_the_bias_of_the_layer():
    scaling = SimilarityScaling("scaled", 3, 16)
    with torch.no_grad():
        scaling.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    similarity = torch.tensor([[[-4.0, 0.0], [4.0, 8.0]], [[-4.0, 0.0], [4.0, 8.0]]])
    maps = scaling(similarity, torch.tensor([2, 1]))
    assert maps.tolist() == [[[1.0, 2.0], [3.0, 4.0]], [[-2.0, -1.0], [0.0, 1.0]]]


def test_the_bias_is_learned_for_the_layers_used():
    scaling = SimilarityScaling("scaled", 3, 16)
    scaling(torch.zeros(3, 2, 2), torch.tensor([0, 2, 2])).sum().backward()
    assert scaling.bias.grad.tolist() == [4.0, 0.0, 8.0]


def test_minmax_has_nothing_to_learn():
    assert list(SimilarityScaling("minmax", 3, 16).parameters()) == []


@pytest.mark.parametrize("value", [0.0, -7.5, 1e30])
def test_a_constant_map_under_minmax_is_zero_with_finite_gradients(value):
    similarity = torch.full((2, 3, 3), value)
    similarity[1, 0, 0] += 1.0 + abs(value)
    similarity.requires_grad_()
    maps = SimilarityScaling("minmax", 3, 16)(similarity, layer(2))
    assert torch.equal(maps[0], torch.zeros(3, 3))
    assert (maps[1].amin(), maps[1].amax()) == (0.0, 1.0)
    maps.square().sum().backward()
    assert similarity.grad.isfinite().all()
    (gradient,) = torch.autograd.grad(SimilarityScaling("minmax", 3, 16)(similarity, layer(2)).sum(), similarity)
    assert gradient.isfinite().all()


def test_a_constant_map_under_scaled_stays_constant():
    similarity = torch.full((1, 3, 3), 8.0, requires_grad=True)
    maps = SimilarityScaling("scaled", 3, 16)(similarity, layer(1))
    assert torch.equal(maps, torch.full((1, 3, 3), 2.0))
    maps.sum().backward()
    torch.testing.assert_close(similarity.grad, torch.full((1, 3, 3), 0.25))


def to_image(maps, side, image_hw):
    """Maps over a letterbox of `side` pixels, in pixels of the image."""
    return apply_matrices(maps, *grid_to_image(tuple(maps.shape[1:]), ImageFrame("letterbox", side), image_hw))


def test_a_map_in_image_pixels_by_hand():
    """A 2x2 map on a 4-pixel frame of which the left half is image, at the size it has there."""
    similarity_map = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    # Centres of tokens lie at pixels 0.5 and 2.5: bilinear weights of the second one are 0, 1/4, 3/4, 1.
    rows = torch.tensor([0.0, 2.0, 6.0, 8.0])
    expected = rows[:, None] + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(to_image(similarity_map, 4, (4, 2)), expected[None])


def test_the_part_that_is_image_is_scaled_to_the_whole_image():
    similarity_map = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    # The valid row is [0, 1, 3, 4]; at twice its width pixels weigh their neighbours 1/4 and 3/4.
    row = torch.tensor([0.0, 0.25, 0.75, 1.5, 2.5, 3.25, 3.75, 4.0])
    matrices = grid_to_image((2, 2), ImageFrame("letterbox", 4), (3, 8), windows=((0, 1), (0, 4)))
    torch.testing.assert_close(apply_matrices(similarity_map, *matrices), row.expand(1, 3, 8))


def mask_prompt(image_map, side, padding_value):
    """One map that covers its image pixel by pixel, as a mask prompt: nothing but the way to the head's frame."""
    height, width = image_map.shape[-2:]
    lmm_frame = ImageFrame("letterbox", max(height, width))
    grid = F.pad(image_map, (0, lmm_frame.side - width, 0, lmm_frame.side - height))
    image = torch.zeros(len(image_map), dtype=torch.long)
    return build_mask_prompts(grid, image, [(height, width)], lmm_frame, ImageFrame("letterbox", side), padding_value)


def test_a_mask_prompt_is_padded_below_and_to_the_right():
    wide = torch.arange(8.0).view(1, 2, 4)
    prompt = mask_prompt(wide, 4, -10.0)
    assert prompt.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [-10] * 4, [-10] * 4]]
    tall = mask_prompt(wide.mT, 4, 0.0)
    assert tall.tolist() == [[[0, 4, 0, 0], [1, 5, 0, 0], [2, 6, 0, 0], [3, 7, 0, 0]]]


@pytest.mark.parametrize(
    "size, rows, columns",
    [
        ((3, 5), 2, 4),  # 3 * 4/5 = 2.4
        ((5, 8), 3, 4),  # 5 * 4/8 = 2.5 rounds up, as SAM's own resizing does
        ((1, 100), 1, 4),  # never less than one row
        ((6, 6), 4, 4),
        ((7, 2), 4, 1),  # 2 * 4/7 = 1.14
        ((2, 1), 4, 2),  # smaller images are enlarged
    ],
)
def test_the_longest_side_of_a_mask_prompt_fills_the_frame(size, rows, columns):
    prompt = mask_prompt(torch.ones(2, *size), 4, -10.0)
    expected = torch.full((4, 4), -10.0)
    expected[:rows, :columns] = 1.0
    torch.testing.assert_close(prompt, expected.expand(2, 4, 4))


def test_shrinking_a_map_looks_at_every_pixel():
    """Bilinear with antialias at half size: weights 1, 3, 3, 1 of eight, renormalised at the border."""
    image_map = torch.zeros(1, 8, 8)
    image_map[0, :, 2] = 8.0
    prompt = mask_prompt(image_map, 4, 0.0)
    torch.testing.assert_close(prompt[0, 1], torch.tensor([8 / 7, 3.0, 0.0, 0.0]))


@pytest.fixture
def batch():
    """Five maps over three images of different shapes, out of order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "similarity_map": torch.randn(5, 4, 4, generator=generator),
        "segment_image": torch.tensor([2, 0, 1, 0, 2]),
        "image_sizes": [(50, 50), (20, 41), (96, 60)],
    }


def prompts_of(batch, padding_value=-10.0):
    frames = ImageFrame("letterbox", 32), ImageFrame("letterbox", 16)
    return build_mask_prompts(**batch, lmm_frame=frames[0], prompt_frame=frames[1], padding_value=padding_value)


def test_mask_prompts_equal_the_loop_over_single_images(batch):
    prompts = prompts_of(batch)
    assert prompts.shape == (5, 16, 16)
    for segment, image in enumerate(batch["segment_image"].tolist()):
        alone = {
            "similarity_map": batch["similarity_map"][segment : segment + 1],
            "segment_image": torch.tensor([0]),
            "image_sizes": [batch["image_sizes"][image]],
        }
        torch.testing.assert_close(prompts[segment], prompts_of(alone)[0])


def resize(maps, size, **options):
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False, **options)[:, 0]


def test_mask_prompts_are_what_resizing_step_by_step_gives(batch):
    """To the frame, out of it what is image, to the image's pixels, to the head's frame, padded."""
    prompts, padding_value = prompts_of(batch), -10.0
    valid, inside = [(32, 32), (16, 32), (32, 20)], [(16, 16), (8, 16), (16, 10)]
    for segment, image in enumerate(batch["segment_image"].tolist()):
        maps = batch["similarity_map"][segment : segment + 1]
        rows, columns = valid[image]
        pixels = resize(resize(maps, (32, 32))[:, :rows, :columns], batch["image_sizes"][image])
        rows, columns = inside[image]
        small = resize(pixels, (rows, columns), antialias=True)
        expected = F.pad(small, (0, 16 - columns, 0, 16 - rows), value=padding_value)[0]
        torch.testing.assert_close(prompts[segment], expected, atol=2e-6, rtol=0)
        matrices = grid_to_grid(
            (4, 4), ImageFrame("letterbox", 32), batch["image_sizes"][image], ImageFrame("letterbox", 16)
        )
        found = apply_matrices(maps, *matrices)[0, :rows, :columns]
        torch.testing.assert_close(found, expected[:rows, :columns], atol=2e-6, rtol=0)


@pytest.mark.parametrize("padding_value", [0.0, -10.0])
def test_mask_prompts_say_nothing_outside_of_the_image(batch, padding_value):
    batch["similarity_map"] = batch["similarity_map"].abs() + 1.0
    prompts = prompts_of(batch, padding_value)
    # 20 x 41 pixels fill 8 of 16 rows (20 * 16/41 = 7.8), 96 x 60 fill 10 of 16 columns.
    assert (prompts[2, 8:] == padding_value).all() and (prompts[2, :8] > 0.9).all()
    assert (prompts[0, :, 10:] == padding_value).all() and (prompts[0, :, :10] > 0.9).all()
    assert (prompts[1] > 0.9).all()


def test_gradients_of_mask_prompts_reach_every_map(batch):
    batch["similarity_map"].requires_grad_()
    prompts_of(batch).sum().backward()
    assert (batch["similarity_map"].grad.abs().sum((1, 2)) > 0).all()


def test_no_mask_prompts_without_segments(batch):
    batch["similarity_map"], batch["segment_image"] = torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.long)
    assert prompts_of(batch).shape == (0, 16, 16)


def test_a_true_logit_is_padded_with_surely_nothing():
    assert PADDING_VALUE["minmax"] == 0.0
    assert 1 / (1 + math.exp(-PADDING_VALUE["scaled"])) < 1e-4
