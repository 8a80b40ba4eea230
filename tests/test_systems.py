"""Systems as settings: those that are published, and models that leave a part out or read several ids per segment."""

import pytest
import torch
from tiny import END_TOKEN, SEGMENT_TOKEN, tiny_config, tiny_inputs, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

from uground.modeling_uground import UGroundConfig

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
S = SEGMENT_TOKEN
# Rows with one, two and no segments; their images are square, wide and tall.
ROWS = [[5, 6, S, 9], [7, 8, 9, S, 11, S], [4, 12]]
SYSTEMS = {
    "lisa": ("centre_crop", ("embedding",), False, "last"),
    "sesame": ("centre_crop", ("embedding",), False, "last"),
    "read": ("centre_crop", ("embedding", "points"), False, "last"),
    "uground": ("letterbox", ("embedding", "mask"), True, "argmax"),
}


def system(name, **settings) -> UGroundConfig:
    base = tiny_config()
    return UGroundConfig.for_system(name, **{"lmm_config": base.lmm_config, "sam_config": base.sam_config, **settings})


@pytest.mark.parametrize("name, expected", SYSTEMS.items())
def test_settings_of_each_system(name, expected, tmp_path):
    config = system(name)
    assert (config.image_frame, config.prompts, config.layer_policy, config.layer_selection) == expected
    assert config.mask_head == "sam" and config.num_segment_tokens == 1
    if name == "read":
        assert (config.num_points, config.point_thresholds, config.point_downsample) == (30, (0.8, 0.2), 2)
        assert config.similarity_scaling == "minmax"
    config.save_pretrained(tmp_path)
    loaded = UGroundConfig.from_pretrained(tmp_path)
    assert (loaded.image_frame, loaded.prompts, loaded.layer_policy, loaded.layer_selection) == expected


def test_a_setting_of_the_call_stands_over_that_of_the_system():
    config = system("read", num_points=60, point_thresholds=(0.6, 0.2), point_downsample=1, segment_token_id=S)
    assert (config.num_points, config.point_thresholds, config.point_downsample) == (60, (0.6, 0.2), 1)
    assert system("uground", layer_selection=2, image_frame="stretch").image_frame == "stretch"


def test_what_is_no_system_or_does_not_fit_is_told_in_a_sentence():
    with pytest.raises(ValueError, match="system must be one of lisa, sesame, read, uground, got 'raed'$"):
        system("raed")
    with pytest.raises(ValueError, match="layer_selection 'argmax' needs a layer policy, which this model has not"):
        system("lisa", layer_selection="argmax")
    with pytest.raises(ValueError, match=r"which needs a sam_config, got \('embedding', 'points'\) without one"):
        system("read", sam_config=None)


@torch.no_grad()
def forward(model, rows=ROWS, **changes):
    return model(**{**tiny_inputs(rows), **changes})


def write(model, inputs, answers, **settings):
    """`segment`, with rows that write these answers."""
    start = inputs["input_ids"].shape[1]

    class Write(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            for row, answer in enumerate(answers[: len(input_ids)]):
                forced[row, answer[input_ids.shape[1] - start]] = 0.0
            return forced

    settings = {"logits_processor": LogitsProcessorList([Write()]), "max_new_tokens": len(answers[0]), **settings}
    return model.segment(**inputs, **settings)


MAPS = ("layer_index", "similarity", "similarity_map")


def test_without_sam_a_segment_is_its_map():
    config = tiny_config(sam_config=None)
    assert config.sam_config is None and config.mask_head is None and config.prompts == ()
    assert config.head_frame is None
    model, whole = tiny_model(sam_config=None), tiny_model()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "lmm",
        "layer_policy",
        "similarity_scaling",
    }
    whole.load_state_dict(model.state_dict(), strict=False)
    outputs, expected = forward(model), forward(whole)
    for name in (*MAPS, "layer_logits", "logits"):
        torch.testing.assert_close(outputs[name], expected[name], **TOLERANCE)
    assert outputs.mask_logits is None and outputs.iou_scores is None and outputs.sam_embeddings is None
    torch.manual_seed(0)
    drawn = forward(model, layer_selection="mc", num_layer_samples=3)
    torch.manual_seed(0)
    torch.testing.assert_close(
        drawn.similarity_map, forward(whole, layer_selection="mc", num_layer_samples=3).similarity_map, **TOLERANCE
    )
    answers = [[4, S, END_TOKEN], [S, 6, S], [END_TOKEN, 0, 0]]
    written = write(model, tiny_inputs([[5, 6], [7], [8]]), answers)
    expected = write(whole, tiny_inputs([[5, 6], [7], [8]]), answers)
    assert written.segment_row.tolist() == [0, 1, 1]
    for name in (*MAPS, "sequences", "token_scores"):
        torch.testing.assert_close(written[name], expected[name], **TOLERANCE)
    assert written.mask_logits is None


@pytest.mark.parametrize("selection", ["last", 2])
def test_without_a_policy_the_layer_is_named(selection):
    model = tiny_model(layer_policy=False, layer_selection=selection)
    whole = tiny_model()
    assert model.layer_policy is None and not [name for name in model.state_dict() if "policy" in name]
    whole.load_state_dict(model.state_dict(), strict=False)
    outputs, expected = forward(model), forward(whole, layer_selection=selection)
    for name in (*MAPS, "mask_logits", "iou_scores"):
        torch.testing.assert_close(outputs[name], expected[name], **TOLERANCE)
    assert outputs.layer_logits is None and outputs.log_probs is None
    forced = forward(model, layer_index=torch.tensor([0, 3, 1]))
    expected = forward(whole, layer_index=torch.tensor([0, 3, 1]))
    torch.testing.assert_close(forced.mask_logits, expected.mask_logits, **TOLERANCE)
    written = write(model, tiny_inputs([[5], [6]]), [[S, END_TOKEN], [4, S]])
    assert written.mask_logits.shape == (2, 16, 16)


