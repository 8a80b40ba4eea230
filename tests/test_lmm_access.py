"""The adapter of LLaVA: token grid and validity, image features, module names; rows, and states read of a pass."""

import pytest
import torch
from tiny import IMAGE_TOKEN, SEGMENT_TOKEN, tiny_config, tiny_inputs, tiny_model

from uground.modeling_uground.image_frames import ImageFrame
from uground.modeling_uground.layer_states import ImageStates, states_at
from uground.modeling_uground.lmm_access import TokenLayout
from uground.modeling_uground.lmm_families import lmm_adapter
from uground.modeling_uground.lmm_llava import LlavaAdapter, vision_key_mask
from uground.modeling_uground.output_uground import UGroundImageEmbeddings
from uground.modeling_uground.query_rows import image_token_columns, prepare_rows
from uground.modeling_uground.similarity import image_similarity


def adapter(side: int = 32, patch: int = 8, kind: type = LlavaAdapter, **tower) -> LlavaAdapter:
    """Of a tower with `side` / `patch` patches along each axis."""
    config = tiny_config().lmm_config
    for name, value in {"image_size": side, "patch_size": patch, **tower}.items():
        setattr(config.vision_config, name, value)
    return kind(config, "letterbox")


class OblongAdapter(LlavaAdapter):
    """A family whose token grid is not square."""

    token_grid_hw = (2, 3)


def test_the_adapter_is_that_of_the_family():
    config = tiny_config()
    assert type(config.adapter) is LlavaAdapter
    assert config.adapter.frame == ImageFrame("letterbox", 32)
    assert config.adapter.token_grid_hw == (4, 4)
    assert tiny_config(image_frame="centre_crop").adapter.frame == ImageFrame("centre_crop", 32)
    with pytest.raises(ValueError, match="the LMM must be of type llava, qwen2_5_vl, qwen3_vl, got 'sam'$"):
        lmm_adapter(config.sam_config, "letterbox")
    with pytest.raises(ValueError, match="image_frame of a llava must be one of .*'letterbox'.*, got 'tiles'$"):
        lmm_adapter(config.lmm_config, "tiles")


def test_names_are_those_of_modules_that_exist():
    model = tiny_model()
    names, modules = model.adapter.names, dict(model.lmm.named_modules())
    for name in (names.language_model, *names.encoders, *names.never_quantized, *model.adapter.unused()):
        assert name in modules, name
    leaves = {name.rsplit(".", 1)[-1] for name in modules}
    assert {names.embeddings, names.head} <= leaves
    assert modules[names.language_model] is model.get_decoder()


@pytest.mark.parametrize("layer, last", [(-2, 2), (-1, 3), (1, 1), ([-3, -2], 2)])
def test_what_lies_behind_the_layer_that_is_read_is_unused(layer, last):
    """Of three layers of the tower, states 0..3."""
    made = adapter()
    made.config.vision_feature_layer = layer
    tower = "model.vision_tower"
    assert made.unused() == (
        f"{tower}.post_layernorm",
        *(f"{tower}.encoder.layers.{n}" for n in range(last, 3)),
    )


@pytest.mark.parametrize(
    "valid_hw, rows, columns",
    [
        ((32, 32), 4, 4),  # square
        ((16, 32), 2, 4),  # wide: the lower half is padding
        ((17, 32), 3, 4),  # one pixel more starts another row of patches
        ((15, 32), 2, 4),  # one pixel less still reaches into the second row
        ((32, 8), 4, 1),  # tall
        ((32, 9), 4, 2),
        ((32, 7), 4, 1),
        ((1, 32), 1, 4),  # a single row of pixels
        ((31, 25), 4, 4),
        ((25, 24), 4, 3),
    ],
)
def test_a_token_is_valid_where_its_first_pixel_is_image(valid_hw, rows, columns):
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:rows, :columns] = True
    assert torch.equal(adapter().token_validity(torch.tensor([valid_hw]))[0], expected)


@pytest.mark.parametrize("valid_hw", [(336, 336), (224, 336), (225, 336), (336, 209), (336, 210), (336, 211)])
def test_validity_is_nearest_down_sampling_of_the_pixel_mask(valid_hw):
    pixels = torch.zeros(1, 1, 336, 336)
    pixels[..., : valid_hw[0], : valid_hw[1]] = 1
    expected = torch.nn.functional.interpolate(pixels, size=(24, 24), mode="nearest")[0, 0].bool()
    assert torch.equal(adapter(336, 14).token_validity(torch.tensor([valid_hw]))[0], expected)


