"""What is kept of a pass is what a plain run gives with all its hidden states, and no more is kept than is read."""

import pytest
import torch
from tiny import END_TOKEN, SEGMENT_TOKEN, say_only, tiny_inputs, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

from uground.modeling_uground.layer_states import ImageStates, PrefixStates

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
S, E = SEGMENT_TOKEN, END_TOKEN
LAYERS, WIDTH, TOKENS = 5, 16, 16
# Several segments per row, rows that end early, a row without any; a run of three and one of two for K = 3.
PROMPTS = [[5, 6, 7, 8], [7], [20, 21], [4, 9, 3]]
ANSWERS = [[4, S, S, S, 9, S], [E, 0, 0, 0, 0, 0], [S, S, E, 0, 0, 0], [S, S, S, S, S, S]]
IMAGES = {"shared": [0, 1, 0, 1], "unshared": [0, 1, 2, 3]}


class Write(LogitsProcessor):
    """Row r writes `answers[r]`."""

    def __init__(self, answers, start):
        self.answers, self.start = answers, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self.answers):
            forced[row, answer[input_ids.shape[1] - self.start]] = 0.0
        return forced


def write(model, inputs, layers=None, **settings):
    """Answers of one call, with the states that it keeps."""
    if not settings:
        processor = Write(ANSWERS, inputs["input_ids"].shape[1])
        settings = {"logits_processor": LogitsProcessorList([processor]), "max_new_tokens": len(ANSWERS[0])}
    text = (inputs["input_ids"], inputs["attention_mask"], inputs["image_index"])
    return model.write_answers(*text, model.get_image_embeddings(**inputs), layers=layers, **settings)


@torch.no_grad()
def plain(model, inputs, sequences):
    """All hidden states of one pass over everything that was written, each row by itself."""
    visible = torch.ones(len(sequences), sequences.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], visible], 1)
    images = model.get_image_embeddings(**inputs)
    rows = model.prepare_rows(sequences, mask, inputs["image_index"], images)
    outputs = model.lmm(**rows.lmm_inputs(), output_hidden_states=True)
    assert len(outputs.hidden_states) == LAYERS
    return rows, outputs


def predicting(sequences, start, num_ids, end=E):
    """Row and first predicting column of each segment that was written: a run of `[SEG]` cut into whole ones."""
    found = []
    for row, ids in enumerate(sequences.tolist()):
        column = start
        while column < len(ids) and ids[column] != end:
            if ids[column : column + num_ids] == [S] * num_ids:
                found.append((row, column - 1))
                column += num_ids
            else:
                column += 1
    return found


def assert_states_of(answers, model, inputs, num_ids, kept=None):
    """Against the plain run: states of what wrote segments, image tokens at kept layers, and what is held in bytes."""
    rows, expected = plain(model, inputs, answers.sequences)
    found = predicting(answers.sequences, answers.prompt_length, num_ids)
    segments = answers.segments
    assert segments.row.tolist() == [row for row, _ in found]
    assert segments.states.shape == (len(found), num_ids, LAYERS, WIDTH)
    for number, (row, column) in enumerate(found):
        states = torch.stack([state[row, column : column + num_ids] for state in expected.hidden_states], 1)
        torch.testing.assert_close(segments.states[number], states, **TOLERANCE)
    layers = range(LAYERS) if kept is None else kept
    for layer in range(LAYERS):
        for number, (row, _) in enumerate(found):
            token_row = int(segments.token_row[number])
            if layer not in layers:
                with pytest.raises(ValueError, match=f"image states of layer {layer} were not kept; expected one of"):
                    segments.image_states.at(layer, token_row)
                continue
            states = expected.hidden_states[layer][row, rows.image_columns[row]]
            torch.testing.assert_close(segments.image_states.at(layer, token_row), states, **TOLERANCE)
    return found


@pytest.mark.parametrize("kept", [None, [4], [1, 3]], ids=["all layers", "the last", "two"])
@pytest.mark.parametrize("num_ids", [1, 3])
@pytest.mark.parametrize("images", IMAGES)
def test_states_are_those_of_a_plain_run(images, num_ids, kept):
    model, inputs = tiny_model(num_segment_tokens=num_ids), tiny_inputs(PROMPTS, IMAGES[images])
    answers = write(model, inputs, kept)
    found = assert_states_of(answers, model, inputs, num_ids, kept)
    assert len(found) == {1: 12, 3: 3}[num_ids]
    prefixes = len(set(IMAGES[images]))
    assert (answers.segments.image_states.row_of is not None) == (prefixes < 4)
    layers = LAYERS if kept is None else len(kept)
    image_bytes = prefixes * TOKENS * WIDTH * layers * 4
    assert answers.segments.image_states.nbytes == image_bytes
    assert answers.state_bytes == image_bytes + len(found) * num_ids * LAYERS * WIDTH * 4


