"""What every family of LMMs must do: as a plain call of the LMM, alone as in a batch, written as teacher-forced."""

import numpy as np
import pytest
import torch
from test_shared_prefix import Write
from tiny import SEGMENT_TOKEN as S
from tiny_families import FAMILIES, GRIDS, family_config, family_inputs, family_model
from tiny_processor import qwen_processor
from tiny_training import example, losses_of, tiny_trainer
from transformers import LogitsProcessorList

from uground.modeling_uground.layer_states import PrefixStates
from uground.training.adapters import lora_config, with_adapter
from uground.training.collator import pack_rows

ROWS = [[5, 6, S, 7], [8, S, 9, 10, S, 11], [12, 13, 14, S], [5, S, 6]]
IMAGES = [0, 1, 2, 1]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return family_model(family)


@pytest.fixture(scope="module")
def inputs(family):
    return family_inputs(family, ROWS, IMAGES)


def alone(inputs, row):
    """One row without padding, with its image only."""
    image, start = int(inputs["image_index"][row]), int((inputs["attention_mask"][row] == 0).sum())
    grids = inputs["image_grid_thw"]
    ends = grids.prod(-1).cumsum(0)
    found = {name: value[image, None] for name, value in inputs.items() if name.endswith(("sizes", "thw"))}
    pixels = inputs["pixel_values"][ends[image] - grids[image].prod() : ends[image]]
    return found | {
        "input_ids": inputs["input_ids"][row, None, start:],
        "pixel_values": pixels,
        "sam_pixel_values": inputs["sam_pixel_values"][image, None],
    }


@torch.no_grad()
def test_logits_and_states_are_those_of_a_plain_call(family, model, inputs):
    outputs = model(**inputs, output_hidden_states=True)
    for row in range(len(ROWS)):
        single = alone(inputs, row)
        ids = single["input_ids"]
        plain = model.lmm(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=single["pixel_values"],
            image_grid_thw=single["image_grid_thw"],
            output_hidden_states=True,
            **FAMILIES[family].plain(ids),
        )
        length = ids.shape[1]
        torch.testing.assert_close(outputs.logits[row, -length:], plain.logits[0], **CLOSE)
        for mine, theirs in zip(outputs.hidden_states, plain.hidden_states, strict=True):
            torch.testing.assert_close(mine[row, -length:], theirs[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["argmax", "last", 2])
def test_a_batch_is_its_rows(model, inputs, selection):
    together = model(**inputs, layer_selection=selection)
    assert together.similarity.shape[1:] == (4, 3)
    for row in range(len(ROWS)):
        single = model(**alone(inputs, row), layer_selection=selection)
        mine = together.segment_row == row
        height, width = GRIDS[IMAGES[row]]
        torch.testing.assert_close(together.similarity_map[mine, :height, :width], single.similarity_map, **CLOSE)
        torch.testing.assert_close(together.mask_logits[mine], single.mask_logits, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_written_answers_share_prefixes_and_equal_what_is_teacher_forced(model, inputs):
    queries = family_rows(inputs, [[5, 6], [8, 9, 10], [12], [7]])
    answers = [[20, S, 21, 2], [S, 22, S, 2], [23, 24, S, 2], [S, 25, 26, 2]]
    settings = {"logits_processor": LogitsProcessorList([Write(answers)]), "max_new_tokens": 4}
    calls = []
    handle = model.lmm.model.language_model.norm.register_forward_pre_hook(
        lambda _, args: calls.append(tuple(args[0].shape[:2]))
    )
    written = model.segment(**queries, **settings, layer_selection="argmax")
    handle.remove()
    # Three prefixes for four rows, the longest of nine image tokens and two in front of them.
    assert calls[0] == (3, 11) and calls[1][0] == 4
    mask = torch.cat([queries["attention_mask"], torch.ones(4, 4, dtype=torch.long)], 1)
    forced = model(**{**queries, "input_ids": written.sequences, "attention_mask": mask}, layer_selection="argmax")
    assert torch.equal(forced.segment_row, written.segment_row) and torch.equal(
        forced.layer_index, written.layer_index
    )
    torch.testing.assert_close(written.similarity_map, forced.similarity_map, **CLOSE)
    torch.testing.assert_close(written.mask_logits, forced.mask_logits, atol=1e-4, rtol=1e-3)


def family_rows(inputs, rows):
    """The same images with other rows."""
    image_tokens = [[1, 35] + [39] * (GRIDS[image][0] * GRIDS[image][1]) + [34] for image in IMAGES]
    full = [begun + row for begun, row in zip(image_tokens, rows, strict=True)]
    length = max(map(len, full))
    return inputs | {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in full]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in full]),
    }


