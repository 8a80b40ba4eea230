"""
The processor's keywords, by what `ProcessorTesterMixin` in the source distribution of transformers asks of every one.

Of that mixin these do not apply:
- `auto_map` differs between a saved and a loaded processor, since the code travels along;
- keys of one query per image are not all of `model_input_names`, since `image_index` is left out;
- padding and lengths of a tokenizer's own config are not taken, since rows then depend on who saved it last;
- options of videos are refused, not passed over, since there are none;
- a row without an image is refused, as is a processor's call with images and no text.
"""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processor import TEMPLATE, gradient_image, tiny_processor
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import uground
from uground.processing import UGroundProcessor

IMAGE = gradient_image(20, 40)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def bundled():
    return AutoProcessor.from_pretrained(uground.tiny_checkpoint())


def test_rows_are_padded_where_and_how_far_the_call_says(processor):
    queries = ["the red cup", "a"]
    left, right = processor(IMAGE, queries), processor(IMAGE, queries, padding_side="right")
    length = left["input_ids"].shape[1]
    assert left["attention_mask"][1].tolist() == [0, 0] + [1] * (length - 2)
    assert right["attention_mask"][1].tolist() == [1] * (length - 2) + [0, 0]
    assert torch.equal(left["input_ids"][1, 2:], right["input_ids"][1, :-2])
    assert processor(IMAGE, queries, padding="max_length", max_length=40)["input_ids"].shape == (2, 40)
    assert (
        processor(IMAGE, queries, text_kwargs={"padding": "max_length", "max_length": 40})["input_ids"].shape[1] == 40
    )
    assert processor(IMAGE, queries, padding="longest", max_length=40)["input_ids"].shape[1] == length
    assert processor(IMAGE, queries, pad_to_multiple_of=16)["input_ids"].shape[1] == 32
    labels = processor(IMAGE, queries, ["it ."] * 2, padding_side="right", pad_to_multiple_of=16)["labels"]
    assert labels.shape[1] == 32 and (labels[:, -1] == -100).all()


def test_a_row_loses_its_end_only_where_the_call_says_so(processor):
    whole = processor(IMAGE, "the red cup", answers="it is .")
    cut = processor(IMAGE, "the red cup", answers="it is .", truncation=True, max_length=25)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, :25])
    assert (cut["labels"] != -100).sum() == 2
    with pytest.raises(ValueError, match="query 1 must keep its whole image when it is cut to 10 tokens"):
        processor(IMAGE, "a", truncation=True, max_length=10)
    with pytest.raises(ValueError, match="may have 20 tokens, got 21"):
        processor(IMAGE, "a", truncation=False, max_length=20)


def test_pixels_are_read_as_the_call_says(processor):
    plain = processor(IMAGE, "a")
    for given in (
        {"do_rescale": True, "rescale_factor": -1.0},
        {"images_kwargs": {"do_rescale": True, "rescale_factor": -1.0}},
    ):
        batch = processor(IMAGE, "a", **given)
        for name in ("pixel_values", "sam_pixel_values"):
            assert batch[name].mean() < plain[name].mean()
    raw = processor(IMAGE, "a", do_normalize=False, common_kwargs={"return_tensors": "np"})
    assert type(raw["pixel_values"]) is np.ndarray and raw["pixel_values"].max() > 100
    brighter = processor(IMAGE, "a", image_mean=[1, 2, 3], image_std=2)["pixel_values"]
    row = brighter[0, :, 0, 0] * 2 + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(row, torch.tensor(raw["pixel_values"])[0, :, 0, 0])
    assert processor(IMAGE, "a")["pixel_values"].equal(plain["pixel_values"])


def test_keywords_of_loading_take_effect_or_are_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = UGroundProcessor.from_pretrained(tmp_path, do_normalize=False, cls_token="(CLS)")
    assert not loaded.image_processor.do_normalize and not loaded.sam_image_processor.do_normalize
    assert loaded.tokenizer.cls_token == "(CLS)"
    assert loaded(IMAGE, "a")["sam_pixel_values"].max() > 100
    assert UGroundProcessor.from_pretrained(tmp_path, image_mean=1).image_processor.image_mean == (1.0,) * 3
    changed = processor.image_processor
    assert UGroundProcessor.from_pretrained(tmp_path, image_processor=changed).image_processor is changed
    for name, value in (
        ("size", {"longest_edge": 64}),
        ("pad_size", 64),
        ("do_resize", False),
        ("do_center_crop", True),
    ):
        with pytest.raises(
            ValueError, match=f"{name} may not be changed, as the models fix their frames; expected no"
        ):
            UGroundProcessor.from_pretrained(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="do_normalize must be one of True, False, got 'no'"):
        UGroundProcessor.from_pretrained(tmp_path, do_normalize="no")