@pytest.mark.parametrize("num_ids", [1, 3])
@pytest.mark.parametrize("images", IMAGES)
def test_states_of_sampled_answers(images, num_ids):
    """What is read is what was drawn, and not what was likeliest."""
    model, inputs = tiny_model(num_segment_tokens=num_ids), tiny_inputs(PROMPTS, IMAGES[images])
    # Of these two tokens only, so that runs of three are written too.
    only = [token for token in range(40) if token not in (S, 9)]
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 30, "suppress_tokens": only}
    answers = write(model, inputs, **settings)
    assert len(assert_states_of(answers, model, inputs, num_ids)) > 2
    torch.manual_seed(1)
    assert not torch.equal(write(model, inputs, **settings).sequences, answers.sequences)


@pytest.mark.parametrize("num_ids", [1, 3])
def test_nothing_written_is_an_ordinary_case(num_ids):
    model, inputs = tiny_model(num_segment_tokens=num_ids), tiny_inputs(PROMPTS, IMAGES["unshared"])
    answers = write(model, inputs, max_new_tokens=3, suppress_tokens=[S])
    assert len(answers.segments) == 0 and answers.segments.states.shape == (0, num_ids, LAYERS, WIDTH)
    assert answers.token_scores.shape == (0,)


@pytest.mark.parametrize("selection, layers", [("last", [4]), (2, [2]), ("argmax", range(5)), ("mc", range(5))])
@pytest.mark.parametrize("images", IMAGES)
def test_a_call_keeps_the_layers_that_its_rule_can_read(selection, layers, images, monkeypatch):
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES[images])
    kept, read = [], model._read_masks

    def watch(answers, request):
        states = answers.segments.image_states.layers
        kept.append([layer for layer, held in enumerate(states) if held is not None])
        return read(answers, request)

    monkeypatch.setattr(model, "_read_masks", watch)
    processor = Write(ANSWERS, inputs["input_ids"].shape[1])
    settings = {"logits_processor": LogitsProcessorList([processor]), "max_new_tokens": 6}
    model.segment(**inputs, **settings, layer_selection=selection)
    assert kept == [[*layers]]


def test_a_layer_that_was_not_kept_is_named():
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES["unshared"])
    answers = write(model, inputs, [4])
    assert model.read_masks(answers, "last").mask_logits.shape == (12, 16, 16)
    with pytest.raises(ValueError, match=r"image states of layer 0 were not kept; expected one of \[4\]"):
        model.read_masks(answers, 0)


def test_hooks_are_taken_off_again_also_after_an_error():
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES["unshared"])

    def hooks():
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())

    write(model, inputs)
    before = hooks()

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        write(model, inputs, logits_processor=LogitsProcessorList([Fails()]), max_new_tokens=1)
    assert hooks() == before


@torch.no_grad()
def test_one_pass_keeps_image_columns_and_no_view_of_the_rest():
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES["unshared"])
    images = model.get_image_embeddings(**inputs)
    rows = model.prepare_rows(inputs["input_ids"], inputs["attention_mask"], inputs["image_index"], images)
    adapter = model.adapter
    with PrefixStates(adapter.decoder_layers(model.lmm), adapter.final_norm(model.lmm), rows.image_columns) as kept:
        expected = model.lmm(**rows.lmm_inputs(), output_hidden_states=True).hidden_states
    states = kept.image_states(LAYERS)
    assert states.num_tokens == TOKENS
    for layer, state in enumerate(states.layers):
        gathered = torch.stack([expected[layer][row, columns] for row, columns in enumerate(rows.image_columns)])
        assert torch.equal(state, gathered)
        assert state.untyped_storage().nbytes() == 4 * TOKENS * WIDTH * 4


def test_rows_read_the_prefix_that_they_begin_with():
    states = ImageStates([None, torch.arange(24.0).view(2, 3, 4)])
    assert states.num_tokens == 3 and states.nbytes == 96
    shared = states.of_rows(torch.tensor([1, 0, 1]))
    assert shared.layers is states.layers and shared.row_of.tolist() == [1, 0, 1]
    assert torch.equal(shared.at(1, 1), states.layers[1][1])


class Passes:
    """Within a `with` block, counts rows that enter each decoder layer in passes of more than one token."""

    def __init__(self, model):
        self.layers = model.adapter.decoder_layers(model.lmm)
        self.seen = [[] for _ in self.layers]

    def __enter__(self):
        def watch(number):
            return lambda _module, args: self.seen[number].append(len(args[0])) if args[0].shape[1] > 1 else None

        self.handles = [
            layer.register_forward_pre_hook(watch(number), prepend=True) for number, layer in enumerate(self.layers)
        ]
        return self.seen

    def __exit__(self, *_error):
        for handle in self.handles:
            handle.remove()


def ask(model, inputs, **settings):
    """A seeded call of `segment` in which every row writes its answer."""
    start = inputs["input_ids"].shape[1]
    rows = settings.get("max_rows", len(ANSWERS))
    answers = [ANSWERS[first : first + rows] for first in range(0, len(ANSWERS), rows)]
    torch.manual_seed(3)

    class WriteInTurn(Write):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == self.start:
                self.answers = answers.pop(0)
            return super().__call__(input_ids, scores)

    writing = {"logits_processor": LogitsProcessorList([WriteInTurn([], start)]), "max_new_tokens": len(ANSWERS[0])}
    return model.segment(**inputs, **writing, **settings)


