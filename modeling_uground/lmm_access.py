"""What UGround needs of an LMM: image features with masked padding, masks and positions, and states at positions.

Nothing here belongs to one model instance: functions take tensors, or the LMM they ask.
"""

import inspect

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Under which name forwards, their outputs and `generate` take and give keys and values: "past_key_values" until
# transformers 5.23, "cache" since then. One name holds for all models of a version, remote ones included.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def token_validity(valid_sizes: torch.Tensor, grid_hw: tuple[int, int], patch_size: int) -> torch.Tensor:
    """
    Which image tokens see image and which see padding only.

    A patch is valid when its first pixel lies inside the image: the nearest-neighbour down-sampling of the pixel
    mask that the official code uses.

    Args:
        valid_sizes (`(I, 2)`, int): rows and columns of the letterboxed LMM image that are image.
        grid_hw: rows and columns of the token grid.
        patch_size: side of a patch in pixels.

    Returns:
        `(I, h, w)` bool.
    """
    rows = torch.arange(grid_hw[0], device=valid_sizes.device) * patch_size
    columns = torch.arange(grid_hw[1], device=valid_sizes.device) * patch_size
    inside_rows = rows[None, :] < valid_sizes[:, :1]
    inside_columns = columns[None, :] < valid_sizes[:, 1:]
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def vision_key_mask(token_valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """
    Additive attention mask `(I, 1, 1, 1 + h*w)` of a CLIP tower that hides padded patches, `None` if there are none.

    The class token, in front of the patches, is always valid.
    """
    if token_valid.all():
        return None
    keys = nn.functional.pad(token_valid.flatten(1), (1, 0), value=True)
    mask = torch.zeros(keys.shape, dtype=dtype, device=token_valid.device)
    return mask.masked_fill(~keys, torch.finfo(dtype).min)[:, None, None, :]


def encode_lmm_images(lmm: nn.Module, pixel_values: torch.Tensor, token_valid: torch.Tensor) -> torch.Tensor:
    """
    Run the LMM's vision tower and projector, padded patches masked as attention keys.

    Args:
        lmm: the trunk.
        pixel_values (`(I, 3, h, w)`): letterboxed images.
        token_valid (`(I, h, w)`, bool): see [`token_validity`].

    Returns:
        `(I, h*w, D)` features in the LMM's embedding space.
    """
    dtype = lmm.get_input_embeddings().weight.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    mask = vision_key_mask(token_valid, dtype)
    arguments = {} if mask is None else {"attention_mask": mask}
    features = lmm.get_image_features(pixel_values.to(dtype), return_dict=True, **arguments).pooler_output
    return torch.stack(list(features))


def image_token_positions(input_ids: torch.Tensor, image_token_id: int, num_image_tokens: int) -> torch.Tensor:
    """
    Columns of the image tokens of each row.

    Returns:
        `(B, num_image_tokens)` int64.

    Raises:
        ValueError: a row holds another number of image tokens than one image has.
    """
    is_image = input_ids == image_token_id
    counts = is_image.sum(-1)
    if not (counts == num_image_tokens).all():
        raise ValueError(
            f"every row of input_ids must hold the {num_image_tokens} image tokens of one image, got {counts.tolist()}"
        )
    return is_image.nonzero()[:, 1].view(len(input_ids), num_image_tokens)


def prepare_lmm_inputs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_positions: torch.Tensor,
    row_features: torch.Tensor,
    row_valid: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> dict:
    """
    Arguments for the LMM's `forward` or `generate`.

    Padded image tokens are masked as keys but keep their place: position ids count every token after the padding in
    front of a row, as the official weights were trained with.

    Args:
        input_ids (`(B, T)`): as the processor returns them.
        attention_mask (`(B, T)`, or `(B, T, T)` bool): tokens that are not text padding; or which keys each token
            may see, for rows that pack several queries behind one image.
        image_positions (`(B, n)`): columns of the image tokens.
        row_features (`(B, n, D)`): image features of each row's image.
        row_valid (`(B, h, w)`, bool): validity of each row's image tokens.
        position_ids (`(B, T)`, *optional*): by default each token counts those before it; packed rows need them.

    Raises:
        ValueError: packed rows without `position_ids`.
    """
    if position_ids is None:
        if attention_mask.dim() == 3:
            raise ValueError("position_ids are needed with an attention_mask of shape (B, T, T)")
        # Padding behind a row counts on, as in the official code; only padding in front of it does not.
        in_front = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        position_ids = (torch.arange(attention_mask.shape[1], device=attention_mask.device) - in_front).clamp_min(0)
    if attention_mask.dim() == 2:
        mask = attention_mask.scatter(1, image_positions, row_valid.flatten(1).to(attention_mask.dtype))
    else:
        key_valid = torch.ones_like(input_ids, dtype=torch.bool).scatter(1, image_positions, row_valid.flatten(1))
        mask = _additive_mask(attention_mask & key_valid[:, None], row_features.dtype)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": position_ids,
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(row_features))},
    }


def _additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(B, T, T)` bool to the `(B, 1, T, T)` mask that attention adds; padding, which sees nothing, sees itself."""
    blind = ~allowed.any(-1, keepdim=True)
    allowed = allowed | (blind & torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def find_segments(input_ids: torch.Tensor, segment_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Segment tokens in reading order.

    Returns:
        rows `(N,)` and columns `(N,)` of the positions that *predict* the segment tokens, one before each.

    Raises:
        ValueError: a row begins with the segment token, so that nothing predicts it.
    """
    rows, columns = (input_ids == segment_token_id).nonzero(as_tuple=True)
    if (columns == 0).any():
        raise ValueError("a row of input_ids begins with the segment token; it needs at least one token before it")
    return rows, columns - 1


def gather_layer_states(
    hidden_states: tuple[torch.Tensor, ...], rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """States of N positions at all layers: L+1 tensors `(B, T, D)` to `(N, L+1, D)`."""
    device = hidden_states[-1].device
    return torch.stack(
        [state[rows.to(state.device), columns.to(state.device)].to(device) for state in hidden_states], 1
    )


def image_similarity(
    segment_states: torch.Tensor,
    hidden_states: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    layer_index: torch.Tensor,
    image_positions: torch.Tensor,
) -> torch.Tensor:
    """
    Dot product of each segment state with the image tokens of its row, at its layer only, in float32.

    Segments that read the same tokens read them together: a copy for each would be most of the memory.

    Args:
        segment_states (`(N, D)`): each at its segment's layer.
        hidden_states: L+1 tensors `(G, T, D)`.
        rows, layer_index (`(N,)`): row and layer of each segment.
        image_positions (`(G, n)`): columns of the image tokens.

    Returns:
        `(N, n)` raw dot products.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for segment, place in enumerate(zip(rows.tolist(), layer_index.tolist(), strict=True)):
        groups.setdefault(place, []).append(segment)
    similarity = segment_states.new_zeros((len(segment_states), image_positions.shape[1]), dtype=torch.float32)
    # Mixed precision would turn the products to bfloat16.
    with torch.autocast(similarity.device.type, enabled=False):
        for (row, layer), segments in groups.items():
            state = hidden_states[layer][row]
            tokens = state[image_positions[row].to(state.device)].to(segment_states.device)
            similarity[segments] = segment_states[segments].float() @ tokens.float().T
    return similarity
