"""
What the common tests of transformers ask of every model: `ModelTesterMixin`, `GenerationTesterMixin`, `ConfigTester`.

Of these, which are in its source distribution, those that apply are kept here, or stand in the file of their subject:
saving and loading in `test_loading`, gradients in `test_modeling`, generation in `test_generation`, flash attention in
`test_attention`, exporting in `test_head_sam`.

Those that do not apply, and why:
- `test_inputs_embeds…`, `test_generate_from_inputs_embeds…`: segment tokens are looked for in `input_ids`;
- `test_tied_weights_keys`, `test_model_weights_reload_no_missing_tied_weights`: tying belongs to the LMM;
- `test_correct_missing_keys`, `test_load_with_mismatched_shapes`: a checkpoint that does not fit, an empty one above
  all, is refused by design and its tensors are named;
- `test_model_base_model_prefix`: LMM and SAM stand side by side, and neither is the base of the other;
- `test_training_gradient_checkpointing…`: it counts passes of the first layer of all, which is SAM's, for a text loss;
- `test_resize_…` below the ids of special tokens: an id outside of the vocabulary is refused;
- beam search, contrastive search, assisted generation with masks: `segment` refuses them, `generate` hands them on;
- `test_feed_forward_chunking`, `test_head_pruning…`: the parts know neither.
"""

import copy
import json

import pytest
import torch
from tiny import IMAGE_TOKEN, SEGMENT_TOKEN, VOCAB_SIZE, tiny_config, tiny_inputs, tiny_model
from torch import nn

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

ROWS = [[5, 6, SEGMENT_TOKEN, 9], [7, 8, 9, SEGMENT_TOKEN, 11, SEGMENT_TOKEN], [4, 12]]
LAYERS, HEADS, LENGTH, WIDTH = 4, 4, 23, 16


@torch.no_grad()
def forward(model, **changes):
    return model(**{**tiny_inputs(ROWS), **changes})


def eager_model(**settings):
    model = tiny_model(**settings)
    model.set_attn_implementation("eager")
    return model


def test_states_attentions_and_cache_come_on_request():
    model = eager_model()
    plain = forward(model)
    assert {"hidden_states", "attentions", "cache"}.isdisjoint(plain)
    output = forward(model, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert set(output) - set(plain) == {"hidden_states", "attentions", "cache"}
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, LENGTH, WIDTH)] * (LAYERS + 1)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, HEADS, LENGTH, LENGTH)] * LAYERS
    assert output.cache.get_seq_length() == LENGTH
    for name, value in plain.items():
        assert torch.equal(output[name], value), name
    # They are those the outputs were made of.
    torch.testing.assert_close(model.lmm.lm_head(output.hidden_states[-1]), output.logits)
    seen = tiny_inputs(ROWS)["attention_mask"].bool()
    assert (output.attentions[0].sum(-1)[seen[:, None].expand(-1, HEADS, -1)] - 1).abs().max() < 1e-5
    state = output.hidden_states[output.layer_index[0]]
    image = tiny_inputs(ROWS)["input_ids"][0] == IMAGE_TOKEN
    products = state[0, image] @ state[0, (tiny_inputs(ROWS)["input_ids"][0] == SEGMENT_TOKEN).nonzero()[0, 0] - 1]
    torch.testing.assert_close(output.similarity[0].flatten(), products, atol=1e-5, rtol=1e-4)


def test_the_config_may_ask_for_them_and_a_call_may_not_want_them():
    model = eager_model()
    model.config.output_hidden_states = model.config.output_attentions = True
    assert len(forward(model).hidden_states) == LAYERS + 1 and len(forward(model).attentions) == LAYERS
    assert {"hidden_states", "attentions"}.isdisjoint(
        forward(model, output_hidden_states=False, output_attentions=False)
    )


