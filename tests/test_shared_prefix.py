"""Queries that share their image share what is read of it: held against asking one at a time."""

import pytest
import torch
from tiny import END_TOKEN, IMAGE_TOKEN, SEGMENT_TOKEN, say_only, tiny_inputs, tiny_model
from transformers import BitsAndBytesConfig, LogitsProcessor, LogitsProcessorList

from uground.modeling_uground.mask_head import mask_overlap
from uground.modeling_uground.pretrained_uground import keep_mask_path

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
FIELDS = ("layer_logits", "layer_index", "similarity", "similarity_map", "mask_logits", "iou_scores", "token_scores")
# Rows about a square, a wide and a tall image, in any order and of any length; what they write has 0, 1 or 3 segments.
PROMPTS = [[5, 6, 7, 8, 9, 10], [7, 8], [20, 21, 22], [4], [11, 12, 13, 14, 15, 16, 17, 18]]
IMAGES = [0, 1, 0, 2, 1]
S, E = SEGMENT_TOKEN, END_TOKEN
ANSWERS = [[4, S, E, 0, 0], [E, 0, 0, 0, 0], [S, 11, S, 13, S], [9, 9, 9, 9, S], [S, E, 0, 0, 0]]


class Write(LogitsProcessor):
    """Makes row r write `answers[r]`, one token a call, whatever the model would and wherever the prompt ends."""

    def __init__(self, answers):
        self.answers, self.step = answers, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self.answers):
            forced[row, answer[self.step]] = 0.0
        self.step += 1
        return forced


def write(answers):
    return {"logits_processor": LogitsProcessorList([Write(answers)]), "max_new_tokens": len(answers[0])}


def row_of(inputs, row):
    """One row as an input of its own, without padding, with its image only."""
    image, start = int(inputs["image_index"][row]), int((inputs["attention_mask"][row] == 0).sum())
    images = {name: inputs[name][image, None] for name in inputs if name.endswith(("values", "sizes"))}
    return {"input_ids": inputs["input_ids"][row, None, start:], **images}


def assert_as_if_alone(model, inputs, together, answers=ANSWERS, **settings):
    for row, answer in enumerate(answers):
        alone = model.segment(**row_of(inputs, row), **write([answer]), **settings)
        mine = together.segment_row == row
        assert int(mine.sum()) == answer.count(S) == len(alone.segment_row)
        for name in FIELDS:
            torch.testing.assert_close(together[name][mine], alone[name], **TOLERANCE)
        length = together.prompt_length
        assert together.sequences[row, length:].tolist()[: answer.index(E) if E in answer else None] == [
            token for token in answer if token not in (E, 0)
        ]


@pytest.fixture
def lmm_calls():
    """Shapes `(rows, tokens)` of what goes through the LMM of a model."""
    calls = []

    def watch(model):
        norm = model.lmm.model.language_model.norm
        norm.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape[:2])))
        return calls

    return watch


@pytest.mark.parametrize("selection", ["argmax", "last"])
@pytest.mark.parametrize("settings", [{}, {"similarity_scaling": "minmax", "embedding_layer": "last"}])
def test_rows_that_share_an_image_are_as_if_asked_alone(selection, settings, lmm_calls):
    model, inputs = tiny_model(**settings), tiny_inputs(PROMPTS, IMAGES)
    calls = lmm_calls(model)
    together = model.segment(**inputs, **write(ANSWERS), layer_selection=selection)
    assert calls == [(3, 17), (5, 8)] + [(5, 1)] * 4
    assert torch.equal(together.sequences[:, : together.prompt_length], inputs["input_ids"])
    assert_as_if_alone(model, inputs, together, layer_selection=selection)


def test_one_image_and_unpadded_rows():
    """Nothing is masked: the mask is dropped on the way, and the cache must still be continued at the right place."""
    model, inputs = tiny_model(), tiny_inputs([[5, 6], [7, 8], [9, 10]], [0, 0, 0])
    together = model.segment(**inputs, **write(ANSWERS[2:]))
    assert_as_if_alone(model, inputs, together, ANSWERS[2:])