@pytest.mark.parametrize("rule", ["argmax", "sample", "mc"])
def test_without_a_policy_its_rules_are_refused(rule):
    model = tiny_model(layer_policy=False, layer_selection="last")
    sentence = f"layer_selection '{rule}' needs a layer policy, which this model has not; expected 'last' or a layer"
    with pytest.raises(ValueError, match=sentence):
        forward(model, layer_selection=rule)
    model.lmm.register_forward_pre_hook(lambda *_: pytest.fail("the LMM was asked"))
    with pytest.raises(ValueError, match=sentence):
        model.segment(**tiny_inputs([[5]]), layer_selection=rule, max_new_tokens=1)
    with pytest.raises(ValueError, match="layer_uniforms draw from a layer policy, which this model has not"):
        tiny_model(layer_policy=False, layer_selection="last")(**tiny_inputs(ROWS), layer_uniforms=torch.rand(2, 3))


READ = {"prompts": ("embedding", "points"), "image_frame": "centre_crop", "similarity_scaling": "minmax"}
READ |= {"layer_policy": False, "layer_selection": "last", "num_points": 6}


def test_points_of_images_of_different_sizes_are_those_of_each_image_alone():
    model, inputs = tiny_model(**READ), tiny_inputs(ROWS)
    # The crop of each image shows the whole frame.
    inputs["valid_sizes"][:] = 32
    with torch.no_grad():
        together = model(**inputs)
    assert together.points.shape == (3, 6, 2) and together.point_labels.shape == (3, 6)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items() if name != "image_index"}
        with torch.no_grad():
            single = model(**alone)
        mine = together.segment_row == row
        assert torch.equal(single.point_labels, together.point_labels[mine])
        for name in ("points", "mask_logits", "iou_scores"):
            torch.testing.assert_close(single[name], together[name][mine], **TOLERANCE)
    # Points lie within the part of SAM's frame that is image.
    for segment, row in enumerate(together.segment_row.tolist()):
        height, width = inputs["sam_valid_sizes"][row].tolist()
        x, y = together.points[segment].T
        assert 0 <= x.min() and x.max() <= width and 0 <= y.min() and y.max() <= height


def test_points_are_handed_on_and_returned_when_an_answer_is_written():
    model, inputs = tiny_model(**READ), tiny_inputs([[5, 6], [7], [8]])
    inputs["valid_sizes"][:] = 32
    output = write(model, inputs, [[4, S, END_TOKEN], [S, 6, S], [END_TOKEN, 0, 0]])
    assert output.points.shape == (3, 6, 2) and output.point_labels.shape == (3, 6)
    split = write(model, inputs, [[S, S, S]] * 3)
    parts = write(model, inputs, [[S, S, S]] * 3, max_rows=2)
    torch.testing.assert_close(parts.points, split.points, **TOLERANCE)
    assert torch.equal(parts.point_labels, split.point_labels)
    assert write(model, inputs, [[4, END_TOKEN]] * 3).points.shape == (0, 6, 2)
    assert forward(tiny_model()).points is None


def test_a_segment_of_several_ids_is_read_as_their_mean():
    """Policy, map and embedding of a segment see the mean of the states that predicted its ids."""
    model = tiny_model(num_segment_tokens=3)
    rows = [[5, 6, S, S, S, 9], [7, S, S, S, S, S, S], [S, S, 4, 8, S]]
    inputs = tiny_inputs(rows)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    assert outputs.segment_row.tolist() == [0, 1, 1]
    is_image = inputs["input_ids"] == 39
    # Where the ids of each segment begin; row 0 is padded by one token.
    first = [(0, 20), (1, 18), (1, 21)]
    for segment, (row, column) in enumerate(first):
        states = torch.stack([state[row, column - 1 : column + 2].mean(0) for state in outputs.hidden_states])
        logits = (states * model.layer_policy.gates).sum(-1)
        torch.testing.assert_close(outputs.layer_logits[segment], logits, **TOLERANCE)
        layer = int(logits.argmax())
        assert outputs.layer_index[segment] == layer
        products = outputs.hidden_states[layer][row, is_image[row]] @ states[layer]
        torch.testing.assert_close(outputs.similarity[segment].flatten(), products, **TOLERANCE)
    assert outputs.mask_logits.shape == (3, 16, 16)


def test_several_ids_are_written_as_they_are_read():
    model, inputs = tiny_model(num_segment_tokens=3), tiny_inputs([[5, 6], [7], [8, 9]], [0, 1, 1])
    answers = [[4, S, S, S, END_TOKEN, 0, 0], [S, S, S, S, S, S, S], [S, S, 4, S, S, END_TOKEN, 0]]
    output = write(model, inputs, answers)
    assert output.segment_row.tolist() == [0, 1, 1]
    visible = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], 1)
    with torch.no_grad():
        forced = model(**{**inputs, "input_ids": output.sequences, "attention_mask": visible})
    for name in ("segment_row", "layer_logits", "similarity", "mask_logits", "iou_scores"):
        torch.testing.assert_close(output[name], forced[name], **TOLERANCE)
    # How surely a segment was written is the geometric mean over its ids.
    chances = forced.logits[..., :39].softmax(-1)[..., S]
    start = inputs["input_ids"].shape[1] - 1
    expected = [chances[row, start + at : start + at + 3].log().mean().exp() for row, at in ((0, 1), (1, 0), (1, 3))]
    torch.testing.assert_close(output.token_scores, torch.stack(expected), **TOLERANCE)
