"""Answers written with a cache, and masks read from the states of that pass, held against the teacher-forced pass."""

import warnings

import pytest
import torch
from tiny import END_TOKEN, IMAGE_TOKEN, VOCAB_SIZE, tiny_inputs, tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as transformers_logging

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
FIELDS = ("layer_logits", "layer_index", "log_probs", "similarity", "similarity_map", "mask_logits", "iou_scores")
# Prompts of unequal length about a square, a wide and a tall image, and once more about the wide one.
PROMPTS, IMAGES = [[5, 6, 7, 8, 9, 10], [7, 8], [20, 21, 22], [4]], [0, 1, 2, 1]
NEW_TOKENS = 14


def writer(**settings):
    """
    A model that writes its segment token here and there, and inputs for it.

    A random model hardly ever writes a given token, so the one that it writes most evenly becomes `[SEG]`.
    """
    inputs = tiny_inputs(PROMPTS, IMAGES)
    asked = set(inputs["input_ids"].flatten().tolist())
    for seed in range(20):
        model = tiny_model(seed, **settings)
        # Rows that go on to the end have more of it; rows that end early are tested by themselves.
        model.generation_config.suppress_tokens = [END_TOKEN]
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
        rows = {token: (written == token).sum(-1) for token in set(written.flatten().tolist()) - asked}
        evenly = {token: int(counts.clamp_max(3).sum()) for token, counts in rows.items()}
        model.config.segment_token_id = max(evenly, key=evenly.get, default=None)
        if evenly and (rows[model.config.segment_token_id] > 0).sum() >= 3:
            return model, inputs
    raise AssertionError("no random model wrote any token in three answers")


def teacher_forced(model, inputs, sequences, **settings):
    """`forward` on the tokens that were written, all of them visible."""
    visible = torch.ones(len(sequences), sequences.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    forced = {**inputs, "input_ids": sequences, "attention_mask": torch.cat([inputs["attention_mask"], visible], 1)}
    with torch.no_grad():
        return model(**forced, **settings)


def assert_same(actual, expected, fields=FIELDS):
    for name in fields:
        torch.testing.assert_close(
            actual[name], expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "settings", [{}, {"similarity_scaling": "minmax", "embedding_layer": "last"}], ids=["scaled", "minmax"]
)
@pytest.mark.parametrize("selection", ["argmax", "last", 2])
def test_one_cached_pass_equals_the_teacher_forced_one(settings, selection):
    model, inputs = writer(**settings)
    output = model.segment(**inputs, max_new_tokens=NEW_TOKENS, layer_selection=selection)
    assert len(output.segment_row.unique()) >= 3
    assert len(output.segment_row) > 3
    forced = teacher_forced(model, inputs, output.sequences, layer_selection=selection)
    assert_same(output, forced, ("segment_row", *FIELDS))
    assert (output.mask_logits[0] - output.mask_logits[1:]).abs().amax((1, 2)).min() > 1e-3


def test_the_answer_is_the_greedy_one():
    model, inputs = writer()
    sequences = model.segment(**inputs, max_new_tokens=NEW_TOKENS).sequences
    logits = teacher_forced(model, inputs, sequences).logits
    logits[..., [IMAGE_TOKEN, END_TOKEN]] = -torch.inf
    start = inputs["input_ids"].shape[1]
    assert torch.equal(logits[:, start - 1 : -1].argmax(-1), sequences[:, start:])
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW_TOKENS), sequences)


def test_token_scores_are_the_probabilities_of_the_segment_tokens():
    model, inputs = writer()
    output = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    probabilities = teacher_forced(model, inputs, output.sequences).logits[..., :IMAGE_TOKEN].softmax(-1)
    found = (output.sequences == model.config.segment_token_id).nonzero()
    expected = torch.stack([probabilities[row, column - 1, model.config.segment_token_id] for row, column in found])
    torch.testing.assert_close(output.token_scores, expected, **TOLERANCE)
    assert output.token_scores.min() > 1 / VOCAB_SIZE and output.token_scores.max() < 1


def test_the_placeholder_of_images_is_never_written():
    """Its row of the vocabulary is not trained, so the model may well like it."""
    model, inputs = writer()
    expected = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    with torch.no_grad():
        model.lmm.lm_head.weight[IMAGE_TOKEN] = 10 * model.lmm.lm_head.weight[model.config.segment_token_id]
    output = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.token_scores, expected.token_scores)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW_TOKENS), expected.sequences)
    # What a call suppresses comes on top.
    segment_token = model.config.segment_token_id
    silent = model.generate(**inputs, max_new_tokens=NEW_TOKENS, suppress_tokens=[segment_token])[:, 23:]
    assert not ((silent == segment_token) | (silent == IMAGE_TOKEN)).any()