@pytest.mark.parametrize("layers, kept", [([0, 2], {0, 2}), ([-1], {4}), ((1, -2), {1, 3}), (3, {3})])
def test_states_of_some_layers(layers, kept):
    model = tiny_model()
    states = forward(model, output_hidden_states=True).hidden_states
    found = forward(model, output_hidden_states=layers).hidden_states
    assert {layer for layer, state in enumerate(found) if state is not None} == kept
    assert all(torch.equal(found[layer], states[layer]) for layer in kept) and len(found) == LAYERS + 1


@pytest.mark.parametrize("layers", [[5], [0, -6], 9])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="output_hidden_states must name layers in 0..4, got "):
        forward(tiny_model(), output_hidden_states=layers)


def test_a_tuple_holds_what_the_output_holds():
    model = tiny_model()
    output = forward(model, output_hidden_states=True, labels=tiny_inputs(ROWS)["input_ids"])
    for values in (
        forward(model, output_hidden_states=True, labels=tiny_inputs(ROWS)["input_ids"], return_dict=False),
        output.to_tuple(),
    ):
        assert isinstance(values, tuple) and len(values) == len(output)
        for value, expected in zip(values[:-1], output.to_tuple()[:-1], strict=True):
            assert torch.equal(value, expected)
    model.config.return_dict = False
    assert isinstance(forward(model), tuple) and not isinstance(forward(model, return_dict=True), tuple)
    assert model.segment(**tiny_inputs([[5]]), max_new_tokens=2).sequences.shape == (1, 20)


def test_embeddings_are_no_input():
    model = tiny_model()
    with pytest.raises(ValueError, match="forward looks for segment tokens in input_ids and takes no inputs_embeds"):
        forward(model, inputs_embeds=torch.zeros(3, LENGTH, WIDTH))
    assert torch.equal(forward(model, inputs_embeds=None).logits, forward(model).logits)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_eager_attention_gives_what_sdpa_gives(dtype, side, masked):
    inputs = tiny_inputs(ROWS)
    if side == "right":
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            padding = int((~mask).sum())
            for name in ("input_ids", "attention_mask"):
                inputs[name][row] = inputs[name][row].roll(-padding)
    if not masked:
        inputs["attention_mask"] = None
    # A fixed layer: another one might be chosen where two are close.
    settings = {"layer_selection": 2, "output_hidden_states": True}
    outputs = []
    for attention in ("sdpa", "eager"):
        model = tiny_model().to(dtype)
        model.set_attn_implementation(attention)
        with torch.no_grad():
            outputs.append(model(**inputs, **settings))
    seen = inputs["attention_mask"].bool() if masked else torch.ones(3, LENGTH, dtype=torch.bool)
    allowed = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for states, others in zip(*(output.hidden_states for output in outputs), strict=True):
        torch.testing.assert_close(states[seen], others[seen], **allowed)
    for name in ("similarity_map", "mask_logits", "iou_scores"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], **allowed)


def test_embeddings_may_be_exchanged():
    model, read, write = tiny_model(), nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
    before = forward(model)
    model.set_input_embeddings(read)
    model.set_output_embeddings(write)
    assert model.get_input_embeddings() is model.lmm.get_input_embeddings() is read
    assert model.get_output_embeddings() is model.lmm.get_output_embeddings() is model.lmm.lm_head is write
    after = forward(model)
    assert (after.logits - before.logits).abs().max() > 1e-3
    assert (after.mask_logits - before.mask_logits).abs().max() > 1e-4


@pytest.mark.parametrize("arguments, size", [((50,), 50), ((40, 64), 64), ((None,), 40), ((VOCAB_SIZE + 8, 16), 48)])
def test_a_resized_vocabulary_is_known_everywhere(arguments, size):
    model, before = tiny_model(), forward(tiny_model())
    assert model.vocab_size == VOCAB_SIZE
    embeddings = model.resize_token_embeddings(*arguments)
    assert embeddings is model.get_input_embeddings()
    assert model.vocab_size == model.config.get_text_config().vocab_size == model.lmm.config.text_config.vocab_size
    assert model.vocab_size == embeddings.num_embeddings == model.get_output_embeddings().out_features == size
    after = forward(model)
    assert torch.equal(after.logits[..., :VOCAB_SIZE], before.logits)
    torch.testing.assert_close(after.mask_logits, before.mask_logits)
    assert forward(model, labels=tiny_inputs(ROWS)["input_ids"]).loss.isfinite()


