"""What calls take: one length of an answer wherever it is asked for, and keywords that nobody knows refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_generation import Write
from tiny import END_TOKEN, SEGMENT_TOKEN, say_only, tiny_config, tiny_inputs, tiny_model
from tiny_processor import gradient_image, tiny_processor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

import uground
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.modeling_uground.call_arguments import MAX_NEW_TOKENS
from uground.modeling_uground.configuration_uground import refuse_misspelt
from uground.processing import ReferringSegmentationPipeline

RELEASE = Path(__file__).parent / "releases" / "0.1.0"


def endless(**settings):
    """A model that says one thing for ever."""
    model = tiny_model(**settings)
    model.generation_config.suppress_tokens = say_only(5)
    return model


def length(output) -> int:
    return output.sequences.shape[1] - output.prompt_length


def test_a_model_says_how_long_an_answer_may_become(tmp_path):
    assert tiny_model().generation_config.max_new_tokens == MAX_NEW_TOKENS
    for folder in (uground.tiny_checkpoint(), RELEASE):
        stored = json.loads((Path(folder) / "generation_config.json").read_text())
        loaded = UGroundForReferringSegmentation.from_pretrained(folder)
        assert loaded.generation_config.max_new_tokens == stored.get("max_new_tokens", MAX_NEW_TOKENS)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == MAX_NEW_TOKENS
    (tmp_path / "generation_config.json").unlink()
    loaded = UGroundForReferringSegmentation.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == MAX_NEW_TOKENS


LENGTHS = {
    "nothing said": ({}, {}, MAX_NEW_TOKENS),
    "none": ({}, {"max_new_tokens": None}, MAX_NEW_TOKENS),
    "an empty config": ({}, {"generation_config": GenerationConfig()}, MAX_NEW_TOKENS),
    "the model": ({"max_new_tokens": 7}, {}, 7),
    "the call": ({"max_new_tokens": 7}, {"max_new_tokens": 3}, 3),
    "a config": ({"max_new_tokens": 7}, {"generation_config": GenerationConfig(max_new_tokens=4)}, 4),
    "length of all": ({}, {"max_length": 18 + 9}, 9),
    "length of all in a config": ({}, {"generation_config": GenerationConfig(max_length=18 + 2)}, 2),
    "length of all in the model": ({"max_new_tokens": None, "max_length": 18 + 6}, {}, 6),
    "call before model": ({"max_new_tokens": None, "max_length": 18 + 6}, {"max_new_tokens": 2}, 2),
    "longer than the default": ({}, {"max_new_tokens": MAX_NEW_TOKENS + 2}, MAX_NEW_TOKENS + 2),
}


@pytest.mark.parametrize("model_says, call_says, expected", LENGTHS.values(), ids=LENGTHS)
def test_answers_are_as_long_as_may_be(model_says, call_says, expected):
    model, inputs = endless(), tiny_inputs([[5]])
    model.generation_config.update(**model_says)
    assert length(model.segment(**inputs, **call_says)) == expected
    assert model.generate(**inputs, **call_says).shape[1] == 18 + expected


def test_segment_session_and_pipeline_write_equally_long_answers():
    model, processor, image = endless(), tiny_processor(), gradient_image(30, 50)
    written = model.segment(**processor(image, "a tree"))
    assert length(written) == MAX_NEW_TOKENS
    answer = processor.post_process_instance_segmentation(written)[0]["answer"]
    pipe = ReferringSegmentationPipeline(model=model, processor=processor, task="referring-segmentation")
    with model.image_session(image, processor) as session:
        assert session("a tree")["answer"] == pipe(image, "a tree")["answer"] == answer


class StopAfter(StoppingCriteria):
    """Ends row r once it holds `lengths[r]` tokens."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **_):
        return self.lengths <= input_ids.shape[1]


def write(answers, inputs):
    return {"logits_processor": LogitsProcessorList([Write(answers, inputs["input_ids"].shape[1])])}


def test_rows_say_whether_they_came_to_their_end():
    model, inputs = tiny_model(), tiny_inputs([[5, 6], [7], [8, 9]])
    answers = [[4, END_TOKEN, 0, 0], [4, SEGMENT_TOKEN, 4, 4], [4, 4, 4, END_TOKEN]]
    output = model.segment(**inputs, max_new_tokens=4, **write(answers, inputs))
    assert output.finished.dtype == torch.bool
    assert output.finished.tolist() == [True, False, True]
    # The end that would have come next does not count.
    assert model.segment(**inputs, max_new_tokens=3, **write(answers, inputs)).finished.tolist() == [
        True,
        False,
        False,
    ]
    assert model.segment(**inputs, max_length=23, **write(answers, inputs)).finished.tolist() == [True, False, True]
    apart = model.segment(**inputs, max_new_tokens=4, max_rows=1, **write(answers[:1], inputs))
    assert apart.finished.tolist() == [True] * 3
    images = model.get_image_embeddings(**inputs)
    text = (inputs["input_ids"], inputs["attention_mask"], inputs["image_index"])
    kept = model.write_answers(*text, images, max_new_tokens=4, **write(answers, inputs))
    assert kept.finished.tolist() == model.read_masks(kept).finished.tolist() == [True, False, True]