@pytest.mark.parametrize("num_ids", [1, 3])
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("selection", ["argmax", "mc", "sample"])
@pytest.mark.parametrize("max_rows", [4, 2, 1])
def test_states_that_are_read_again_are_those_that_were_there(selection, images, num_ids, max_rows):
    model, inputs = tiny_model(num_segment_tokens=num_ids), tiny_inputs(PROMPTS, IMAGES[images])
    settings = {"layer_selection": selection, "max_rows": max_rows}
    expected = ask(model, inputs, **settings, max_kept_prefixes=4)
    found = ask(model, inputs, **settings, max_kept_prefixes=0)
    assert len(found.segment_row) == {1: 12, 3: 3}[num_ids]
    for name in ("sequences", "segment_row", "layer_index"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("similarity", "similarity_map", "mask_logits", "iou_scores", "uncertainty", "agreement"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **TOLERANCE)


@pytest.mark.parametrize("images", IMAGES)
def test_only_rows_that_wrote_a_segment_are_read_again_and_only_as_deep_as_was_picked(images):
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES[images])
    with torch.no_grad():
        # None beyond layer 2.
        model.layer_policy.gates.zero_()
        model.layer_policy.gates[1, 0], model.layer_policy.gates[2, 0] = 1e4, -1e4
    processor = Write(ANSWERS, inputs["input_ids"].shape[1])
    writing = {"logits_processor": LogitsProcessorList([processor]), "max_new_tokens": len(ANSWERS[0])}
    answers = write(model, inputs, max_kept_prefixes=0, **writing)
    assert answers.segments.image_states.nbytes == 0
    answers.segments = answers.segments.select((answers.segments.row != 3).nonzero().squeeze(-1))
    with Passes(model) as seen:
        layers = model.read_masks(answers, "argmax").layer_index.tolist()
    assert set(layers) <= {0, 1, 2} and max(layers) > 0
    places = set(zip(answers.segments.token_row.tolist(), layers, strict=True))
    # Of rows 0 and 2, which share an image or do not; an image is read once.
    rows = {"shared": 1, "unshared": 2}[images]
    assert [len(passes) for passes in seen] == [1] * max(layers) + [0] * (4 - max(layers))
    assert seen[0] == [rows] and {row for row, _ in places} == set(answers.segments.token_row.tolist())
    picked = answers.segments.image_states.picked(answers.segments.token_row, torch.tensor(layers))
    assert picked.nbytes == len(places) * TOKENS * WIDTH * 4


def test_nothing_is_read_again_where_nothing_was_written():
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, IMAGES["unshared"])
    answers = write(model, inputs, max_new_tokens=3, suppress_tokens=[S], max_kept_prefixes=0)
    with Passes(model) as seen:
        output = model.read_masks(answers, "argmax")
    assert seen == [[], [], [], []] and output.mask_logits.shape == (0, 16, 16)
    assert output.similarity.shape == (0, 4, 4)


@pytest.mark.parametrize(
    "rows, max_rows, passes", [(16, 64, [16]), (17, 64, [17, 17]), (20, 10, [10, 10]), (34, 17, [17] * 4)]
)
def test_the_number_of_prefixes_says_whether_all_layers_are_kept(rows, max_rows, passes):
    """Sixteen at a time are kept; seventeen are read twice, as far as they wrote segments."""
    model, inputs = tiny_model(), tiny_inputs([[5 + row] for row in range(rows)])
    with Passes(model) as seen:
        output = model.segment(**inputs, max_rows=max_rows, max_new_tokens=1, suppress_tokens=say_only(S))
    assert len(output.segment_row) == rows and seen[0] == passes
    with Passes(model) as seen:
        model.segment(
            **inputs, max_rows=max_rows, max_new_tokens=1, suppress_tokens=say_only(S), layer_selection="last"
        )
    assert sum(seen[0]) == rows, "a layer that is known is kept"


def test_a_session_keeps_all_layers_of_its_prefix():
    """Its one prefix is read when it is opened, and for no query again."""
    model, inputs = tiny_model(), tiny_inputs(PROMPTS, [0, 0, 0, 0])
    images = model.get_image_embeddings(**inputs)
    text = (inputs["input_ids"], inputs["attention_mask"], inputs["image_index"])
    prefix = model.read_prefix(*text, images)
    with Passes(model) as seen:
        found = ask(model, {**inputs, "image_embeddings": images}, prefix=prefix, max_kept_prefixes=0)
    assert sum(map(len, seen)) == len(seen) and len(found.segment_row) == 12
    assert prefix.image_states.nbytes == LAYERS * TOKENS * WIDTH * 4


def test_fewer_than_no_prefixes_are_refused():
    with pytest.raises(ValueError, match="max_kept_prefixes must be at least 0, got -1"):
        tiny_model().segment(**tiny_inputs([[5]]), max_kept_prefixes=-1)