def test_a_vocabulary_may_be_cut_behind_the_special_tokens():
    config = tiny_config().to_dict()
    config["lmm_config"]["image_token_index"] = 3
    model = UGroundForReferringSegmentation(
        UGroundConfig.from_dict({**config, "segment_token_id": 4, "reject_token_id": 5})
    )
    model.resize_token_embeddings(30)
    inputs = tiny_inputs([[7, SEGMENT_TOKEN]])
    inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN], inputs["input_ids"][0, -1] = 3, 4
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 19, 30)


def test_the_decoder_is_the_language_model():
    model = tiny_model()
    assert model.get_decoder() is model.lmm.model.language_model
    other = copy.deepcopy(model.get_decoder())
    model.set_decoder(other)
    assert model.get_decoder() is other
    with torch.no_grad():
        other.norm.weight.zero_()
    assert torch.equal(forward(model).logits, torch.zeros(3, LENGTH, VOCAB_SIZE))


def test_prompts_may_come_under_the_name_of_transformers():
    model, inputs = tiny_model(), tiny_inputs([[5, 6], [7]])
    expected = model.generate(**inputs, max_new_tokens=4)
    ids = inputs.pop("input_ids")
    assert torch.equal(model.generate(inputs=ids, **inputs, max_new_tokens=4), expected)
    assert torch.equal(model.generate(ids, **inputs, max_new_tokens=4), expected)
    with pytest.raises(ValueError, match="generate takes either input_ids or inputs, got both"):
        model.generate(ids, inputs=ids, **inputs)
    with pytest.raises(ValueError, match="generate takes either input_ids or inputs, got none"):
        model.generate(**inputs)


def test_generate_returns_what_it_is_asked_for():
    model, inputs = eager_model(), tiny_inputs([[5, 6], [7]])
    names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    result = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, **dict.fromkeys(names, True)
    )
    assert result.sequences.shape == (2, 19 + 3)
    assert len(result.scores) == len(result.logits) == len(result.attentions) == len(result.hidden_states) == 3
    assert len(result.attentions[0]) == LAYERS and len(result.hidden_states[0]) == LAYERS + 1
    assert result.attentions[0][0].shape == (2, HEADS, 19, 19)


def test_a_copy_is_a_model_of_its_own():
    model = tiny_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer_policy.gates.zero_()
    assert torch.equal(forward(model).logits, forward(other).logits)
    assert model.layer_policy.gates.abs().sum() > 0


COMMON = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": torch.float16,
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "tie_word_embeddings": True,
}


def test_a_config_takes_what_every_config_takes(tmp_path):
    config = tiny_config(**COMMON)
    assert {name: getattr(config, name) for name in COMMON} == COMMON
    config.save_pretrained(tmp_path / "sub")
    loaded = UGroundConfig.from_pretrained(tmp_path, subfolder="sub")
    assert loaded.to_dict() == config.to_dict()
    content = json.loads(config.to_json_string())
    assert content["segment_token_id"] == SEGMENT_TOKEN and content["lmm_config"]["model_type"] == "llava"
    config.to_json_file(tmp_path / "config.json")
    assert UGroundConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()


def test_a_config_can_be_made_of_nothing_and_counts_labels():
    config = UGroundConfig()
    assert config.lmm_config.model_type == "llava" and config.sam_config is None and config.mask_head is None
    assert UGroundConfig(sam_config={}).sam_config.model_type == "sam"
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3
    assert tiny_config(num_labels=5).num_labels == 5


def test_parts_of_a_config_load_by_themselves(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    for name in UGroundConfig.sub_configs:
        part = getattr(config, name)
        assert type(part).from_pretrained(tmp_path).to_dict() == part.to_dict(), name
