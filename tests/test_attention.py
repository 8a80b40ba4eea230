"""How attention is computed in each part: flash attention in the language model alone, all else by masks."""

import pytest
import torch
from tiny import SEGMENT_TOKEN, tiny_config, tiny_inputs, tiny_model
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

FLASH = "flash_attention_2"
ROWS = [[5, 6, SEGMENT_TOKEN, 9], [7, 8, 9, SEGMENT_TOKEN, 11, SEGMENT_TOKEN], [4, 12]]


def parts(model) -> dict[str, str]:
    """Which attention each part was built with."""
    config = model.config
    found = {
        "language model": config.lmm_config.text_config,
        "vision tower": config.lmm_config.vision_config,
        "SAM": config.sam_config,
        "SAM's encoder": config.sam_config.vision_config,
        "SAM's decoder": config.sam_config.mask_decoder_config,
    }
    return {name: part._attn_implementation for name, part in found.items()}


@pytest.fixture
def flash(monkeypatch):
    """
    A stand-in for flash attention, which is not installed: packs what the mask of two dimensions leaves, and gives
    zeros elsewhere. Names of the modules that asked for it.
    """
    asked = []

    def stand_in(module, query, key, value, attention_mask=None, **settings):
        asked.append(type(module).__name__)
        rows = []
        for row in range(len(query)):
            kept = torch.ones(key.shape[2], dtype=torch.bool)
            if attention_mask is not None:
                assert attention_mask.dim() == 2
                kept = attention_mask[row].bool()
            wanted = kept[-query.shape[2] :]
            tensors = (query[row][:, wanted], key[row][:, kept], value[row][:, kept])
            causal = torch.ones(int(wanted.sum()), int(kept.sum()), dtype=torch.bool)
            causal = causal.tril(int(kept.sum()) - int(wanted.sum()))
            tensors = [tensor[None] for tensor in tensors]
            found, _ = sdpa_attention_forward(module, *tensors, causal[None, None], **settings)
            row_output = found.new_zeros(query.shape[2], *found.shape[2:])
            row_output[wanted] = found[0]
            rows.append(row_output)
        return torch.stack(rows), None

    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *_, **__: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_, **__: None)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLASH, stand_in)
    return asked


FOR_THE_LANGUAGE_MODEL = {
    "one name": FLASH,
    "of the LMM": {"lmm_config": FLASH},
    "of its language model": {"lmm_config": {"text_config": FLASH}},
    "beside another": {"lmm_config": {"text_config": FLASH}, "sam_config": "sdpa"},
}


@pytest.mark.parametrize("requested", FOR_THE_LANGUAGE_MODEL.values(), ids=FOR_THE_LANGUAGE_MODEL)
def test_flash_attention_is_that_of_the_language_model(flash, requested, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    expected = dict.fromkeys(parts(model), "sdpa") | {"language model": FLASH}
    loaded = UGroundForReferringSegmentation.from_pretrained(tmp_path, attn_implementation=requested)
    built = UGroundForReferringSegmentation(tiny_config(attn_implementation=requested))
    model.set_attn_implementation(requested)
    assert parts(loaded) == parts(built) == parts(model) == expected
    model.set_attn_implementation("sdpa")
    assert set(parts(model).values()) == {"sdpa"}


@torch.no_grad()
def test_flash_attention_gives_what_masks_give(flash):
    """Padding of a row and of a wide or tall image included; only states of padded image tokens are others."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    plain, written = model(**inputs), model.segment(**inputs, max_new_tokens=6)
    assert not flash
    model.set_attn_implementation(FLASH)
    found = model(**inputs)
    assert set(flash) == {"LlamaAttention"}
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    torch.testing.assert_close(found.logits[words], plain.logits[words], atol=1e-5, rtol=1e-4)
    assert plain.segment_row.tolist() == [0, 1, 1]
    for name in ("similarity", "mask_logits", "iou_scores"):
        torch.testing.assert_close(found[name][0], plain[name][0], atol=1e-5, rtol=1e-4)
    # The second image is wide: its lower half is padding.
    seen = (plain.similarity[1:] - found.similarity[1:]).abs()
    assert seen[:, :2].max() < 1e-4 and seen[:, 2:].max() > 1e-4
    assert torch.equal(model.segment(**inputs, max_new_tokens=6).sequences, written.sequences)


def test_packed_rows_need_masks(flash):
    model, inputs = tiny_model(), tiny_inputs([[5, SEGMENT_TOKEN]])
    length = inputs["input_ids"].shape[1]
    packed = {
        "attention_mask": torch.ones(1, length, length, dtype=torch.bool).tril(),
        "position_ids": torch.arange(length)[None],
    }
    model(**{**inputs, **packed})
    model.set_attn_implementation(FLASH)
    with pytest.raises(ValueError, match=f"need attention that takes masks, got '{FLASH}'"):
        model(**{**inputs, **packed})


REFUSED = {
    "SAM": ({"sam_config": FLASH}, "only text_config of lmm_config can use flash attention, got .* for sam_config$"),
    "SAM's encoder": (
        {"sam_config": {"vision_config": "flash_attention_3"}},
        "got 'flash_attention_3' for sam_config$",
    ),
    "a kernel": (
        {"sam_config": "kernels-community/flash-attn2"},
        "got 'kernels-community/flash-attn2' for sam_config$",
    ),
    "the vision tower": ({"lmm_config": {"vision_config": FLASH}}, f"got '{FLASH}' for vision_config$"),
    "the whole only": ({"": FLASH}, f"got '{FLASH}' for the model without its parts$"),
    "the LMM only": ({"lmm_config": {"": FLASH}}, f"got '{FLASH}' for lmm_config without its parts$"),
    "no part": ({"lmm": "eager"}, "attn_implementation is for lmm_config and sam_config, got one for lmm$"),
    "no part of the LMM": ({"lmm_config": {"text": "eager"}}, "for text_config and vision_config, got one for text$"),
}


@pytest.mark.parametrize("requested, sentence", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused(requested, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_config(attn_implementation=requested)
    with pytest.raises(ValueError, match=sentence):
        tiny_model().set_attn_implementation(requested)


def test_parts_may_be_told_one_by_one():
    model = UGroundForReferringSegmentation(
        tiny_config(attn_implementation={"lmm_config": {"text_config": "eager"}, "sam_config": "eager"})
    )
    assert {name for name, attention in parts(model).items() if attention == "eager"} == {
        "language model",
        "SAM",
        "SAM's encoder",
        "SAM's decoder",
    }
    assert parts(model)["vision tower"] == "sdpa"
    assert UGroundConfig.from_dict(model.config.to_dict())._attn_implementation is None