def test_without_tensors_everything_is_a_list(processor):
    batch = processor([IMAGE] * 2, [["the red cup", "a"], "the"], [["it .", "a"], "a ."], return_tensors=None)
    assert {type(value) for value in batch.values()} == {list}
    assert {type(entry) for name in ("input_ids", "labels", "original_sizes") for entry in batch[name]} == {list}
    assert batch["image_index"] == [0, 0, 1] and batch["original_sizes"] == [[20, 40]] * 2
    assert [pixels.shape for pixels in batch["pixel_values"]] == [(3, 32, 32)] * 2
    rows = processor([IMAGE] * 2, ["the red cup", "a"], return_tensors=None, padding=False)
    assert [len(row) for row in rows["input_ids"]] == [23, 21] == [len(row) for row in rows["attention_mask"]]
    with pytest.raises(ValueError, match=r"need padding or return_tensors=None, got lengths \[21, 23\]"):
        processor([IMAGE] * 2, ["the red cup", "a"], padding=False)


def test_offsets_are_those_of_the_whole_prompt(processor):
    prompt = "USER : <image> the red cup ASSISTANT :"
    batch = processor(IMAGE, prompt, return_offsets_mapping=True, padding="max_length", max_length=30)
    spelt = [prompt[begin:end] for begin, end in batch["offset_mapping"][0].tolist()]
    assert spelt == [""] * 7 + ["USER", ":", *["<image>"] * 16, "the", "red", "cup", "ASSISTANT", ":"]


def test_text_without_an_image_is_read_as_it_is(processor):
    batch = processor(text=["it is [SEG] . </s>", "a"], padding_side="right", add_special_tokens=False)
    expected = processor.tokenizer("it is [SEG] . </s>")["input_ids"]
    assert batch["input_ids"][0].tolist() == expected and set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][1].tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="text 1 holds <image>, so it needs an image, got images=None"):
        processor(text="<image> a")
    with pytest.raises(ValueError, match="must be a string or a list of strings, got 3"):
        processor(text=3)
    with pytest.raises(ValueError, match="both images and text are needed, got no images"):
        processor(text="a", answers="b")
    with pytest.raises(ValueError, match="both images and text are needed"):
        processor()


@pytest.mark.parametrize("side", ["left", "right"])
def test_chat_templates_say_which_tokens_are_the_assistants(bundled, side):
    picture = Image.fromarray(IMAGE)
    talks = [
        [("the cup", "it is [SEG]."), ("[SEG] and ASSISTANT: x", "Two: [SEG] </s> x.")],
        [("a", "[REJ].")],
    ]
    messages = []
    for talk in talks:
        messages.append([])
        for query, answer in talk:
            messages[-1].append({"role": "user", "content": [{"type": "text", "text": query}]})
            messages[-1].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages[-1][0]["content"].insert(0, {"type": "image", "image": picture})
    inputs = bundled.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding_side": side},
    )
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    said = [
        bundled.tokenizer.decode(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert said == [" it is [SEG].</s>Two: [SEG] </s> x.</s>", "[REJ].</s>"]


def test_another_chat_template_is_taken_at_its_word(processor):
    template = "{% for m in messages %}<s>{{ m['role'] }}{% for c in m['content'] %}" + (
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    content = [{"type": "image", "image": Image.fromarray(IMAGE)}, {"type": "text", "text": "the cup [SEG]"}]
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}], template, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0]
    expected = processor.tokenizer("<s>user<image>the cup [SEG]", add_special_tokens=False)["input_ids"]
    place = expected.index(processor.image_token_id)
    assert ids.tolist() == expected[:place] + [processor.image_token_id] * 16 + expected[place + 1 :]
    with pytest.raises(ValueError, match="prompt 1 must hold <image> once, for its image, got it 0 times"):
        processor(IMAGE, "the cup", is_prompt=True)


def test_a_collator_of_trl_takes_the_processor(bundled):
    picture = Image.fromarray(IMAGE)
    talk = [{"role": "user", "content": "[SEG] the cup"}, {"role": "assistant", "content": "it is [SEG]."}]
    other = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "[REJ]."}]
    items = [{"images": [picture], "messages": messages} for messages in (talk, other)]
    batch = DataCollatorForVisionLanguageModeling(bundled, assistant_only_loss=True, max_length=300)(items)
    said = [bundled.tokenizer.decode(labels[labels != -100].tolist()) for labels in batch["labels"]]
    assert said == [" it is [SEG].</s>", "[REJ].</s>"]
    assert (batch["input_ids"] == bundled.segment_token_id).sum(1).tolist() == [1, 0]
    assert "image_index" not in batch and batch["pixel_values"].shape[0] == 2
    items = [{"image": picture, "prompt": m[:1], "completion": m[1:]} for m in (talk, other)]
    batch = DataCollatorForVisionLanguageModeling(bundled, completion_only_loss=True)(items)
    said = [bundled.tokenizer.decode(labels[labels != -100].tolist()).strip() for labels in batch["labels"]]
    assert said == ["it is [SEG].</s>", "[REJ].</s>"]


