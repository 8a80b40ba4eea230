"""Maps and mask logits in the pixels of their targets, for every kind of frame, and losses without some parts."""

import pytest
import torch
from torch.nn import functional as F

from uground.modeling_uground import UGroundOutput
from uground.modeling_uground.image_frames import ImageFrame
from uground.training.objectives.grounding_terms import (
    GROUNDING_TERMS,
    Geometry,
    MapTarget,
    connected_zero,
    grounding_terms,
)
from uground.training.objectives.losses import LossWeights

HEAD = ImageFrame("letterbox", 64)


def group_of(sizes, hw: tuple[int, int], in_frame: bool) -> dict:
    """Targets of `hw` pixels, one for each of some images; ones on the left, zeros on the right."""
    masks = torch.zeros(len(sizes), *hw)
    masks[:, :, : hw[1] // 2] = 1.0
    number = torch.arange(len(sizes))
    valid = torch.ones_like(masks, dtype=torch.bool)
    return {"segments": number, "masks": masks, "valid": valid, "images": number, "in_frame": in_frame}


def resized(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("image_hw", [(150, 101), (33, 50), (40, 40), (7, 91)])
def test_in_letterboxes_maps_and_logits_are_as_interpolated_by_way_of_the_frame(image_hw):
    torch.manual_seed(0)
    lmm = ImageFrame("letterbox", 56)
    geometry = Geometry(lmm, HEAD, (image_hw, image_hw))
    grids = ((lmm, torch.randn(2, 4, 4), geometry.align_maps), (HEAD, torch.randn(2, 16, 16), geometry.align_logits))
    for frame, values, align in grids:
        (_, rows), (_, columns) = frame.windows(image_hw)
        expected = resized(resized(values, (frame.side, frame.side))[:, :rows, :columns], image_hw)
        found = align(values, group_of([image_hw] * 2, image_hw, False))
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        found = align(values, group_of([image_hw] * 2, (24, 24), True))
        torch.testing.assert_close(found, resized(values, (24, 24)), atol=2e-6, rtol=0)
    assert geometry.seen(group_of([image_hw] * 2, image_hw, False)).all()


def test_a_crop_shows_the_middle_of_a_wide_image():
    image_hw, maps = (4, 8), torch.arange(16.0).view(1, 4, 4)
    geometry = Geometry(ImageFrame("centre_crop", 4), None, (image_hw,))
    group = group_of([image_hw], image_hw, False)
    torch.testing.assert_close(geometry.align_maps(maps, group), F.pad(maps, (2, 2)))
    assert torch.equal(geometry.seen(group), F.pad(torch.ones(1, 4, 4, dtype=torch.bool), (2, 2)))
    group = group_of([image_hw], (8, 8), True)
    torch.testing.assert_close(geometry.align_maps(maps, group), F.pad(maps, (2, 2, 0, 4)))
    assert torch.equal(geometry.seen(group), F.pad(torch.ones(1, 4, 4, dtype=torch.bool), (2, 2, 0, 4)))


def test_a_stretched_frame_shows_all_of_images_of_any_shape():
    sizes, maps = ((4, 8), (8, 4)), torch.arange(16.0).view(1, 4, 4).repeat(2, 1, 1)
    geometry = Geometry(ImageFrame("stretch", 4), None, sizes)
    found = geometry.align_maps(maps[:1], group_of(sizes[:1], sizes[0], False))
    torch.testing.assert_close(found, resized(maps[:1], sizes[0]))
    # Of both images in one letterbox: beside each other they lie differently.
    group = group_of(sizes, (8, 8), True)
    found = geometry.align_maps(maps, group)
    torch.testing.assert_close(found[0], F.pad(resized(maps[:1], (4, 8))[0], (0, 0, 0, 4)))
    torch.testing.assert_close(found[1], F.pad(resized(maps[:1], (8, 4))[0], (0, 4)))
    shown = torch.ones(4, 8, dtype=torch.bool)
    assert torch.equal(geometry.seen(group), torch.stack([F.pad(shown, (0, 0, 0, 4)), F.pad(shown.T, (0, 4))]))


def test_what_the_lmm_does_not_see_of_an_image_has_no_map_loss():
    image_hw = (4, 8)
    geometry = Geometry(ImageFrame("centre_crop", 4), None, (image_hw,))
    target, number = MapTarget(kernel_size=1), torch.zeros(1, dtype=torch.long)
    outputs = UGroundOutput(segment_row=number, similarity_map=torch.randn(1, 4, 4))
    found = grounding_terms(outputs, [group_of([image_hw], image_hw, False)], 1, target, geometry)
    cropped = group_of([(4, 4)], (4, 4), False)
    alone = grounding_terms(outputs, [cropped], 1, target, Geometry(ImageFrame("stretch", 4), None, ((4, 4),)))
    for name in ("map_bce", "map_dice"):
        torch.testing.assert_close(found.terms[name], alone.terms[name])
    torch.testing.assert_close(found.rewards, alone.rewards)


def test_terms_of_parts_that_are_not_there_are_zero():
    outputs = UGroundOutput(segment_row=torch.zeros(1).long(), similarity_map=torch.randn(1, 4, 4, requires_grad=True))
    geometry = Geometry(ImageFrame("letterbox", 8), None, ((8, 8),))
    found = grounding_terms(outputs, [group_of([(8, 8)], (8, 8), False)], 1, MapTarget(3, 1.0), geometry)
    assert set(found.terms) == set(GROUNDING_TERMS)
    assert {name for name, term in found.terms.items() if term != 0} == {"map_bce", "map_dice"}
    zero = connected_zero(outputs, LossWeights(iou=1.0, entropy=1.0))
    zero.backward()
    assert zero == 0 and outputs.similarity_map.grad is not None