def test_validity_of_several_images_on_a_grid_that_is_not_square():
    valid = adapter(kind=OblongAdapter).token_validity(torch.tensor([[8, 24], [16, 9]]))
    assert valid.int().tolist() == [[[1, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]]]


def test_the_vision_mask_hides_padded_patches_and_never_the_class_token():
    valid = torch.tensor([[[True, True], [True, False]], [[True, True], [True, True]]])
    low = torch.finfo(torch.bfloat16).min
    mask = vision_key_mask(valid, torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert mask.shape == (2, 1, 1, 5)
    assert mask[:, 0, 0].tolist() == [[0, 0, 0, 0, low], [0, 0, 0, 0, 0]]


def test_no_vision_mask_without_padding():
    assert vision_key_mask(torch.ones(2, 2, 2, dtype=torch.bool), torch.float32) is None


@torch.no_grad()
def test_image_features_do_not_depend_on_padded_pixels_nor_on_the_batch():
    lmm, inputs = tiny_model().lmm, tiny_inputs([[4], [4], [4]])
    valid = adapter().token_validity(inputs["valid_sizes"])
    features = adapter().encode(lmm, inputs["pixel_values"], TokenLayout.full(valid), {})[0]
    assert features.shape == (3, 16, 16)
    # The square image alone needs no mask at all: with and without one it is the same.
    alone = adapter().encode(lmm, inputs["pixel_values"][:1], TokenLayout.full(valid[:1]), {})[0]
    torch.testing.assert_close(alone[0], features[0], atol=1e-5, rtol=1e-4)
    perturbed = inputs["pixel_values"].clone()
    perturbed[1, :, 16:] += 3.0
    perturbed[2, :, :, 24:] -= 3.0
    again = adapter().encode(lmm, perturbed, TokenLayout.full(valid), {})[0]
    torch.testing.assert_close(again[valid.flatten(1)], features[valid.flatten(1)])
    padded = ~valid.flatten(1)
    assert (again[padded] - features[padded]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_image_features_are_those_of_the_lmm_where_nothing_is_padded():
    lmm, inputs = tiny_model().lmm, tiny_inputs([[4]])
    features = adapter().encode(
        lmm, inputs["pixel_values"], TokenLayout.full(torch.ones(1, 4, 4, dtype=torch.bool)), {}
    )[0]
    expected = torch.stack(list(lmm.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output))
    torch.testing.assert_close(features, expected)


def test_image_features_have_the_precision_of_the_lmm():
    lmm, inputs = tiny_model().lmm.to(torch.bfloat16), tiny_inputs([[4], [4]])
    valid = adapter().token_validity(inputs["valid_sizes"])
    assert adapter().encode(lmm, inputs["pixel_values"], TokenLayout.full(valid), {})[0].dtype == torch.bfloat16


def test_columns_of_image_tokens():
    ids = torch.tensor([[0, 0, 9, 9, 5, 6], [1, 9, 5, 9, 6, 7]])
    assert image_token_columns(ids, 9, torch.tensor([2, 2])).tolist() == [[2, 3], [1, 3]]


def test_a_row_needs_the_tokens_of_exactly_one_image():
    with pytest.raises(ValueError, match=r"must hold the 2 image tokens of one image, got \[2, 1\]"):
        image_token_columns(torch.tensor([[9, 9, 5], [1, 9, 5]]), 9, torch.tensor([2, 2]))


def rows(attention_mask, position_ids=None, made=None):
    """Two rows of six tokens, the first padded by one; four image tokens each, of a 2x2 grid."""
    valid = torch.tensor([[[True, True], [False, False]], [[True, False], [True, False]]])
    layout = TokenLayout.full(valid)
    return prepare_rows(
        made or adapter(16),
        UGroundImageEmbeddings(
            lmm_features=torch.randn(2, 4, 3),
            token_counts=layout.counts,
            token_cells=layout.cells,
            grid_sizes=layout.grid_sizes,
            token_valid=valid,
        ),
        9,
        torch.tensor([[0, 9, 9, 9, 9, 5], [9, 9, 9, 9, 6, 7]]),
        attention_mask,
        torch.tensor([0, 1]),
        position_ids,
    )


def lmm_inputs(attention_mask, position_ids=None):
    return rows(attention_mask, position_ids).lmm_inputs()


def test_rows_know_their_columns_and_images():
    made = rows(None)
    assert made.image_columns.tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert made.attention_mask.tolist() == [[1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]]
    assert torch.equal(made.features, made.images.lmm_features)
    features = made.lmm_inputs()["mm_encoder_outputs"]["image"].pooler_output
    assert torch.equal(torch.stack(list(features)), made.features)
    last = made.select(torch.tensor([1, 1]))
    assert len(last) == 2 and last.input_ids.tolist() == [[9, 9, 9, 9, 6, 7]] * 2
    assert torch.equal(last.features, made.images.lmm_features[[1, 1]])


def test_rows_share_a_prefix_of_any_length():
    assert rows(None).prefix_keys == [(0, 0, 9, 9, 9, 9), (1, 9, 9, 9, 9)]
    made = rows(torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    assert made.prefix_keys == [(0, 9, 9, 9, 9), (1, 9, 9, 9, 9)]


@pytest.mark.parametrize("lacking", ["prefix_is_causal", "cache_can_be_selected"])
def test_a_family_that_cannot_share_prefixes_says_so(lacking):
    other = adapter(16, kind=type("Other", (LlavaAdapter,), {lacking: False}))
    assert rows(torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]), made=other).prefix_keys is None


def test_a_family_that_takes_no_masks_refuses_packed_rows():
    other = adapter(16, kind=type("Other", (LlavaAdapter,), {"takes_4d_masks": False}))
    with pytest.raises(ValueError, match=r"a llava takes one query per row, got an attention_mask \(B, T, T\)"):
        rows(torch.ones(2, 6, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.long), other)


def test_padded_image_tokens_are_no_keys_and_keep_their_positions():
    prepared = lmm_inputs(torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    assert prepared["attention_mask"].tolist() == [[0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]]
    assert prepared["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_packed_rows_say_which_keys_a_token_sees():
    seen = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    seen[0, :, 0] = seen[0, 0] = False
    seen[1, 5, 4] = False
    positions = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4]])
    prepared = lmm_inputs(seen, position_ids=positions)
    assert prepared["position_ids"] is positions
    mask = prepared["attention_mask"]
    assert mask.shape == (2, 1, 6, 6)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    visible = (mask[:, 0] == 0).int()
    assert visible[0, 5].tolist() == [0, 1, 1, 0, 0, 1]
    # Padding sees nothing; it sees itself, so that its softmax is no NaN.
    assert visible[0, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert visible[1, 5].tolist() == [1, 0, 1, 0, 0, 1]
    assert visible[1, 4].tolist() == [1, 0, 1, 0, 1, 0]


def test_packed_rows_need_positions():
    with pytest.raises(ValueError, match=r"position_ids are needed with an attention_mask of shape \(B, T, T\)"):
        lmm_inputs(torch.ones(2, 6, 6, dtype=torch.bool))


def layer_states(layers=3, rows=2, length=5, width=2):
    """Every number is its own address: layer, row, column, channel."""
    shape = (layers, rows, length, width)
    places = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return tuple(sum(place * 10 ** (3 - axis) for axis, place in enumerate(places)).float())


def test_layer_states_of_positions():
    gathered = states_at(layer_states(), torch.tensor([1, 0, 1]), torch.tensor([[4], [2], [0]]))[:, 0]
    assert gathered[..., 0].tolist() == [[140, 1140, 2140], [20, 1020, 2020], [100, 1100, 2100]]
    assert gathered[..., 1].tolist() == [[141, 1141, 2141], [21, 1021, 2021], [101, 1101, 2101]]


def test_layer_states_of_several_positions_each():
    gathered = states_at(layer_states(), torch.tensor([1, 0]), torch.tensor([[3, 4], [0, 1]]))
    assert gathered.shape == (2, 2, 3, 2)
    assert gathered[..., 0].tolist() == [
        [[130, 1130, 2130], [140, 1140, 2140]],
        [[0, 1000, 2000], [10, 1010, 2010]],
    ]


POSITIONS = torch.tensor([[1, 2], [3, 4]])


def test_similarity_is_with_the_image_tokens_of_each_segments_row_and_layer():
    """States that pick a channel show which tokens were read; two segments read the same ones."""
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    similarity = image_similarity(
        states, ImageStates(layer_states(), POSITIONS), torch.tensor([0, 1, 0, 1, 0]), torch.tensor([2, 0, 2, 2, 2])
    )
    assert similarity.tolist() == [[2010, 2020], [130, 140], [2011, 2021], [2130, 2140], [4020, 4040]]


def test_similarity_is_the_raw_dot_product():
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 2.0], [3.0, 0.0], [0.0, 3.0]]])
    states, nothing = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.zeros(2, dtype=torch.long)
    similarity = image_similarity(states, ImageStates((tokens,), torch.arange(1, 7)[None]), nothing, nothing)
    assert similarity.tolist() == [[1, 2, 3, 6, 3, 6], [0, -1, -1, -2, 0, -3]]


