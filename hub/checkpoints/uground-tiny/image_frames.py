"""Frames: which pixels of an image a tower sees, and every change of pixels between image and frame.

A frame is a square of `side` pixels (or cells, or logits: any grid that covers the tower's input evenly). Along each
axis the whole image lies in a *window* of it, two numbers that may reach outside of the frame where the frame shows
only a part of the image:

- `letterbox`: the longest side fills the frame, the rest is padding behind it: window `(0, rows that are image)`;
- `stretch`: both sides fill the frame: window `(0, side)`;
- `centre_crop`: the shortest side fills the frame and the ends of the other are cut off: window `(-pad, side + pad)`.

All resizing here is linear and separable, so a change of pixels is two small matrices per image, one per axis:
`rows @ values @ columns.T`. They are made by resizing the identity with PyTorch's own interpolation, hence equal it to
rounding, and nothing of the size of an image times the size of a grid is ever made. They depend on sizes only and are
remembered.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

FRAMES = ("letterbox", "centre_crop", "stretch")
# Matrices kept of each kind: at 4,000 pixels and 24 cells one takes 384 kB.
REMEMBERED = 256


@dataclass(frozen=True)
class ImageFrame:
    """
    How a square of `side` cells lies over an image.

    Args:
        kind: one of `FRAMES`.
        side: cells along each axis, or, with `width`, along rows.
        width (*optional*): cells along columns, of a `stretch` that is no square.
    """

    kind: str
    side: int
    width: int | None = None

    def __post_init__(self):
        if self.kind not in FRAMES:
            raise ValueError(f"a frame must be one of {FRAMES}, got {self.kind!r}")
        if self.side < 1:
            raise ValueError(f"the side of a frame must be at least 1, got {self.side}")
        if self.width is not None and (self.kind != "stretch" or self.width < 1):
            raise ValueError(f"the width of a frame must be at least 1 and is for 'stretch' only, got {self.width}")

    @property
    def hw(self) -> tuple[int, int]:
        """Cells along rows and columns."""
        return self.side, self.side if self.width is None else self.width

    def windows(self, image_hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        First and last-but-one cell of the image along rows and columns.

        The roundings are those of the released models: SAM's for `letterbox`; READ's for `centre_crop`, which
        truncates the scaled side and halves what sticks out downwards, by which the frame may be one cell wider than
        the image.
        """
        if self.kind == "stretch":
            return (0, self.hw[0]), (0, self.hw[1])
        return self._window(image_hw[0], image_hw), self._window(image_hw[1], image_hw)

    def _window(self, length: int, image_hw: tuple[int, int]) -> tuple[int, int]:
        if self.kind == "letterbox":
            return 0, max(1, int(length * (self.side / max(image_hw)) + 0.5))
        padding = (int(length * (self.side / min(image_hw))) - self.side) // 2
        return -padding, self.side + padding

    def resized(self, side: int, width: int | None = None) -> "ImageFrame":
        """The same frame in cells of another size, as many along both axes but for a `stretch` of another `width`."""
        return ImageFrame(self.kind, side, None if width == side else width)

    def of_image(self, image: int) -> "ImageFrame":
        """The frame of one image; see [`ImageFrames`]."""
        return self

    def own_grid(self, maps: torch.Tensor, image: int) -> torch.Tensor:
        """What of maps `(…, h, w)` is the token grid of one image: all."""
        return maps

    def points_to_frame(self, points: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """Points `(…, 2)`, x and y in pixels of the image, in cells of the frame; float32."""
        rows, columns = self.windows(image_hw)
        scale = [(end - start) / length for (start, end), length in zip((columns, rows), image_hw[::-1], strict=True)]
        return points.float() * points.new_tensor(scale, dtype=torch.float32) + points.new_tensor(
            [columns[0], rows[0]], dtype=torch.float32
        )


@dataclass(frozen=True)
class ImageFrames:
    """
    Frames of images that each have their own.

    Attributes:
        frames: of each image, in pixels.
        grids: rows and columns of each image's own token grid, at the top left of a grid as large as the largest.
    """

    frames: tuple[ImageFrame, ...]
    grids: tuple[tuple[int, int], ...]

    def of_image(self, image: int) -> ImageFrame:
        """The frame of one image."""
        return self.frames[image]

    def own_grid(self, maps: torch.Tensor, image: int) -> torch.Tensor:
        """What of maps `(…, h, w)` is the token grid of one image."""
        rows, columns = self.grids[image]
        return maps[..., :rows, :columns]


def resize_rows(matrix: torch.Tensor, length: int, mode: str = "bilinear") -> torch.Tensor:
    """
    Resize the first axis of `(n, m)` to `length`.

    Args:
        matrix: any values.
        length: rows of the result.
        mode: `"bilinear"`; `"antialias"`, bilinear with a filter as wide as the step where rows become fewer; or
            `"area"`, the mean over whole rows.
    """
    options: dict[str, Any] = {"mode": "area"} if mode == "area" else {"mode": "bilinear", "align_corners": False}
    if mode == "antialias":
        options["antialias"] = True
    return F.interpolate(matrix[None, None], size=(length, matrix.shape[1]), **options)[0, 0]


@lru_cache(REMEMBERED)
def _grid_to_image(grid: int, side: int, window: tuple[int, int], length: int) -> torch.Tensor:
    """Along one axis: `(length, grid)` float32, zero where the frame shows nothing of the image."""
    start, end = window
    pixels = resize_rows(torch.eye(grid), side)
    seen = pixels[max(start, 0) : min(end, side)]
    in_window = F.pad(seen, (0, 0, max(-start, 0), max(end - side, 0)))
    return resize_rows(in_window, length)


def grid_to_image(
    grid_hw: tuple[int, int],
    frame: ImageFrame,
    image_hw: tuple[int, int],
    windows: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    From a grid that covers a frame evenly to the pixels of the image: bilinear to the frame, out of it what is image,
    bilinear to the image's size.

    Args:
        grid_hw: rows and columns of the grid: image tokens, or low-resolution mask logits.
        frame: in pixels.
        image_hw: height and width of the result.
        windows: where the image lies in the frame, if the frame's own rounding does not say.

    Returns:
        rows `(H, h)` and columns `(W, w)`, float32 on the CPU; values outside of the frame are 0.
    """
    windows = frame.windows(image_hw) if windows is None else windows
    rows, columns = (
        _grid_to_image(grid, side, window, length)
        for grid, side, window, length in zip(grid_hw, frame.hw, windows, image_hw, strict=True)
    )
    return rows, columns


@lru_cache(REMEMBERED)
def _grid_to_grid(
    grid: int, side: int, window: tuple[int, int], length: int, other_side: int, other_window: tuple[int, int], mode
) -> torch.Tensor:
    """Along one axis, by way of the image's pixels: `(other_side, grid)`, zero outside of the other window."""
    start, end = other_window
    resized = resize_rows(_grid_to_image(grid, side, window, length), end - start, mode)
    inside = resized[max(-start, 0) : max(-start, 0) + other_side]
    before = max(start, 0)
    return F.pad(inside, (0, 0, before, other_side - before - len(inside)))


def grid_to_grid(
    grid_hw: tuple[int, int],
    frame: ImageFrame,
    image_hw: tuple[int, int],
    other: ImageFrame,
    windows: tuple[tuple[int, int], tuple[int, int]] | None = None,
    mode: str = "antialias",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    From a grid over one frame to the cells of another frame of the same image, by way of the image's own pixels.

    Args:
        grid_hw, frame, image_hw, windows: as in [`grid_to_image`].
        other: the frame of the result, in its cells.
        mode: how the image is shrunk, see [`resize_rows`].

    Returns:
        rows `(side, h)` and columns `(side, w)`, float32 on the CPU; zero where the other frame is padding.
    """
    windows = frame.windows(image_hw) if windows is None else windows
    rows, columns = (
        _grid_to_grid(grid, side, window, length, other_side, other_window, mode)
        for grid, side, window, length, other_side, other_window in zip(
            grid_hw, frame.hw, windows, image_hw, other.hw, other.windows(image_hw), strict=True
        )
    )
    return rows, columns


def apply_matrices(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """
    `rows @ values @ columns.T`, in float32 at least, whatever the surrounding precision.

    Args:
        values (`(n, h, w)`).
        rows, columns (`(H, h)`, `(W, w)`, or with an axis of n in front).
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    with torch.autocast(values.device.type, enabled=False):
        return rows.to(dtype) @ values.to(dtype) @ columns.to(dtype).mT


def inside_windows(frame: ImageFrame, image_hw: tuple[int, int]) -> torch.Tensor:
    """`(side, side)` bool: cells of the frame that show image and not padding."""
    axes = []
    for side, (start, end) in zip(frame.hw, frame.windows(image_hw), strict=True):
        cells = torch.arange(side)
        axes.append((cells >= start) & (cells < end))
    return axes[0][:, None] & axes[1]


def letterbox_mask(mask: np.ndarray, side: int) -> torch.Tensor:
    """
    A mask of an image in the letterbox of so many cells.

    Args:
        mask (`(H, W)`, bool).
        side: of the frame.

    Returns:
        `(side, side)` float32: which share of each cell is mask, in 0..1.
    """
    (_, rows), (_, columns) = ImageFrame("letterbox", side).windows(mask.shape)
    shrunk = F.interpolate(torch.from_numpy(mask).float()[None, None], size=(rows, columns), mode="area")[0, 0]
    return F.pad(shrunk, (0, side - columns, 0, side - rows))


__all__ = [
    "FRAMES",
    "ImageFrame",
    "ImageFrames",
    "apply_matrices",
    "grid_to_grid",
    "grid_to_image",
    "inside_windows",
    "letterbox_mask",
    "resize_rows",
]
