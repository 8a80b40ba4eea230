"""SasP: a similarity map as points for SAM (READ, section on similarity as points).

Cells of the map where it is high become positive points, cells where it is low negative ones, and what lies between
neutral ones, of which SAM learns only that they exist. Which cells are chosen has no gradient; *where* a point lies is
made differentiable by the discrete-to-continuous step: a point is the mean of the pixels around it, weighted by their
closeness and by the map.

What the official code does is done here, its roundings included, because they are part of what released weights were
trained with. Where it fails (several segments in a row, rows without any, a constant map) this gives what its
definitions say.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .image_frames import ImageFrame, ImageFrames, apply_matrices, grid_to_image

POSITIVE, NEGATIVE, NEUTRAL = 1, 0, -1
# What the prompt encoder of transformers leaves out, where there are fewer cells than points.
ABSENT = -10
# The continuous step reads the pixels up to so far from a point: a pixel beyond has less than exp(-36) of its weight.
REACH = 6
# In the order of choice; what lies outside of the frame comes last and is never chosen.
_POSITIVE_GROUP, _NEGATIVE_GROUP, _NEUTRAL_GROUP, _OUTSIDE_GROUP = range(4)


@dataclass(frozen=True)
class PointSettings:
    """
    How many points, and which cells become which kind.

    Args:
        num_points: K.
        thresholds: a cell is positive from the first on and negative up to the second, on the 0..1 scale.
        downsample: cells of the token grid along each axis that become one cell to choose from.
    """

    num_points: int = 30
    thresholds: tuple[float, float] = (0.8, 0.2)
    downsample: int = 2


def minmax(values: torch.Tensor) -> torch.Tensor:
    """`(N, h, w)` to [0, 1], each map by itself; a constant one becomes zeros, with finite gradients."""
    low = values.amin((-2, -1), keepdim=True)
    span = values.amax((-2, -1), keepdim=True) - low
    return (values - low) / torch.where(span > 0, span, torch.ones_like(span))


def select_cells(scores: torch.Tensor, settings: PointSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The first K cells: positive ones from the highest down, negative ones from the lowest up, neutral ones row by row.

    Args:
        scores (`(n, cells)`): in [0, 1]; negative where a cell shows nothing of the image.
        settings: see [`PointSettings`].

    Returns:
        cells `(n, K)` and labels `(n, K)`, int64; `ABSENT` where there are fewer cells than points.
    """
    positive, negative = settings.thresholds
    number = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    group = torch.full_like(number, _NEUTRAL_GROUP)
    group[scores <= negative] = _NEGATIVE_GROUP
    group[scores >= positive] = _POSITIVE_GROUP
    group[scores < 0] = _OUTSIDE_GROUP
    within = torch.where(group == _POSITIVE_GROUP, -scores, torch.where(group == _NEGATIVE_GROUP, scores, 0.0))
    # Stable, so that ties stay in reading order; by group last, which keeps the order within each.
    order = within.argsort(dim=1, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))[:, : settings.num_points]
    order = F.pad(order, (0, settings.num_points - order.shape[1]), value=0)
    labels_of = torch.tensor([POSITIVE, NEGATIVE, NEUTRAL, ABSENT], device=scores.device)
    labels = labels_of[group.gather(1, order)]
    labels[:, scores.shape[1] :] = ABSENT
    return order, labels


def selection_grid(similarity: torch.Tensor, frame: ImageFrame, image_hw: tuple[int, int]) -> torch.Tensor:
    """
    The map that cells are chosen on.

    Args:
        similarity (`(n, h, w)`): raw dot products of segments of one image.
        frame: of the LMM, in the cells that are chosen from.
        image_hw: height and width of the image.

    Returns:
        `(n, rows, columns)` over the whole image, in [0, 1]; -1 where the frame shows nothing of it.
    """
    shrunk = similarity
    height, width = frame.hw
    if tuple(similarity.shape[-2:]) != frame.hw:
        shrunk = F.interpolate(similarity[:, None], size=frame.hw, mode="bilinear", align_corners=False)[:, 0]
    (top, bottom), (left, right) = frame.windows(image_hw)
    # A negative padding cuts off.
    return F.pad(minmax(shrunk), (-left, right - width, -top, bottom - height), value=-1.0)


