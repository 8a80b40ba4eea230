"""SasP against its definition, pixel by pixel: other constants, tall images, and sides whose padding is -1."""

import pytest
import torch
from torch.nn import functional as F

from uground.modeling_uground.image_frames import ImageFrame
from uground.modeling_uground.prompt_points import PointSettings, similarity_points

FRAME, SAM_FRAME = ImageFrame("centre_crop", 336), ImageFrame("letterbox", 1024)


def padding(side: int, image_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """What is added on the left, right, top and bottom of the square that the crop shows."""
    scale = side / min(image_hw)
    down, across = ((int(length * scale) - side) // 2 for length in image_hw)
    return across, across, down, down


def resize(values: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def by_definition(similarity: torch.Tensor, image_hw: tuple[int, int], settings: PointSettings):
    """Points in image pixels and labels of one map `(24, 24)`."""
    height, width = image_hw
    scaled = (similarity - similarity.min()) / (similarity.max() - similarity.min())
    image_map = resize(F.pad(resize(scaled, (336, 336)), padding(336, image_hw)), image_hw).double()
    side = 24 // settings.downsample
    grid = resize(similarity, (side, side))
    grid = F.pad((grid - grid.min()) / (grid.max() - grid.min()), padding(side, image_hw), value=-1.0)
    rows, columns = grid.shape
    values = grid.flatten().tolist()
    high, low = settings.thresholds
    positive = sorted((i for i, v in enumerate(values) if v >= high), key=lambda i: -values[i])
    negative = sorted((i for i, v in enumerate(values) if 0 <= v <= low), key=lambda i: values[i])
    neutral = [i for i, v in enumerate(values) if low < v < high]
    chosen = [(i, 1) for i in positive] + [(i, 0) for i in negative] + [(i, -1) for i in neutral]
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    points = []
    for cell, _ in chosen[: settings.num_points]:
        across, down = torch.tensor([cell % columns + 0.5, cell // columns + 0.5]).tolist()
        px = int((torch.tensor(across) * (width / columns)).clamp(max=width - 1))
        py = int((torch.tensor(down) * (height / rows)).clamp(max=height - 1))
        weight = (image_map - (x - px) ** 2 - (y - py) ** 2).flatten().softmax(0)
        points.append([(weight * x.flatten()).sum().item(), (weight * y.flatten()).sum().item()])
    return torch.tensor(points), [label for _, label in chosen[: settings.num_points]]


def is_one_ring_short(side: int, image_hw) -> bool:
    return min(padding(side, image_hw)) == -1


@pytest.mark.parametrize("settings", [PointSettings(60, (0.6, 0.2), 1), PointSettings(30, (0.8, 0.2), 2)], ids=str)
@pytest.mark.parametrize("image_hw", [(94, 130), (120, 94), (94, 94), (285, 300), (333, 291), (60, 60), (97, 61)])
def test_points_are_those_of_the_definition(image_hw, settings):
    generator = torch.Generator().manual_seed(sum(image_hw))
    similarity = torch.randn(3, 24, 24, generator=generator).cumsum(1).cumsum(2)
    found, labels = similarity_points(
        similarity, torch.zeros(3, dtype=torch.long), [image_hw], FRAME, settings, SAM_FRAME
    )
    longest = 1024 / max(image_hw)
    scale = torch.tensor([int(length * longest + 0.5) / length for length in image_hw[::-1]])
    for number in range(3):
        points, kinds = by_definition(similarity[number], image_hw, settings)
        assert labels[number].tolist() == kinds
        assert (found[number] / scale - points).abs().max() <= 1e-4


def test_there_are_sides_whose_padding_is_minus_one():
    assert is_one_ring_short(24, (94, 130)) and is_one_ring_short(12, (120, 94)) and is_one_ring_short(336, (333, 291))
    assert not is_one_ring_short(24, (60, 60))