def test_rows_are_as_if_asked_alone():
    model, inputs = writer()
    together = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    for row, image in enumerate(IMAGES):
        start = int((inputs["attention_mask"][row] == 0).sum())
        images = {name: inputs[name][image, None] for name in inputs if name.endswith(("values", "sizes"))}
        alone = model.segment(input_ids=inputs["input_ids"][row, None, start:], **images, max_new_tokens=NEW_TOKENS)
        assert torch.equal(alone.sequences[0], together.sequences[row, start:])
        mine = together.segment_row == row
        assert_same(
            alone, {name: together[name][mine] for name in (*FIELDS, "token_scores")}, (*FIELDS, "token_scores")
        )


def test_more_text_padding_changes_nothing():
    model, inputs = writer()
    expected = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (7, 0))
    output = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    assert output.prompt_length == expected.prompt_length + 7
    assert torch.equal(output.sequences[:, 7:], expected.sequences)
    assert_same(output, expected, ("segment_row", "token_scores", *FIELDS))


class Write(LogitsProcessor):
    """Makes row r write `answers[r]`, whatever the model would."""

    def __init__(self, answers, start):
        self.answers, self.start = answers, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self.answers):
            forced[row, answer[input_ids.shape[1] - self.start]] = 0.0
        return forced


def test_answers_of_unequal_length():
    """Row 0 writes one segment and ends, row 1 none, row 2 two of them, with the last token that is allowed."""
    model = tiny_model()
    seg = model.config.segment_token_id
    inputs = tiny_inputs([[5, 6, 7], [8], [9, 10]])
    answers = [[4, seg, END_TOKEN, 0, 0], [END_TOKEN, 0, 0, 0, 0], [seg, 11, 12, 13, seg]]
    write = LogitsProcessorList([Write(answers, inputs["input_ids"].shape[1])])
    output = model.segment(**inputs, max_new_tokens=5, logits_processor=write)
    assert output.sequences[:, output.prompt_length :].tolist() == answers
    assert output.segment_row.tolist() == [0, 2, 2]
    forced = teacher_forced(model, inputs, output.sequences)
    assert_same(output, forced)
    # The probability is the model's own, not that of the processor, which was certain.
    assert output.token_scores.max() < 0.9


def test_segment_tokens_of_the_prompt_are_not_answered():
    model = tiny_model()
    inputs = tiny_inputs([[5, model.config.segment_token_id, 6]])
    write = LogitsProcessorList([Write([[7, END_TOKEN]], inputs["input_ids"].shape[1])])
    output = model.segment(**inputs, max_new_tokens=2, logits_processor=write)
    assert len(output.segment_row) == 0


@pytest.mark.parametrize("selection", ["sample", "argmax", "last", "mc", 1])
def test_answers_without_a_segment(selection):
    model, inputs = tiny_model(), tiny_inputs([[5, 6], [7]])
    write = LogitsProcessorList([Write([[4, END_TOKEN]] * 2, inputs["input_ids"].shape[1])])
    output = model.segment(**inputs, max_new_tokens=2, logits_processor=write, layer_selection=selection)
    assert output.mask_logits.shape == (0, 16, 16)
    assert [len(output[name]) for name in ("segment_row", "token_scores", *FIELDS)] == [0] * 9


def test_sizes_and_images_come_with_the_result():
    model, inputs = writer()
    output = model.segment(**inputs, max_new_tokens=3)
    for name in ("valid_sizes", "sam_valid_sizes", "original_sizes", "image_index"):
        assert torch.equal(output[name], inputs[name])
    assert output.prompt_length == inputs["input_ids"].shape[1]


def test_monte_carlo_follows_the_seed():
    model, inputs = writer()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.segment(**inputs, max_new_tokens=NEW_TOKENS, layer_selection="mc", num_layer_samples=3))
    assert_same(runs[0], runs[1], (*FIELDS, "uncertainty"))
    assert not torch.equal(runs[0].mask_logits, runs[2].mask_logits)
    assert runs[0].uncertainty.max() > 0
    torch.manual_seed(0)
    forced = teacher_forced(model, inputs, runs[0].sequences, layer_selection="mc", num_layer_samples=3)
    assert_same(runs[0], forced, (*FIELDS, "uncertainty"))


def test_masks_may_be_read_again_at_other_layers():
    model, inputs = writer()
    images = model.get_image_embeddings(**inputs)
    answers = model.write_answers(
        inputs["input_ids"], inputs["attention_mask"], inputs["image_index"], images, max_new_tokens=NEW_TOKENS
    )
    for selection in ("last", 0, "argmax"):
        expected = model.segment(**inputs, max_new_tokens=NEW_TOKENS, layer_selection=selection)
        output = model.read_masks(answers, selection)
        assert output.keys() == expected.keys()
        assert_same(output, expected, ("sequences", "segment_row", "token_scores", *FIELDS))


