"""The teacher-forced pass: its stages by hand, batches of every kind, losses, gradients, and what it refuses."""

import pytest
import torch
from tiny import IMAGE_TOKEN, SEGMENT_TOKEN, VOCAB_SIZE, tiny_config, tiny_inputs, tiny_model
from torch.nn import functional as F

from uground.modeling_uground import UGroundForReferringSegmentation, UGroundOutput
from uground.modeling_uground.image_frames import ImageFrame
from uground.modeling_uground.layer_policy import select_layers
from uground.modeling_uground.prompts import build_mask_prompts

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
FIELDS = ("layer_logits", "layer_index", "log_probs", "similarity", "similarity_map", "mask_logits", "iou_scores")
# Rows with one, two and no segment tokens; their images are square, wide and tall.
ROWS = [[5, 6, SEGMENT_TOKEN, 9], [7, 8, 9, SEGMENT_TOKEN, 11, SEGMENT_TOKEN], [4, 12]]


@torch.no_grad()
def forward(model, inputs, **changes) -> UGroundOutput:
    return model(**{**inputs, **changes})


def assert_same(actual, expected, fields=FIELDS):
    for name in fields:
        torch.testing.assert_close(
            actual[name], expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_shapes_and_types():
    outputs = forward(tiny_model(), tiny_inputs(ROWS))
    assert outputs.logits.shape == (3, 23, VOCAB_SIZE)
    shapes = {name: tuple(outputs[name].shape) for name in FIELDS}
    assert shapes == {
        "layer_logits": (3, 5),
        "layer_index": (3,),
        "log_probs": (3,),
        "similarity": (3, 4, 4),
        "similarity_map": (3, 4, 4),
        "mask_logits": (3, 16, 16),
        "iou_scores": (3,),
    }
    assert outputs.segment_row.tolist() == [0, 1, 1]
    assert outputs.layer_index.dtype == torch.int64
    assert all(outputs[name].dtype == torch.float32 for name in FIELDS if name != "layer_index")
    assert outputs.loss is None and outputs.uncertainty is None


@pytest.mark.parametrize("embedding_layer", ["selected", "last"])
@pytest.mark.parametrize("scaling", ["scaled", "minmax"])
@torch.no_grad()
def test_the_stages_one_by_one(scaling, embedding_layer):
    """Everything after the LMM, segment by segment, from the states of the position before each segment token."""
    model = tiny_model(similarity_scaling=scaling, embedding_layer=embedding_layer)
    inputs = tiny_inputs(ROWS)
    outputs = forward(model, inputs)
    images = model.get_image_embeddings(**inputs)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    rows = model.prepare_rows(inputs["input_ids"], inputs["attention_mask"], inputs["image_index"], images)
    assert torch.equal(rows.image_columns, is_image.nonzero()[:, 1].view(3, 16))
    lmm = model.lmm(**rows.lmm_inputs(), output_hidden_states=True)
    torch.testing.assert_close(outputs.logits, lmm.logits)
    assert len(lmm.hidden_states) == 5
    found = [(row, column) for row, column in (inputs["input_ids"] == SEGMENT_TOKEN).nonzero().tolist()]
    for segment, (row, column) in enumerate(found):
        states = torch.stack([state[row, column - 1] for state in lmm.hidden_states])
        logits = (states * model.layer_policy.gates).sum(-1)
        layer = int(logits.argmax())
        products = (lmm.hidden_states[layer][row, is_image[row]] @ states[layer]).view(1, 4, 4)
        if scaling == "minmax":
            maps = (products - products.min()) / (products.max() - products.min())
        else:
            maps = products / 4 + model.similarity_scaling.bias[layer]
        embedded = states[layer if embedding_layer == "selected" else -1]
        masks, iou_scores = model.mask_decoder(
            images.sam_embeddings[row : row + 1],
            torch.tensor([0]),
            model.segment_projection(embedded[None]),
            build_mask_prompts(
                maps,
                torch.tensor([0]),
                inputs["original_sizes"][row : row + 1].tolist(),
                ImageFrame("letterbox", 32),
                ImageFrame("letterbox", 16),
                padding_value=0.0 if scaling == "minmax" else -10.0,
            ),
        )
        expected = {
            "layer_logits": logits,
            "layer_index": torch.tensor(layer),
            "log_probs": logits.log_softmax(-1)[layer],
            "similarity": products[0],
            "similarity_map": maps[0],
            "mask_logits": masks[0],
            "iou_scores": iou_scores[0],
        }
        assert_same({name: outputs[name][segment] for name in FIELDS}, expected)
    assert len(set(outputs.layer_index.tolist())) > 1


def test_the_last_layer_state_is_the_normed_one():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with torch.no_grad():
        model.lmm.model.language_model.norm.weight.mul_(0)
    assert torch.equal(forward(model, inputs, layer_selection="last").similarity, torch.zeros(3, 4, 4))


def test_what_follows_a_segment_token_does_not_change_it():
    model = tiny_model()
    before = forward(model, tiny_inputs([[5, 6, SEGMENT_TOKEN, 9, 9]]))
    after = forward(model, tiny_inputs([[5, 6, SEGMENT_TOKEN, 10, 11]]))
    assert_same(after, before)
    other = forward(model, tiny_inputs([[5, 7, SEGMENT_TOKEN, 9, 9]]))
    assert (other.mask_logits - before.mask_logits).abs().max() > 1e-3


def test_segments_come_in_reading_order():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    together = forward(model, inputs)
    for segment, (row, kept) in enumerate([(0, 3), (1, 4), (1, 6)]):
        rows = [[4] * 6] * 3
        rows[row] = ROWS[row][:kept]
        alone = forward(model, {**inputs, **{k: v for k, v in tiny_inputs(rows).items() if "mask" in k or "ids" in k}})
        assert alone.segment_row.tolist() == ([row] if segment < 2 else [row, row])
        assert_same(
            {name: alone[name][-1:] for name in FIELDS}, {name: together[name][segment, None] for name in FIELDS}
        )


@pytest.mark.parametrize("selection", ["sample", "argmax", "last", "mc", 2])
def test_no_segment_token_at_all(selection):
    outputs = forward(tiny_model(), tiny_inputs([[5, 6], [7]]), layer_selection=selection)
    assert outputs.logits.shape == (2, 19, VOCAB_SIZE)
    assert [len(outputs[name]) for name in ("segment_row", *FIELDS)] == [0] * 8
    assert outputs.mask_logits.shape == (0, 16, 16)


def test_a_batch_without_segments_still_has_gradients_for_the_text():
    model, inputs = tiny_model(), tiny_inputs([[5, 6], [7]])
    outputs = model(**inputs, labels=inputs["input_ids"], layer_selection="sample")
    (outputs.loss + 0.0 * outputs.log_probs.sum()).backward()
    assert model.lmm.lm_head.weight.grad.abs().sum() > 0


def test_one_image_with_many_queries_equals_the_image_repeated():
    model = tiny_model()
    rows = [[5, 6, SEGMENT_TOKEN], [7, SEGMENT_TOKEN], [8, 9, SEGMENT_TOKEN]]
    shared = tiny_inputs(rows, image_index=[1, 0, 1])
    repeated = dict(shared)
    for name in ("pixel_values", "valid_sizes", "sam_pixel_values", "sam_valid_sizes", "original_sizes"):
        repeated[name] = shared[name][shared["image_index"]]
    repeated["image_index"] = torch.arange(3)
    outputs = forward(model, shared)
    assert_same(outputs, forward(model, repeated), ("logits", *FIELDS))
    swapped = forward(model, shared, image_index=torch.tensor([0, 1, 0]))
    assert ((swapped.mask_logits - outputs.mask_logits).abs().amax((1, 2)) > 1e-3).all()


def test_image_index_may_be_left_out_where_there_is_no_choice():
    model = tiny_model()
    one = tiny_inputs([[5, SEGMENT_TOKEN], [7, SEGMENT_TOKEN]], image_index=[0, 0])
    assert_same(forward(model, one, image_index=None), forward(model, one))
    each = tiny_inputs([[5, SEGMENT_TOKEN], [7, SEGMENT_TOKEN]])
    assert_same(forward(model, each, image_index=None), forward(model, each))


def test_images_encoded_before_give_the_same():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    images = model.get_image_embeddings(**inputs)
    assert images.lmm_features.shape == (3, 16, 16)
    assert images.sam_embeddings.shape == (3, 16, 4, 4)
    assert images.token_valid.sum((1, 2)).tolist() == [16, 8, 12]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_index")}
    assert_same(forward(model, text, image_embeddings=images), forward(model, inputs), ("logits", *FIELDS))


def packed(rows):
    """The queries of one image in one row behind it, each blind to the others."""
    ids = [1] + [IMAGE_TOKEN] * 16
    owner, positions = [0] * 17, list(range(17))
    for number, row in enumerate(rows, start=1):
        ids, owner, positions = ids + row, owner + [number] * len(row), positions + list(range(17, 17 + len(row)))
    owner = torch.tensor(owner)
    seen = ((owner[:, None] == owner) | (owner == 0)).tril()
    return {"input_ids": torch.tensor([ids]), "attention_mask": seen[None], "position_ids": torch.tensor([positions])}


def test_queries_packed_behind_one_image_are_as_if_asked_alone():
    model, rows = tiny_model(), [[7, 8, SEGMENT_TOKEN, 9], [5, SEGMENT_TOKEN, 6, SEGMENT_TOKEN], [4, 3]]
    # Image 1 is wide: padded image tokens have to stay hidden in the packed mask too.
    inputs = tiny_inputs([[4], *rows], image_index=[0, 1, 1, 1])
    images = {name: value[1:] for name, value in inputs.items() if name.endswith(("values", "sizes"))}
    separate = forward(model, {**images, **{n: inputs[n][1:] for n in ("input_ids", "attention_mask")}})
    together = forward(model, {**images, **packed(rows)})
    assert together.segment_row.tolist() == [0, 0, 0]
    assert_same(together, separate)
    torch.testing.assert_close(together.logits[0, 17:21], separate.logits[0, -4:], **TOLERANCE)


@pytest.mark.parametrize("selection, layers", [("last", [4, 4, 4]), (0, [0, 0, 0]), (3, [3, 3, 3])])
def test_a_fixed_layer_is_the_forced_one(selection, layers):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    outputs = forward(model, inputs, layer_selection=selection)
    assert outputs.layer_index.tolist() == layers
    assert_same(outputs, forward(model, inputs, layer_index=torch.tensor(layers)))


def test_each_segment_is_read_at_its_own_forced_layer():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    outputs = forward(model, inputs, layer_index=torch.tensor([3, 0, 2]))
    for segment, layer in enumerate([3, 0, 2]):
        single = forward(model, inputs, layer_selection=layer)
        assert_same(
            {name: outputs[name][segment] for name in FIELDS}, {name: single[name][segment] for name in FIELDS}
        )


def test_the_config_says_how_layers_are_chosen_unless_the_call_does():
    inputs = tiny_inputs(ROWS)
    assert forward(tiny_model(layer_selection="last"), inputs).layer_index.tolist() == [4, 4, 4]
    assert forward(tiny_model(layer_selection=1), inputs).layer_index.tolist() == [1, 1, 1]
    assert forward(tiny_model(layer_selection="last"), inputs, layer_selection=0).layer_index.tolist() == [0, 0, 0]
    model = tiny_model()
    assert torch.equal(
        forward(model, inputs).layer_index, forward(model, inputs, layer_selection="argmax").layer_index
    )


def test_sampling_layers_follows_the_seed():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        drawn.append(tuple(forward(model, inputs, layer_selection="sample").layer_index.tolist()))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def sharpen(model, factor):
    """Multiply the mask logits of a model, which are near zero in a random one."""
    with torch.no_grad():
        for mlp in model.mask_decoder.sam.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(factor)
            mlp.proj_out.bias.mul_(factor)


def test_monte_carlo_is_the_average_over_the_layers_drawn():
    model, inputs, samples = tiny_model(), tiny_inputs(ROWS), 6
    sharpen(model, 30)
    each = [forward(model, inputs, layer_selection=layer) for layer in range(5)]
    torch.manual_seed(0)
    outputs = forward(model, inputs, layer_selection="mc", num_layer_samples=samples)
    torch.manual_seed(0)
    draws = select_layers(outputs.layer_logits, "mc", samples).draws
    assert (draws > 0).sum(-1).max() > 1
    for name in ("similarity", "similarity_map", "iou_scores"):
        values = torch.stack([single[name] for single in each], dim=1)
        expected = torch.einsum("nl,nl...->n...", draws, values)
        torch.testing.assert_close(outputs[name], expected, **TOLERANCE)
    probabilities = torch.stack([single.mask_logits for single in each], dim=1).sigmoid()
    mean = torch.einsum("nl,nlhw->nhw", draws, probabilities)
    variance = torch.einsum("nl,nlhw->nhw", draws, probabilities**2) - mean**2
    torch.testing.assert_close(outputs.mask_logits.sigmoid(), mean, **TOLERANCE)
    torch.testing.assert_close(outputs.uncertainty, variance, atol=1e-5, rtol=1e-3)
    assert outputs.uncertainty.max() > 1e-3
    assert torch.equal(outputs.layer_index, draws.argmax(-1))


def test_monte_carlo_with_one_draw_is_sure_of_it():
    model, inputs = tiny_model(num_layer_samples=1), tiny_inputs(ROWS)
    outputs = forward(model, inputs, layer_selection="mc")
    assert torch.equal(outputs.uncertainty, torch.zeros(3, 16, 16))
    assert_same(outputs, forward(model, inputs, layer_index=outputs.layer_index))


def test_certain_masks_stay_finite_under_monte_carlo():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    sharpen(model, 1e5)
    outputs = forward(model, inputs, layer_selection="mc")
    assert outputs.mask_logits.isfinite().all()
    assert outputs.mask_logits.abs().max() > 10


@pytest.mark.parametrize("prompts, silent", [(("embedding",), "map"), (("mask",), "embedding")])
def test_prompts_that_are_switched_off_are_not_used(prompts, silent):
    model, inputs = tiny_model(prompts=prompts), tiny_inputs(ROWS)
    before = forward(model, inputs, layer_selection="last")
    assert (model.segment_projection is None) == ("embedding" not in prompts)
    with torch.no_grad():
        model.similarity_scaling.bias.add_(5.0)
    moved = (forward(model, inputs, layer_selection="last").mask_logits - before.mask_logits).abs().max()
    assert (moved == 0) == (silent == "map")


def labels_of(inputs):
    """The last two tokens of every row."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return labels


def test_the_loss_is_the_cross_entropy_of_the_next_token():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    outputs = forward(model, inputs, labels=labels_of(inputs))
    # The placeholder of images is no word: it is never written and has no share of the probability.
    log_probs = outputs.logits[..., :IMAGE_TOKEN].log_softmax(-1)
    assert IMAGE_TOKEN == VOCAB_SIZE - 1
    scored = [log_probs[row, column - 1, inputs["input_ids"][row, column]] for row in range(3) for column in (21, 22)]
    torch.testing.assert_close(outputs.loss, -torch.stack(scored).mean())
    summed = forward(model, inputs, labels=labels_of(inputs), num_items_in_batch=torch.tensor(12))
    torch.testing.assert_close(summed.loss, outputs.loss / 2)


def test_image_tokens_are_no_labels():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    labels = labels_of(inputs)
    expected = forward(model, inputs, labels=labels).loss
    labels[inputs["input_ids"] == IMAGE_TOKEN] = IMAGE_TOKEN
    assert torch.equal(forward(model, inputs, labels=labels).loss, expected)


def test_eager_attention_agrees_with_sdpa():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    expected = forward(model, inputs)
    assert model.lmm.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.lmm.config._attn_implementation == "eager"
    assert_same(forward(model, inputs), expected)


def test_bfloat16_gives_float32_results_near_those_of_float32():
    inputs = tiny_inputs(ROWS)
    expected = forward(tiny_model(), inputs, layer_selection="last")
    outputs = forward(tiny_model().to(torch.bfloat16), inputs, layer_selection="last")
    assert outputs.logits.dtype == torch.bfloat16
    assert all(outputs[name].dtype == torch.float32 for name in FIELDS if name != "layer_index")
    torch.testing.assert_close(outputs.mask_logits, expected.mask_logits, atol=0.05, rtol=0.05)


def mask_loss(model, inputs, **settings):
    outputs = model(**inputs, labels=labels_of(inputs), layer_index=torch.tensor([1, 4, 2]), **settings)
    target = (torch.arange(16) > 7).float().expand_as(outputs.mask_logits)
    return outputs, outputs.loss + F.binary_cross_entropy_with_logits(outputs.mask_logits, target)


def test_mask_and_text_losses_train_everything_but_the_policy():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    _, loss = mask_loss(model, inputs)
    loss.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert "layer_policy.gates" in without
    # SAM's heads for points, several masks and the IoU, and CLIP's last layer, have no part in these losses.
    unused = (
        "point_embed",
        "no_mask_embed",
        "iou",
        "mlps.1",
        "mlps.2",
        "mlps.3",
        "encoder.layers.2",
        "post_layernorm",
    )
    assert [name for name in without if not any(part in name for part in ("layer_policy", *unused))] == []


def test_log_probs_train_the_policy_alone():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    mask_loss(model, inputs)[0].log_probs.sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["layer_policy.gates"]


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, inputs = tiny_model().train(), tiny_inputs(ROWS)
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
            assert model.lmm.model.language_model.gradient_checkpointing
        _, loss = mask_loss(model, inputs)
        loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_resized_vocabulary_is_that_of_the_config():
    model = tiny_model()
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    assert model.config.get_text_config().vocab_size == VOCAB_SIZE + 3
    assert (
        model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == VOCAB_SIZE + 3
    )
    assert forward(model, tiny_inputs(ROWS)).logits.shape[-1] == VOCAB_SIZE + 3


def test_new_models_begin_with_a_uniform_policy_and_plain_maps():
    torch.manual_seed(0)
    model = UGroundForReferringSegmentation(tiny_config()).eval()
    outputs = forward(model, tiny_inputs(ROWS))
    torch.testing.assert_close(outputs.log_probs, torch.full((3,), 0.2).log())
    torch.testing.assert_close(outputs.similarity_map, outputs.similarity / 4)


MISTAKES = {
    "no image": (
        {"pixel_values": None},
        "pass image_embeddings, or all of pixel_values, valid_sizes, sam_pixel_values",
    ),
    "no valid sizes": ({"valid_sizes": None}, "pass image_embeddings, or all of"),
    "too few images named": (
        {"image_index": torch.tensor([0, 1])},
        r"one of 3 images for each of 3 rows, got \[0, 1\]",
    ),
    "no such image": (
        {"image_index": torch.tensor([0, 1, 3])},
        r"one of 3 images for each of 3 rows, got \[0, 1, 3\]",
    ),
    "negative image": ({"image_index": torch.tensor([0, 1, -1])}, r"for each of 3 rows, got \[0, 1, -1\]"),
    "too few layers": ({"layer_index": torch.tensor([0, 1])}, r"each of the 3 segments, got shape \(2,\)"),
    "no such layer": ({"layer_index": torch.tensor([0, 1, 5])}, r"layer_index must lie in 0..4, got \[0, 1, 5\]"),
    "negative layer": ({"layer_index": torch.tensor([0, 1, -1])}, r"layer_index must lie in 0..4, got \[0, 1, -1\]"),
    "unknown rule": (
        {"layer_selection": "best"},
        r"layer_selection must be one of .*'mc'.* or a layer number, got 'best'",
    ),
    "no such fixed layer": ({"layer_selection": 5}, "layer_selection must lie in 0..4 for this model, got 5"),
    "no draws": ({"layer_selection": "mc", "num_layer_samples": 0}, "num_layer_samples must be at least 1, got 0"),
    "draws in words": ({"num_layer_samples": "x"}, "num_layer_samples must be at least 1, got 'x'"),
    "a layer that is no tensor": ({"layer_index": 3}, "one layer for each of the 3 segments, got 3"),
    "labels that are no tensor": ({"labels": 5}, r"labels must have the shape \(3, \d+\) of input_ids, got 5"),
    "labels of another length": ({"labels": torch.zeros(3, 2)}, r"labels must have the shape .*, got \(3, 2\)"),
    "a mask of another length": (
        {"attention_mask": torch.ones(3, 2)},
        r"attention_mask must have the shape \(3, \d+\) of input_ids, got \(3, 2\)",
    ),
    "too few positions": ({"position_ids": torch.zeros(3, 2)}, r"position_ids must have the shape .*, got \(3, 2\)"),
    "one channel": ({"pixel_values": torch.zeros(3, 1, 32, 32)}, "pixel_values must have 3 channels, got 1"),
    "no size": ({"original_sizes": torch.tensor([[-1, 5]] * 3)}, "sizes of images must be at least 1"),
}


@pytest.mark.parametrize("changes, sentence", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        forward(tiny_model(), tiny_inputs(ROWS), **changes)


def test_image_index_is_needed_where_rows_could_ask_about_several_images():
    inputs = tiny_inputs([[5], [6], [7]], image_index=[0, 1, 1])
    with pytest.raises(ValueError, match="image_index is needed: 3 rows ask about 2 images"):
        forward(tiny_model(), inputs, image_index=None)


def test_rows_need_their_image_tokens():
    inputs = tiny_inputs(ROWS)
    ids = inputs["input_ids"].clone()
    ids[1, 1] = 5
    with pytest.raises(ValueError, match=r"the 16 image tokens of one image, got \[16, 15, 16\]"):
        forward(tiny_model(), inputs, input_ids=ids)


def test_a_model_must_know_its_segment_token():
    with pytest.raises(ValueError, match="config.segment_token_id is not set"):
        forward(tiny_model(segment_token_id=None), tiny_inputs(ROWS))