def test_several_tokens_may_end_an_answer():
    model, inputs = tiny_model(), tiny_inputs([[5], [7]])
    answers = write([[4, 9, 0], [4, 4, 4]], inputs)
    assert model.segment(**inputs, max_new_tokens=3, **answers).finished.tolist() == [False, False]
    ends = {"eos_token_id": [END_TOKEN, 9]}
    assert model.segment(**inputs, max_new_tokens=3, **ends, **answers).finished.tolist() == [True, False]


def test_answers_ended_by_a_rule_of_the_call_are_not_cut():
    model, inputs = tiny_model(), tiny_inputs([[5], [7]])
    rule, answers = {"stopping_criteria": StoppingCriteriaList([StopAfter([20, 21])])}, write([[4] * 9] * 2, inputs)
    assert model.segment(**inputs, max_new_tokens=9, **rule, **answers).finished.tolist() == [True, True]
    rule = {"stopping_criteria": StoppingCriteriaList([StopAfter([20, 99])])}
    assert model.segment(**inputs, max_new_tokens=9, **rule, **answers).finished.tolist() == [True, False]


def test_the_pipeline_warns_once_of_answers_that_were_cut(caplog):
    model, processor, image = endless(), tiny_processor(), gradient_image(30, 50)
    pipe = ReferringSegmentationPipeline(model=model, processor=processor, task="referring-segmentation")
    pipe(image, ["a tree", "a cup"], max_new_tokens=3)
    sentence = "2 of 2 answers were cut and may lack segments; pass a larger max_new_tokens"
    assert caplog.messages == [sentence]
    pipe([{"image": image, "text": "a tree"}] * 2, batch_size=1, max_new_tokens=3)
    assert caplog.messages == [sentence]
    other = ReferringSegmentationPipeline(model=model, processor=processor, task="referring-segmentation")
    model.generation_config.suppress_tokens = say_only(END_TOKEN)
    other(image, "a tree", max_new_tokens=3)
    assert caplog.messages == [sentence]


UNKNOWN = {
    "no such thing": ({"bogus": 1}, "bogus; it takes"),
    "a slip": ({"max_new_token": 3}, "max_new_token .nearest is max_new_tokens.; it takes"),
    "an argument of another call": ({"labels": 1}, "labels; it takes"),
    "of the vision tower": ({"vision_feature_layer": -1}, "vision_feature_layer; it takes"),
    "a method of a config": ({"validate": 1}, "validate; it takes"),
    "several": ({"b": 1, "a": 2}, "a, b; it takes"),
    "made by the model": ({"position_ids": 1}, "position_ids; it takes"),
}