@torch.no_grad()
def test_packed_rows_are_their_rows(model, inputs):
    batch = family_rows(inputs, ROWS)
    # Rows of one image lie together.
    order = torch.tensor([0, 1, 3, 2])
    batch |= {name: batch[name][order] for name in ("input_ids", "attention_mask", "image_index")}
    plain = model(**batch, layer_selection="last")
    packed = pack_rows({**batch, "labels": batch["input_ids"]}, 39, 0)
    together = model(**packed, layer_selection="last")
    torch.testing.assert_close(together.similarity_map, plain.similarity_map, **CLOSE)
    torch.testing.assert_close(together.mask_logits, plain.mask_logits, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_states_taken_by_hooks_are_those_of_the_layers(model, inputs):
    rows = model.prepare_rows(
        inputs["input_ids"], inputs["attention_mask"], inputs["image_index"], model.get_image_embeddings(**inputs)
    )
    adapter, lmm = model.adapter, model.lmm
    with PrefixStates(adapter.decoder_layers(lmm), adapter.final_norm(lmm), rows.image_columns) as kept:
        states = lmm(**rows.lmm_inputs(), output_hidden_states=True).hidden_states
    image_states = kept.image_states(len(states))
    for layer, state in enumerate(states):
        for row, columns in enumerate(rows.image_columns):
            torch.testing.assert_close(image_states.at(layer, row), state[row, columns])


def test_a_step_changes_what_is_trained_and_nothing_else(family, inputs):
    model = family_model(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("lmm.model.language_model.layers", "layer_policy", "segment_proj")))
    model.lmm.activation_checkpointing_enable()
    model.train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    outputs = model(**inputs, labels=inputs["input_ids"], layer_selection="argmax")
    (outputs.loss + outputs.mask_logits.square().mean() + outputs.log_probs.mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) is not value.requires_grad, name


def test_the_vocabulary_grows_with_its_tied_head(family):
    model = family_model(family)
    model.resize_token_embeddings(50)
    assert model.vocab_size == 50
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("lacking", ["image_grid_thw"])
def test_what_the_encoder_needs_is_asked_for(model, inputs, lacking):
    with pytest.raises(ValueError, match=f"needs {lacking} beside pixel_values"):
        model(**{name: value for name, value in inputs.items() if name != lacking})


def test_a_model_is_saved_and_loaded(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.image_frame == "stretch" and loaded.config.token_grid_hw is None
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).mask_logits, model(**inputs).mask_logits)


def test_other_frames_are_refused(family):
    with pytest.raises(ValueError, match="image_frame of a .* must be one of"):
        family_config(family, image_frame="letterbox")


def test_the_trainer_trains_it_packed_and_with_an_adapter(family, tmp_path):
    model, processor = family_model(family), qwen_processor()
    # Two queries about each of two images, packed into one row each.
    items = [{"image": example(2 * n)["image"], "examples": [example(2 * n, 0), example(2 * n, 3)]} for n in range(2)]
    trainer = tiny_trainer(tmp_path, items, model.train(), {"processing_class": processor}, max_steps=1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    for name, value in model.named_parameters():
        assert torch.isfinite(value).all(), name
        assert value.requires_grad or torch.equal(value, before[name]), name
    assert np.isfinite(losses_of(trainer)).all()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("language_model.layers" in name for name in changed) and not any("visual" in name for name in changed)


def test_an_adapter_trains_new_rows_of_a_tied_vocabulary(family, inputs):
    model = family_model(family)
    adapted = with_adapter(model, lora_config(model, qwen_processor(), rank=2, alpha=4, dropout=0.0))
    outputs = adapted(**inputs, labels=inputs["input_ids"], layer_selection="last")
    (outputs.loss + outputs.mask_logits.square().mean()).backward()
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert any("lora_A" in name for name in trained) and any("trainable_tokens" in name for name in trained)
    assert not any("visual" in name for name in trained)


@torch.no_grad()
@pytest.mark.parametrize("lacking", ["prefix_is_causal", "cache_can_be_selected"])
def test_without_a_shared_prefix_the_same_is_written(model, inputs, monkeypatch, lacking):
    queries = family_rows(inputs, [[5, 6], [8, 9, 10], [12], [7]])
    answers = [[20, S, 21, 2], [S, 22, S, 2], [23, 24, S, 2], [S, 25, 26, 2]]

    def write():
        rule = {"logits_processor": LogitsProcessorList([Write(answers)]), "max_new_tokens": 4}
        return model.segment(**queries, **rule, layer_selection="last")

    shared = write()
    monkeypatch.setattr(type(model.adapter), lacking, False)
    single = write()
    assert torch.equal(shared.sequences, single.sequences)
    torch.testing.assert_close(shared.mask_logits, single.mask_logits, atol=1e-4, rtol=1e-3)


def test_a_family_without_masks_per_token_is_trained_row_by_row(family, tmp_path, monkeypatch):
    model = family_model(family)
    monkeypatch.setattr(type(model.adapter), "takes_4d_masks", False)
    items = [{"image": example(0)["image"], "examples": [example(0, 0), example(0, 3)]}]
    trainer = tiny_trainer(tmp_path, items, model.train(), {"processing_class": qwen_processor()}, max_steps=1)
    assert trainer.data_collator.pack_queries is False
    trainer.train()
    assert np.isfinite(losses_of(trainer)).all()