def test_attention_implementations_and_precisions_share_alike():
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES)
    expected = model.segment(**inputs, **write(ANSWERS))
    model.set_attn_implementation("eager")
    eager = model.segment(**inputs, **write(ANSWERS))
    torch.testing.assert_close(eager.mask_logits, expected.mask_logits, **TOLERANCE)
    model.to(torch.bfloat16)
    narrow = model.segment(**inputs, **write(ANSWERS), layer_selection="last")
    alone = model.segment(**row_of(inputs, 3), **write(ANSWERS[3:4]), layer_selection="last")
    (similarity,) = narrow.similarity[narrow.segment_row == 3]
    torch.testing.assert_close(similarity, alone.similarity[0], atol=0.3, rtol=0.1)


def before_the_image(inputs, texts):
    """Rows with more text between the start token and the image; padded anew on the left."""
    rows = []
    for ids, mask, text in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), texts, strict=True):
        ids = ids[mask.index(1) :]
        rows.append([ids[0], *text, *ids[1:]])
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    inputs["input_ids"] = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    inputs["attention_mask"] = torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding])
    return inputs


def test_only_rows_that_begin_alike_share(lmm_calls):
    """Rows 0 and 4 ask about different images; rows 1 and 2 about one, behind different words."""
    inputs = before_the_image(tiny_inputs(PROMPTS, [0, 1, 1, 2, 2]), [[30], [31], [32], [33], [33]])
    model = tiny_model()
    calls = lmm_calls(model)
    together = model.segment(**inputs, **write(ANSWERS))
    assert calls[:2] == [(4, 18), (5, 8)]
    assert_as_if_alone(model, inputs, together)


def test_prefixes_of_unequal_length_are_shared_padded_in_front(lmm_calls):
    inputs = before_the_image(tiny_inputs(PROMPTS, [0, 0, 0, 0, 0]), [[], [], [30, 31, 32], [], []])
    model = tiny_model()
    calls = lmm_calls(model)
    together = model.segment(**inputs, **write(ANSWERS))
    # Two prefixes, the longer one of 20 tokens, and all rests behind them.
    assert calls[0] == (2, 20) and calls[1][0] == len(ANSWERS)
    assert_as_if_alone(model, inputs, together)


def test_a_row_that_ends_with_its_image_is_not_shared():
    model, inputs = tiny_model(), tiny_inputs([[], [5, 6]], [0, 0])
    together = model.segment(**inputs, **write(ANSWERS[2:4]))
    assert_as_if_alone(model, inputs, together, ANSWERS[2:4])


def test_a_prefix_read_before_is_used_again_and_stays_as_it_was(lmm_calls):
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, [0] * 5)
    expected = model.segment(**inputs, **write(ANSWERS))
    images = model.get_image_embeddings(**inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_index")}
    prefix = model.read_prefix(**text, image_embeddings=images)
    calls = lmm_calls(model)
    for _ in range(2):
        output = model.segment(**text, image_embeddings=images, prefix=prefix, **write(ANSWERS))
        for name in ("sequences", "segment_row", *FIELDS):
            torch.testing.assert_close(output[name], expected[name], **TOLERANCE)
    assert calls == ([(5, 8)] + [(5, 1)] * 4) * 2
    assert prefix.cache.get_seq_length() == prefix.length == 17


@pytest.mark.parametrize("same_number", [False, True])
def test_a_prefix_of_another_image_is_not_used(same_number):
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, [0, 1, 0, 2, 1])
    images = model.get_image_embeddings(**inputs)
    text = (inputs["input_ids"], inputs["attention_mask"])
    if same_number:
        # Everything but the pixels is the same: other images in the same places.
        others = model.get_image_embeddings(**tiny_inputs(PROMPTS, [0, 1, 0, 2, 1], seed=1))
        wrong = model.read_prefix(*text, inputs["image_index"], others)
    else:
        wrong = model.read_prefix(text[0][:1], text[1][:1], torch.tensor([2]), images)
    expected = model.segment(**inputs, **write(ANSWERS))
    output = model.segment(*text, inputs["image_index"], image_embeddings=images, prefix=wrong, **write(ANSWERS))
    torch.testing.assert_close(output.mask_logits, expected.mask_logits, **TOLERANCE)


