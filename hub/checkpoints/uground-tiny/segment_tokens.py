"""Segments: which positions stand for one, and what is read there.

In text a segment is one `[SEG]`; inside it stands for K ids in a row, and each of them is predicted by the position
before it. K is 1 but for systems that read several states per object.
"""

from dataclasses import dataclass, replace

import torch

from .layer_states import ImageStates, run_starts
from .output_uground import UGroundImageEmbeddings


@dataclass
class Segments:
    """
    N segments in reading order, read off a pass of the LMM.

    Attributes:
        row (`(N,)`, int64): row of each.
        states (`(N, K, L+1, D)`): states of the positions that predicted its ids.
        image (`(N,)`, int64): image of each.
        token_row (`(N,)`, int64): row of `image_states` that holds the image tokens of each.
        image_states: of the image tokens.
        images: the encoded images.
        columns (`(N, K)`, int64, *optional*): of these positions, for segments of a teacher-forced pass.
    """

    row: torch.Tensor
    states: torch.Tensor
    image: torch.Tensor
    token_row: torch.Tensor
    image_states: ImageStates
    images: UGroundImageEmbeddings
    columns: torch.Tensor | None = None

    @property
    def cells(self) -> torch.Tensor:
        """`(N, n)`: cells that the image tokens of each show, see `TokenLayout`."""
        cells = self.images.token_cells
        return cells[self.image.to(cells.device)].to(self.states.device)

    @property
    def in_grid(self) -> torch.Tensor:
        """`(N, h, w)` bool: cells of each one's own grid."""
        images, (rows, columns) = self.images, self.images.token_valid.shape[1:]
        sizes = images.grid_sizes[self.image.to(images.grid_sizes.device)].to(self.states.device)[..., None, None]
        device = self.states.device
        return (torch.arange(rows, device=device)[:, None] < sizes[:, 0]) & (
            torch.arange(columns, device=device) < sizes[:, 1]
        )

    def __len__(self) -> int:
        return self.row.shape[0]

    def select(self, segments: torch.Tensor) -> "Segments":
        """Some of them, by their numbers, which may repeat."""
        chosen = {name: getattr(self, name)[segments] for name in ("row", "states", "image", "token_row")}
        return replace(self, columns=None, **chosen)


@dataclass
class LayerRequest:
    """
    How a call wants the layers of N segments chosen.

    Attributes:
        index (`(N,)`, *optional*): the layers themselves.
        selection, num_samples (*optional*): replace `config.layer_selection` and `config.num_layer_samples`.
        uniforms (`(k, M)`, in [0, 1), *optional*): draw k layers for each of the first M segments with these numbers;
            masks are read at the first draw.
    """

    index: torch.Tensor | None = None
    selection: str | int | None = None
    num_samples: int | None = None
    uniforms: torch.Tensor | None = None


def find_segments(
    input_ids: torch.Tensor, segment_token_id: int, num_ids: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Segments in reading order.

    Args:
        input_ids (`(B, T)`).
        segment_token_id: id of `[SEG]`.
        num_ids: K; a run of fewer ids at the end of a longer run is none.

    Returns:
        rows `(N,)` and columns `(N, K)` of the positions that *predict* the ids of each segment, one before each.

    Raises:
        ValueError: a row begins with the segment token, so that nothing predicts it.
    """
    is_segment = input_ids == segment_token_id
    if is_segment[:, :1].any():
        raise ValueError("a row of input_ids begins with the segment token; it needs at least one token before it")
    if num_ids == 1:
        rows, columns = is_segment.nonzero(as_tuple=True)
        return rows, columns[:, None] - 1
    starts = run_starts(is_segment, num_ids)
    rows, columns = starts.nonzero(as_tuple=True)
    return rows, columns[:, None] - 1 + torch.arange(num_ids, device=columns.device)