def cell_centres(cells: torch.Tensor, grid_hw: tuple[int, int], image_hw: tuple[int, int]) -> torch.Tensor:
    """
    Whole pixels at the centres of cells, x and y.

    In float32 and cut to whole numbers, as the official code does: float64 gives another pixel at some sizes.
    """
    (rows, columns), (height, width) = grid_hw, image_hw
    axes = ((cells % columns, columns, width), (cells // columns, rows, height))
    return torch.stack(
        [((number + 0.5) * (length / count)).clamp(max=length - 1).long() for number, count, length in axes], -1
    )


def continuous_points(
    image_map: tuple[torch.Tensor, torch.Tensor, torch.Tensor], centres: torch.Tensor
) -> torch.Tensor:
    """
    Discrete to continuous: the mean of the pixels g around a point p, weighted by exp(map(g) - |g - p|^2).

    Args:
        image_map: the map `(n, h, w)` and the matrices `(H, h)`, `(W, w)` that bring it to image pixels.
        centres (`(n, K, 2)`, int64): x and y.

    Returns:
        `(n, K, 2)` float32 x and y in image pixels, differentiable in the map. Memory is n·K·(2·REACH + 1)², whatever
        the size of the image.
    """
    values, rows, columns = image_map
    offsets = torch.arange(-REACH, REACH + 1, device=centres.device)
    weights, distances = [], []
    for matrix, centre in ((rows, centres[..., 1]), (columns, centres[..., 0])):
        place = centre[..., None] + offsets
        inside = (place >= 0) & (place < len(matrix))
        weights.append(matrix[place.clamp(0, len(matrix) - 1)])
        distance = offsets.float().square().expand(place.shape)
        distances.append(distance.masked_fill(~inside, math.inf))
    y_distance, x_distance = distances
    # Only the window around each point is ever in image pixels: (n, K, 2·REACH + 1, 2·REACH + 1).
    window = apply_matrices(values[:, None], weights[0], weights[1])
    logits = window - y_distance[..., :, None] - x_distance[..., None, :]
    share = logits.flatten(-2).softmax(-1).view_as(logits)
    # The mean of what is left and right of the centre: of whole coordinates the sum would round a hundred times more.
    return centres + torch.stack([(share.sum(-2) * offsets).sum(-1), (share.sum(-1) * offsets).sum(-1)], -1)


def similarity_points(
    similarity: torch.Tensor,
    segment_image: torch.Tensor,
    image_sizes: list[tuple[int, int]],
    lmm_frame: ImageFrame | ImageFrames,
    settings: PointSettings,
    sam_frame: ImageFrame,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Points of N segments over any number of images.

    Args:
        similarity (`(N, h, w)`): raw dot products.
        segment_image (`(N,)`): image of each segment.
        image_sizes: height and width of each image.
        lmm_frame: of the LMM, in pixels.
        settings: see [`PointSettings`].
        sam_frame: of the mask decoder, in pixels.

    Returns:
        points `(N, K, 2)` float32, x and y in pixels of the SAM frame, as the prompt encoder takes them; labels
        `(N, K)` int64: 1 positive, 0 negative, -1 neutral, -10 absent.
    """
    count = settings.num_points
    points = similarity.new_zeros((len(similarity), count, 2), dtype=torch.float32)
    labels = torch.full((len(similarity), count), ABSENT, device=similarity.device)
    for image in segment_image.unique().tolist():
        chosen = (segment_image == image).nonzero().squeeze(-1)
        raw, image_hw = lmm_frame.own_grid(similarity[chosen].float(), image), image_sizes[image]
        frame, cells_hw = lmm_frame.of_image(image), [max(1, n // settings.downsample) for n in raw.shape[1:]]
        scores = selection_grid(raw.detach(), frame.resized(*cells_hw), image_hw)
        cells, labels_here = select_cells(scores.flatten(1), settings)
        centres = cell_centres(cells, tuple(scores.shape[1:]), image_hw)
        matrices = [m.to(raw.device) for m in grid_to_image(tuple(raw.shape[1:]), frame, image_hw)]
        continuous = continuous_points((minmax(raw), *matrices), centres)
        points = points.index_copy(0, chosen, sam_frame.points_to_frame(continuous, image_hw))
        labels = labels.index_copy(0, chosen, labels_here)
    return points, labels


__all__ = ["PointSettings", "minmax", "select_cells", "similarity_points"]