def test_system_messages_are_written_and_unknown_roles_refused(bundled):
    query = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    plain = tiny_processor(chat_template=None)
    for one, own in ((bundled, ""), (plain, plain.apply_chat_template([query]).partition("USER")[0])):
        alone = one.apply_chat_template([query], add_generation_prompt=True)
        assert alone == f"{own}USER: <image>\nx ASSISTANT:"
        led = one.apply_chat_template([system, query], add_generation_prompt=True)
        assert led == "Be brief. USER: <image>\nx ASSISTANT:"
        for messages in ([query, system], [{"role": "tool", "content": "x"}]):
            with pytest.raises(ValueError, match="the chat template knows the roles user, assistant and"):
                one.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bogus": 1}, TypeError, "does not know bogus; it takes add_special_tokens, max_length"),
        ({"text_kwargs": {"bogus": 1}}, TypeError, "does not know bogus in text_kwargs"),
        ({"images_kwargs": {"padding": True}}, TypeError, "does not know padding in images_kwargs"),
        ({"images_kwargs": [1]}, TypeError, "images_kwargs must be a dictionary, got list"),
        ({"videos_kwargs": {"fps": 1}}, TypeError, "does not know fps in videos_kwargs"),
        ({"videos": [1]}, ValueError, "takes images and text only, got videos or audio"),
        ({"size": {"longest_edge": 8}}, ValueError, "size may not be changed, as the models fix their frames"),
        ({"images_kwargs": {"do_pad": False}}, ValueError, "do_pad may not be changed"),
        ({"padding": "yes"}, ValueError, "padding must be one of True, 'longest', .*, got 'yes'"),
        ({"padding": 1}, ValueError, "padding must be one of True, .*, got 1"),
        ({"padding_side": "top"}, ValueError, "padding_side must be one of 'left', 'right', got 'top'"),
        ({"truncation": "yes"}, ValueError, "truncation must be one of True, .*, got 'yes'"),
        ({"return_tensors": "tf"}, ValueError, "return_tensors must be one of 'pt', 'np', None, got 'tf'"),
        ({"max_length": 0}, ValueError, "max_length must be a whole number of at least 1, got 0"),
        ({"max_length": 2.5}, ValueError, "max_length must be a whole number of at least 1, got 2.5"),
        (
            {"pad_to_multiple_of": True},
            ValueError,
            "pad_to_multiple_of must be a whole number of at least 1, got True",
        ),
        ({"do_normalize": 1}, ValueError, "do_normalize must be one of True, False, got 1"),
        ({"image_mean": [1]}, ValueError, "image_mean must be one number or one per channel, 3, got 1"),
        ({"image_mean": [1, 2]}, ValueError, "image_mean must be one number or one per channel, 3, got 2"),
        ({"image_std": [1, 0, 1]}, ValueError, "image_std must not be 0"),
        ({"rescale_factor": "x"}, ValueError, "rescale_factor must be a number, got 'x'"),
        ({"padding": True, "text_kwargs": {"padding": True}}, ValueError, "padding must be given once, got it twice"),
        ({"do_rescale": True, "images_kwargs": {"do_rescale": True}}, ValueError, "do_rescale must be given once"),
    ],
)
def test_keywords_that_make_no_sense_are_refused(processor, given, error, message):
    with pytest.raises(error, match=message):
        processor(IMAGE, "a", **given)


def test_a_processor_is_copied_and_loaded_whole(processor, tmp_path):
    processor(IMAGE, "[SEG] a")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == TEMPLATE
    for name, value in processor(IMAGE, "[SEG] a").items():
        assert torch.equal(loaded(IMAGE, "[SEG] a")[name], value)
    assert loaded.batch_decode([[4, 5, 8]]) == loaded.tokenizer.batch_decode([[4, 5, 8]]) == ["a the cup"]


@pytest.mark.parametrize("load", [UGroundProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_keywords_of_loading_that_nothing_reads_are_named(load, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("uground"), "propagate", True)
    folder = uground.tiny_checkpoint()
    load(folder, padding_side="left", do_normalize=False, local_files_only=True, use_fast=True, patch_size=8)
    assert "does not know" not in caplog.text
    load(folder, patch_sise=8, bogus=1, revision="main")
    assert "does not know bogus, patch_sise, which" in caplog.text