@pytest.mark.parametrize("max_rows", [1, 2, 4])
def test_more_queries_than_fit_are_split(max_rows, lmm_calls):
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, [0] * 5)
    # The same answer for all, as the script starts anew with every part; of unequal length by what the rows write.
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = say_only(S)
    expected = model.segment(**inputs, max_new_tokens=6)
    assert set(expected.segment_row.tolist()) == {0, 1, 2, 3, 4}
    calls = lmm_calls(model)
    output = model.segment(**inputs, max_new_tokens=6, max_rows=max_rows)
    assert calls.count((1, 17)) == 1 and sum(rows for rows, tokens in calls if tokens == 8) == 5
    assert max(rows for rows, _ in calls) == max_rows
    assert output.keys() == expected.keys()
    for name in ("sequences", "segment_row", "image_index", "original_sizes", *FIELDS):
        torch.testing.assert_close(output[name], expected[name], **TOLERANCE)


def test_parts_count_their_rows_on():
    model, inputs = tiny_model(), tiny_inputs([[5], [6], [7]], [0, 0, 0])

    class Always(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([S]), 0.0)

    settings = {"logits_processor": LogitsProcessorList([Always()]), "max_new_tokens": 2}
    expected = model.segment(**inputs, **settings)
    output = model.segment(**inputs, **settings, max_rows=2)
    assert output.segment_row.tolist() == expected.segment_row.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(output.mask_logits, expected.mask_logits, **TOLERANCE)


def test_at_least_one_row_at_a_time():
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        tiny_model().segment(**tiny_inputs([[5]]), max_rows=0, max_new_tokens=1)


def test_agreement_is_the_mean_overlap_of_drawn_masks_with_their_average():
    model, inputs = tiny_model(3), tiny_inputs(PROMPTS, IMAGES)
    torch.manual_seed(0)
    output = model.segment(**inputs, **write(ANSWERS), layer_selection="mc", num_layer_samples=4)
    torch.manual_seed(0)
    answers = model.write_answers(
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["image_index"],
        model.get_image_embeddings(**inputs),
        **write(ANSWERS),
    )
    draws = len(answers.segments)
    drawn = model.layer_policy(answers.segments.states).softmax(-1).multinomial(4, replacement=True)
    masks = torch.stack([model.read_masks(answers, layer).mask_logits for layer in range(5)])
    expected = []
    for segment in range(draws):
        mine = masks[drawn[segment], segment]
        mean = mine.sigmoid().mean(0) > 0.5
        expected.append(mask_overlap(mine > 0, mean.expand_as(mine)).mean())
    torch.testing.assert_close(output.agreement, torch.stack(expected))
    assert output.agreement.min() < 1
    assert model.segment(**inputs, **write(ANSWERS)).agreement is None


def test_mask_overlap():
    one, two = torch.tensor([[1, 1], [0, 0]]).bool(), torch.tensor([[1, 0], [1, 0]]).bool()
    nothing = torch.zeros(2, 2).bool()
    pairs = torch.stack([one, one, nothing]), torch.stack([two, nothing, nothing])
    assert mask_overlap(*pairs).tolist() == pytest.approx([1 / 3, 0, 1])


def test_compiled_parts_give_the_same_and_save_under_the_same_names():
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES)
    expected, names = model.segment(**inputs, **write(ANSWERS)), list(model.state_dict())
    assert model.compile_mask_path(backend="eager") is model
    compiled = model.segment(**inputs, **write(ANSWERS))
    torch.testing.assert_close(compiled.mask_logits, expected.mask_logits, **TOLERANCE)
    assert list(model.state_dict()) == names


def test_quantisation_leaves_the_mask_path_alone():
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert {"mask_decoder", "segment_projection", "lmm.lm_head"} <= {*keep_mask_path(config).llm_int8_skip_modules}
    assert config.llm_int8_skip_modules is None
    mine = keep_mask_path({"load_in_8bit": True, "llm_int8_skip_modules": ["vision_tower"]})
    assert {"vision_tower", "layer_policy", "mask_decoder"} <= {*mine["llm_int8_skip_modules"]}
    other = keep_mask_path({"quant_method": "torchao"})
    assert "similarity_scaling" in other["modules_to_not_convert"]
    with pytest.raises(ValueError, match="must be able to leave modules out, got a int"):
        keep_mask_path(4)


def test_image_tokens_of_the_prompt_are_not_in_the_answer():
    """The shared layout moves image tokens; what comes back is as it was given."""
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES)
    output = model.segment(**inputs, max_new_tokens=3)
    assert ((output.sequences == IMAGE_TOKEN).sum(-1) == 16).all()