@pytest.mark.parametrize("call", ["segment", "generate", "write_answers"])
@pytest.mark.parametrize("keywords, sentence", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_keywords_of_generation_are_refused(call, keywords, sentence):
    model, inputs = tiny_model(), tiny_inputs([[5]])
    model.lmm.register_forward_pre_hook(lambda *_: pytest.fail("the LMM was asked"))
    model.mask_decoder.sam.vision_encoder.register_forward_pre_hook(lambda *_: pytest.fail("SAM was asked"))
    if call == "write_answers":
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_index")}
        inputs["image_embeddings"] = None
    with pytest.raises(TypeError, match=f"^{call} does not know {sentence} input_ids, .* and settings of generation$"):
        getattr(model, call)(**inputs, **keywords)
    with pytest.raises(ValueError):
        getattr(model, call)(**inputs, **keywords)


def test_what_generation_knows_is_taken():
    model, inputs = tiny_model(), tiny_inputs([[5]])
    settings = {
        "min_new_tokens": 1,
        "repetition_penalty": 1.1,
        "synced_gpus": False,
        "streamer": None,
        "tokenizer": None,
    }
    assert length(model.segment(**inputs, max_new_tokens=2, **settings)) <= 2


@pytest.mark.parametrize(
    "keywords", [{"bogus": 1}, {"pixel_value": 1}, {"vision_feature_layer": 3}, {"max_new_tokens": 2}]
)
def test_unknown_keywords_of_a_forward_are_refused(keywords):
    model, inputs = tiny_model(), tiny_inputs([[5, SEGMENT_TOKEN]])
    (name,) = keywords
    with pytest.raises(TypeError, match=f"^forward does not know {name}.*; it takes input_ids, .*num_items_in_batch$"):
        model(**inputs, **keywords)


def test_unknown_keywords_of_sessions_and_of_encoding_are_refused():
    model, inputs = tiny_model(), tiny_inputs([[5]])
    with pytest.raises(TypeError, match="get_image_embeddings does not know sam_pixels; it takes pixel_values, "):
        model.get_image_embeddings(**inputs, sam_pixels=inputs["sam_pixel_values"])
    with pytest.raises(TypeError, match="nearest is sam_pixel_values"):
        model.get_image_embeddings(**inputs, sam_pixel_value=inputs["sam_pixel_values"])
    session = model.image_session(gradient_image(30, 50), tiny_processor())
    with session, pytest.raises(TypeError, match="segment does not know bogus; it takes"):
        session("a tree", bogus=1)
    with pytest.raises(TypeError, match="bogus"):
        model.image_session(gradient_image(30, 50), tiny_processor(), bogus=1)


MISSPELT = {
    "num_layer_sample": "num_layer_samples",
    "numLayerSamples": "num_layer_samples",
    "layer-selection": "layer_selection",
    "selection_layer": "layer_selection",
    "seg_token_id": "segment_token_id",
    "seg_token_idx": "segment_token_id",
    "Prompts": "prompts",
    "prompt": "prompts",
    "similarity_scale": "similarity_scaling",
    "point_threshold": "point_thresholds",
    "image_frames": "image_frame",
    "num_point": "num_points",
    "layer_policies": "layer_policy",
    "lmm": "lmm_config",
    "sam": "sam_config",
    "initialiser_range": "initializer_range",
}


@pytest.mark.parametrize("key, meant", MISSPELT.items())
def test_config_keys_that_resemble_ours_are_refused(key, meant, tmp_path):
    sentence = f"unknown config key {re.escape(key)}, expected {meant}"
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**{key: 4})
    tiny_config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, key: 4}))
    with pytest.raises(ValueError, match=sentence):
        UGroundConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        UGroundConfig.from_pretrained(tmp_path, **{key: 4})


@pytest.mark.parametrize("key", ["num_layers", "image_token_id", "token_grid_hw", "frame_size"])
def test_what_a_config_computes_is_not_set(key):
    with pytest.raises(ValueError, match=f"config key {key} is computed from lmm_config and sam_config"):
        tiny_config(**{key: 4})


def test_keys_of_transformers_and_of_strangers_pass():
    theirs = {*vars(PreTrainedConfig()), *vars(GenerationConfig()), "torch_dtype", "auto_map", "quantization_config"}
    others = {
        "hidden_size": 4,
        "text_config": {},
        "vision_config": {},
        "transformers.js_config": {},
        "unsloth_version": "1",
    }
    config = tiny_config(**others, use_cache=False, num_labels=3, max_length=20)
    assert config.hidden_size == 4
    refuse_misspelt(theirs - set(UGroundConfig.__annotations__))


WRONG_IDS = {
    "high": ({"segment_token_id": 1000000}, "segment_token_id must lie in the vocabulary of 40 tokens, got 1000000"),
    "just high": ({"segment_token_id": 40}, "segment_token_id must lie in the vocabulary of 40 tokens, got 40"),
    "negative": ({"segment_token_id": -1}, "segment_token_id must lie in the vocabulary of 40 tokens, got -1"),
    "no number": (
        {"segment_token_id": True},
        "segment_token_id must (lie in the vocabulary|be of type int).*, got True",
    ),
    "reject": ({"reject_token_id": 99}, "reject_token_id must lie in the vocabulary of 40 tokens, got 99"),
    "both": ({"reject_token_id": 38}, "segment_token_id and reject_token_id must differ, got 38 for both"),
    "image": ({"segment_token_id": 39}, "segment_token_id and image_token_id must differ, got 39 for both"),
    "reject and image": ({"reject_token_id": 39}, "reject_token_id and image_token_id must differ, got 39 for both"),
}


@pytest.mark.parametrize("ids, sentence", WRONG_IDS.values(), ids=WRONG_IDS)
def test_ids_that_cannot_be_are_refused(ids, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**ids)
    config = tiny_config()
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **ids}))
    with pytest.raises(ValueError, match=sentence):
        UGroundForReferringSegmentation.from_pretrained(tmp_path)
    for name, value in ids.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        UGroundForReferringSegmentation(config)


def test_the_placeholder_of_images_must_be_a_token():
    config = tiny_config().to_dict()
    config["lmm_config"]["image_token_index"] = 77
    with pytest.raises(ValueError, match="image_token_id must lie in the vocabulary of 40 tokens, got 77"):
        UGroundConfig.from_dict(config)