def test_similarity_is_computed_in_float32():
    # In bfloat16 the sum 256 + 1 would be 256.
    states, first = torch.tensor([[16.0, 1.0]], dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long)
    similarity = image_similarity(states, ImageStates((states[None],), torch.tensor([[0]])), first, first)
    assert similarity.dtype == torch.float32
    assert similarity.item() == 257.0


def test_no_similarity_without_segments():
    nothing = torch.zeros(0, dtype=torch.long)
    states = ImageStates(layer_states(), POSITIONS)
    assert image_similarity(torch.zeros(0, 2), states, nothing, nothing).shape == (0, 2)
    assert states_at(layer_states(), nothing, nothing[:, None]).shape == (0, 1, 3, 2)


def test_gradients_reach_every_layer_that_was_read_and_the_states():
    layers = tuple(state.requires_grad_() for state in layer_states())
    states = torch.tensor([[1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    image_states = ImageStates(layers, POSITIONS)
    image_similarity(states, image_states, torch.tensor([0, 1]), torch.tensor([2, 0])).sum().backward()
    expected = torch.zeros(3, 2, 5, 2)
    expected[2, 0, 1:3] = expected[0, 1, 3:5] = 1
    assert layers[1].grad is None
    assert torch.equal(layers[0].grad, expected[0])
    assert torch.equal(layers[2].grad, expected[2])
    assert states.grad.tolist() == [[4030, 4032], [270, 272]]


@torch.no_grad()
def forward(model, inputs, **changes):
    return model(**{**inputs, **changes})


def test_padded_pixels_change_no_other_token():
    model, inputs = tiny_model(), tiny_inputs([[5, 6, SEGMENT_TOKEN], [7, SEGMENT_TOKEN], [8, 9, SEGMENT_TOKEN]])
    before = forward(model, inputs)
    pixels = inputs["pixel_values"].clone()
    pixels[1, :, 16:] += 3.0
    pixels[2, :, :, 24:] -= 3.0
    after = forward(model, inputs, pixel_values=pixels)
    padded = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    padded[is_image] = ~adapter().token_validity(inputs["valid_sizes"]).flatten()
    seen = inputs["attention_mask"].bool() & ~padded
    torch.testing.assert_close(after.logits[seen], before.logits[seen])
    torch.testing.assert_close(after.layer_logits, before.layer_logits)
    # The similarity to the padded tokens themselves has changed, so the perturbation was real.
    valid = adapter().token_validity(inputs["valid_sizes"])
    torch.testing.assert_close(after.similarity[valid], before.similarity[valid])
    assert (after.similarity[~valid] - before.similarity[~valid]).abs().max() > 1e-3


def test_rows_of_unequal_length_are_as_if_alone():
    rows = [[5, 6, SEGMENT_TOKEN, 8, 9, 10, 11], [7, SEGMENT_TOKEN], [8, 9, 10, SEGMENT_TOKEN]]
    model, inputs = tiny_model(), tiny_inputs(rows)
    together = forward(model, inputs)
    for row in range(3):
        start = int((inputs["attention_mask"][row] == 0).sum())
        alone = forward(
            model,
            {
                "input_ids": inputs["input_ids"][row : row + 1, start:],
                **{name: inputs[name][row : row + 1] for name in inputs if name.endswith(("values", "sizes"))},
            },
        )
        torch.testing.assert_close(alone.logits[0], together.logits[row, start:], atol=1e-5, rtol=1e-4)
        for name in ("layer_logits", "similarity", "similarity_map", "mask_logits", "iou_scores"):
            torch.testing.assert_close(alone[name][0], together[name][row], atol=1e-5, rtol=1e-4)


def test_more_text_padding_changes_nothing():
    model, inputs = tiny_model(), tiny_inputs([[5, 6, SEGMENT_TOKEN], [7, SEGMENT_TOKEN]])
    before = forward(model, inputs)
    pad = torch.nn.functional.pad
    after = forward(
        model,
        inputs,
        input_ids=pad(inputs["input_ids"], (5, 0), value=3),
        attention_mask=pad(inputs["attention_mask"], (5, 0)),
    )
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(after.logits[:, 5:][seen], before.logits[seen], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.mask_logits, before.mask_logits, atol=1e-5, rtol=1e-4)


def test_a_square_image_needs_no_positions_of_ours():
    """Without any padding the LMM's own forward, told nothing of masks and positions, says the same."""
    model, inputs = tiny_model(), tiny_inputs([[5, 6, SEGMENT_TOKEN]])
    with torch.no_grad():
        plain = model.lmm(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(forward(model, inputs).logits, plain.logits, atol=1e-5, rtol=1e-4)