def test_sampled_answers_have_the_masks_of_what_was_written():
    model, inputs = writer()
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.segment(**inputs, max_new_tokens=NEW_TOKENS, **sampling))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert not torch.equal(runs[0].sequences, runs[2].sequences)
    for run in runs[1:]:
        assert len(run.segment_row) > 0
        assert_same(run, teacher_forced(model, inputs, run.sequences))


def test_images_encoded_before_give_the_same():
    model, inputs = writer()
    expected = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    images = model.get_image_embeddings(**inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_index")}
    output = model.segment(**text, image_embeddings=images, max_new_tokens=NEW_TOKENS)
    assert_same(output, expected, ("sequences", "segment_row", "token_scores", *FIELDS))
    assert torch.equal(model.generate(**text, image_embeddings=images, max_new_tokens=NEW_TOKENS), output.sequences)


def test_images_are_encoded_once_and_every_token_passes_once():
    model, inputs = writer()
    calls = []

    def watch(name, module):
        def note(_, args, kwargs):
            tensors = [
                *args,
                *(value for value in kwargs.values() if torch.is_tensor(value) and value.is_floating_point()),
            ]
            calls.append((name, *tensors[0].shape[:2]))

        module.register_forward_pre_hook(note, with_kwargs=True)

    watch("clip", model.lmm.model.vision_tower)
    watch("sam", model.mask_decoder.sam.vision_encoder)
    watch("lmm", model.lmm.model.language_model.norm)
    model.segment(**inputs, max_new_tokens=4)
    # The prefixes of three images once each, then the rest of four prompts, then token by token.
    assert calls == [("sam", 3, 3), ("clip", 3, 3), ("lmm", 3, 17), ("lmm", 4, 6)] + [("lmm", 4, 1)] * 3


def test_bfloat16_answers():
    model, inputs = writer()
    model.to(torch.bfloat16)
    output = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    assert len(output.segment_row) > 0
    assert output.mask_logits.dtype == output.token_scores.dtype == torch.float32
    assert output.mask_logits.isfinite().all()


def test_settings_may_come_as_a_config_as_arguments_or_from_the_model():
    model, inputs = writer()
    expected = model.segment(**inputs, max_new_tokens=5).sequences
    config = GenerationConfig(max_new_tokens=9)
    for output in (
        model.segment(**inputs, generation_config=config, max_new_tokens=5),
        model.segment(**inputs, generation_config=GenerationConfig(max_new_tokens=5)),
    ):
        assert torch.equal(output.sequences, expected)
    assert config.max_new_tokens == 9
    model.generation_config.max_new_tokens = 5
    assert torch.equal(model.segment(**inputs).sequences, expected)
    assert torch.equal(model.generate(**inputs), expected)
    assert model.generate(**inputs, max_new_tokens=2).shape == (4, 25)
    assert model.generation_config.output_hidden_states is not True


def test_the_end_token_of_the_model_holds_for_any_config():
    model, inputs = tiny_model(), tiny_inputs([[5]])
    write = LogitsProcessorList([Write([[4, END_TOKEN, 4, 4]], inputs["input_ids"].shape[1])])
    for settings in ({"max_new_tokens": 4}, {"generation_config": GenerationConfig(max_new_tokens=4)}):
        output = model.segment(**inputs, **settings, logits_processor=write)
        assert output.sequences[0, output.prompt_length :].tolist() == [4, END_TOKEN]


@pytest.fixture
def warned(caplog):
    """What transformers warns of, also what it would warn of only once a process."""
    transformers_logging.warning_once.cache_clear()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()
    transformers_logging.set_verbosity_error()


def test_generation_says_nothing(warned):
    model, inputs = writer()
    with warnings.catch_warnings(action="error"):
        model.segment(**inputs, max_new_tokens=3)
        model.generate(**inputs, max_new_tokens=3)
        model.segment(**inputs, max_new_tokens=3, do_sample=True, temperature=0.7)
    assert warned.messages == []


def test_generate_takes_what_segment_cannot():
    model, inputs = writer()
    assert model.generate(**inputs, num_beams=2, max_new_tokens=3).shape == (4, 26)
    assert model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=3).shape == (8, 26)
    result = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert len(result.logits) == 3
    assert result.logits[0].shape == (4, VOCAB_SIZE)


UNSUPPORTED = {
    "beams": ({"num_beams": 2}, "segment writes by greedy_search or sample only, got settings of beam_search"),
    "beams of a config": ({"generation_config": GenerationConfig(num_beams=3)}, "got settings of beam_search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "got settings of assisted_generation"),
    "several answers": ({"num_return_sequences": 2, "do_sample": True}, "supports only num_return_sequences=1, got 2"),
    "no cache": ({"use_cache": False}, "segment supports only use_cache=True, got False"),
    "prompt in chunks": ({"prefill_chunk_size": 4}, "segment supports only prefill_chunk_size=None, got 4"),
    "unknown argument": ({"max_new_token": 3}, "max_new_token"),
    "unknown rule": ({"layer_selection": "best"}, "layer_selection must be one of .* got 'best'"),
    "no such layer": ({"layer_selection": 9}, "layer_selection must lie in 0..4 for this model, got 9"),
    "no draws": ({"layer_selection": "mc", "num_layer_samples": 0}, "num_layer_samples must be at least 1, got 0"),
}


@pytest.mark.parametrize("settings, sentence", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_segment_cannot_do_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model().segment(**tiny_inputs([[5], [6]]), **{"max_new_tokens": 2, **settings})


@pytest.mark.parametrize("settings", [{"layer_selection": "best"}, {"num_layer_samples": 0}])
def test_a_wrong_layer_selection_is_told_before_anything_is_written(settings):
    model = tiny_model()
    model.lmm.register_forward_pre_hook(lambda *_: pytest.fail("the LMM was asked"))
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.segment(**tiny_inputs([[5], [6]]), max_new_tokens=2, **settings)


def test_an_assistant_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="got settings of assisted_generation"):
        model.segment(**tiny_inputs([[5]]), max_new_tokens=2, assistant_model=model.lmm)


@pytest.mark.parametrize("method", ["segment", "generate"])
def test_padding_on_the_right_is_refused(method):
    inputs = tiny_inputs([[5, 6, 7], [8]])
    for name in ("input_ids", "attention_mask"):
        inputs[name][1] = inputs[name][1].roll(-2)
    with pytest.raises(ValueError, match="prompts must be padded on the left"):
        getattr(tiny_model(), method)(**inputs, max_new_tokens=2)


def test_an_image_is_needed():
    inputs = tiny_inputs([[5]])
    del inputs["sam_pixel_values"]
    with pytest.raises(ValueError, match="pass image_embeddings, or all of"):
        tiny_model().segment(**inputs, max_new_tokens=2)


def test_rows_need_their_image_tokens():
    inputs = tiny_inputs([[5, IMAGE_TOKEN]])
    with pytest.raises(ValueError, match=r"16 image tokens of one image, got \[17\]"):
        tiny_model().segment(**inputs, max_new_tokens=2)


def break_weight(model, name):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = float("nan")


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "layer_selection": "mc"}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "name",
    [
        "lmm.lm_head.weight",
        "lmm.model.language_model.layers.2.mlp.up_proj.weight",
        "lmm.model.vision_tower.embeddings.patch_embedding.weight",
        "lmm.model.multi_modal_projector.linear_1.bias",
        "mask_decoder.sam.vision_encoder.patch_embed.projection.weight",
        "mask_decoder.sam.mask_decoder.mask_tokens.weight",
        "mask_decoder.sam.mask_decoder.iou_prediction_head.proj_in.weight",
        "layer_policy.gates",
        "segment_projection.linear_2.weight",
    ],
)
def test_nan_weights_are_named(name, settings):
    model, inputs = tiny_model(), tiny_inputs([[5, 6, 7], [8]])
    break_weight(model, name)
    write = LogitsProcessorList([Write([[model.config.segment_token_id]] * 2, inputs["input_ids"].shape[1])])
    with pytest.raises(ValueError, match=f"the model's weights hold NaN or infinity in {name}$"):
        model.segment(**inputs, max_new_tokens=1, logits_processor=write, **settings)


def test_nan_weights_of_sam_are_named_though_nothing_was_found():
    model, inputs = tiny_model(), tiny_inputs([[5, 6, 7], [8]])
    break_weight(model, "mask_decoder.sam.vision_encoder.patch_embed.projection.weight")
    write = LogitsProcessorList([Write([[END_TOKEN]] * 2, inputs["input_ids"].shape[1])])
    with pytest.raises(ValueError, match="NaN or infinity in mask_decoder.sam.vision_encoder.patch_embed.projection"):
        model.segment(**inputs, max_new_tokens=1, logits_processor=write)


def test_infinite_weights_are_named():
    model, inputs = writer()
    with torch.no_grad():
        model.lmm.lm_head.weight[7] = torch.inf
    with pytest.raises(ValueError, match="the model's weights hold NaN or infinity in lmm.lm_head.weight$"):
        model.segment(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="NaN or infinity in lmm.lm_head.weight$"):
        model.generate(**inputs, max_new_tokens=2)


def test_an_overflow_with_good_weights_names_the_precision():
    model, inputs = writer()
    with torch.no_grad():
        model.lmm.model.multi_modal_projector.linear_2.weight.fill_(60000)
    model.to(torch.float16)
    with pytest.raises(ValueError, match="computed NaN or infinity in torch.float16; try dtype=torch.float32"):
        model.segment(**inputs, max_new_tokens=2)
