"""The pipeline: nesting, batching, arguments and refusals, on a tiny random model told what to write."""

import base64
import copy
import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor, tiny_tokenizer, write
from torch.utils.data import Dataset, IterableDataset
from transformers import pipeline

from uground.processing import ReferringSegmentationPipeline

ANSWER = "the cup is [SEG] and a boat is [SEG] ."


@pytest.fixture(scope="module")
def pipe():
    return ReferringSegmentationPipeline(
        model=tiny_model(), processor=tiny_processor(), task="referring-segmentation", device=-1
    )


def ask(pipe, *inputs, answer=ANSWER, **kwargs):
    return pipe(*inputs, generate_kwargs=write(pipe.processor, answer), **kwargs)


def assert_same(one, other):
    """Same words and layers, same masks, scores to rounding."""
    assert one["answer"] == other["answer"] and len(one["segments"]) == len(other["segments"])
    for a, b in zip(one["segments"], other["segments"], strict=True):
        assert (a["label"], a["layer"], a["box"]) == (b["label"], b["layer"], b["box"])
        assert np.array_equal(np.asarray(a["mask"]), np.asarray(b["mask"]))
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_one_query_gives_plain_values(pipe):
    result = ask(pipe, gradient_image(30, 50), "the red cup")
    assert result["answer"] == "the cup is [SEG] and a boat is [SEG]."
    assert [segment["label"] for segment in result["segments"]] == ["the cup", "a boat"]
    for segment in result["segments"]:
        assert set(segment) == {"mask", "score", "label", "box", "layer"}
        assert segment["mask"].mode == "L" and segment["mask"].size == (50, 30)
        assert set(np.unique(np.asarray(segment["mask"]))) <= {0, 255}
        assert type(segment["score"]) is float and 0.0 <= segment["score"] <= 1.0
        assert type(segment["layer"]) is int and all(type(side) is int for side in segment["box"])
        assert segment["box"] == list(segment["mask"].getbbox())


def test_absent_object_gives_no_segments(pipe):
    assert ask(pipe, gradient_image(30, 50), "a tree", answer="[REJ]") == {"answer": "[REJ]", "segments": []}


def test_several_queries_encode_the_image_once(pipe, monkeypatch):
    encoded = []
    original = pipe.model.get_image_embeddings

    def counting(pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return original(pixel_values, *args, **kwargs)

    monkeypatch.setattr(pipe.model, "get_image_embeddings", counting)
    image = gradient_image(30, 50)
    results = ask(pipe, image, ["the red cup", "a tree and the blue boat"], answer="it is [SEG] .")
    assert encoded == [1]
    assert [result["segments"][0]["label"] for result in results] == ["the red cup", "a tree and the blue boat"]
    for query, result in zip(["the red cup", "a tree and the blue boat"], results, strict=True):
        assert_same(result, ask(pipe, image, query, answer="it is [SEG] ."))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_equal_one_by_one(pipe, batch_size, monkeypatch):
    items = [
        {"image": gradient_image(30, 50), "text": "the red cup"},
        {"image": gradient_image(64, 20), "text": ["a tree", "what can swim and is red"]},
        {"image": Image.fromarray(gradient_image(9, 9)), "text": ["the blue boat"]},
    ]
    calls = []
    original = pipe.model.segment
    monkeypatch.setattr(pipe.model, "segment", lambda **inputs: calls.append(1) or original(**inputs))
    together = ask(pipe, items, batch_size=batch_size)
    assert len(calls) == -(-len(items) // batch_size)
    assert isinstance(together[0], dict) and len(together[1]) == 2 and len(together[2]) == 1
    alone = [ask(pipe, item) for item in items]
    flat = [[results] if isinstance(results, dict) else results for results in (*together, *alone)]
    for one, other in zip(flat[:3], flat[3:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


def test_every_way_to_hand_in_images(pipe, tmp_path):
    image = gradient_image(30, 50)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = ask(pipe, image, "the red cup")
    assert_same(expected, ask(pipe, str(tmp_path / "image.png"), "the red cup"))
    assert_same(expected, ask(pipe, {"image": image, "text": "the red cup"}))
    assert_same(expected, ask(pipe, image=image, text="the red cup"))
    assert_same(expected, ask(pipe, images=[image, image], text=["the red cup", "a tree"])[0])
    assert_same(expected, ask(pipe, np.stack([image, image]), ["a tree", "the red cup"])[1])
    nested = ask(pipe, [image, image], [["the red cup", "a tree"], "a tree"])
    assert_same(expected, nested[0][0])
    assert_same(nested[0][1], nested[1])
    stream = ask(pipe, ({"image": image, "text": "the red cup"} for _ in range(3)), batch_size=2)
    assert not isinstance(stream, list)
    for result in stream:
        assert_same(expected, result)
    assert pipe([]) == []


class MapStyle(Dataset):
    """As `KeyDataset` of transformers: a length and items, and no `__iter__`."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


class Stream(IterableDataset):
    """A length and an order, and no items by number."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


def test_datasets_and_iterators_stream(pipe):
    texts = ["the red cup", ["a tree", "the blue boat"], "a tree"]
    items = [{"image": Image.fromarray(gradient_image(30, 50)), "text": text} for text in texts]
    expected = ask(pipe, items)
    rows = datasets.Dataset.from_list([item for item in items if isinstance(item["text"], str)])
    for given, results in (
        (rows, expected[::2]),
        (rows.to_iterable_dataset(), expected[::2]),
        (MapStyle(items), expected),
        (Stream(items), expected),
        (map(dict, items), expected),
        (iter(items), expected),
        (dict(enumerate(items)).values(), expected),
    ):
        stream = ask(pipe, given, batch_size=2)
        assert not isinstance(stream, list)
        stream = list(stream)
        assert len(stream) == len(results)
        for one, other in zip(stream, results, strict=True):
            pairs = [(one, other)] if isinstance(other, dict) else zip(one, other, strict=True)
            for a, b in pairs:
                assert_same(a, b)
    assert len(list(ask(pipe, map(dict, items), num_workers=2))) == len(items)


def test_call_arguments_reach_their_stage(pipe):
    image = gradient_image(30, 50)
    last = ask(pipe, image, "a tree", layer_selection="last", return_similarity=True)
    assert [segment["layer"] for segment in last["segments"]] == [4, 4]
    assert last["segments"][0]["similarity_map"].shape == (3, 4)
    assert last["segments"][0]["similarity_map"].dtype == np.float32
    assert [segment["layer"] for segment in ask(pipe, image, "a tree", layer_selection=2)["segments"]] == [2, 2]
    assert ask(pipe, image, "a tree", threshold=1.0)["segments"] == []
    everything = ask(pipe, image, "a tree", mask_threshold=-1e9)["segments"][0]["mask"]
    assert (np.asarray(everything) == 255).all()
    assert len(pipe(image, "a tree", max_new_tokens=2)["answer"].split()) <= 2
    assert len(ask(pipe, image, "a tree", layer_selection="mc", num_layer_samples=3)["segments"]) == 2


def test_arguments_of_the_constructor_are_defaults(pipe):
    strict = ReferringSegmentationPipeline(model=pipe.model, processor=pipe.processor, device=-1, threshold=1.0)
    assert ask(strict, gradient_image(30, 50), "a tree")["segments"] == []
    assert len(ask(strict, gradient_image(30, 50), "a tree", threshold=0.0)["segments"]) == 2


def test_unknown_arguments_are_refused(pipe):
    with pytest.raises(TypeError, match="does not know max_tokens, top; it takes max_new_tokens"):
        pipe(gradient_image(8, 8), "a tree", max_tokens=3, top=1)
    with pytest.raises(TypeError, match="does not know treshold"):
        ReferringSegmentationPipeline(model=pipe.model, processor=pipe.processor, device=-1, treshold=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 3}, "threshold must be a number within 0..1, got 3"),
        ({"threshold": -0.1}, "threshold must be a number within 0..1, got -0.1"),
        ({"threshold": float("nan")}, "threshold must be a number within 0..1, got nan"),
        ({"threshold": True}, "threshold must be a number within 0..1, got True"),
        ({"reject_threshold": "high"}, "reject_threshold must be a number within 0..1, got 'high'"),
        ({"reject_threshold": 1.5}, "reject_threshold must be a number within 0..1, got 1.5"),
        ({"mask_threshold": "0"}, "mask_threshold must be a number, got '0'"),
        ({"mask_threshold": float("inf")}, "mask_threshold must be a number, got inf"),
        ({"return_similarity": 1}, "return_similarity must be one of True, False, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number of at least 1, got 2.0"),
        ({"max_rows": -1}, "max_rows must be a whole number of at least 1, got -1"),
        ({"max_kept_prefixes": -1}, "max_kept_prefixes must be a whole number of at least 0, got -1"),
        ({"num_layer_samples": 1.5}, "num_layer_samples must be a whole number of at least 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": "2"}, "batch_size must be a whole number of at least 1, got '2'"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0, got -1"),
        ({"layer_selection": "best"}, "layer_selection must be one of"),
        ({"layer_selection": 99}, "layer_selection must lie in 0..4 for this model, got 99"),
        ({"layer_selection": 1.0}, "layer_selection must be one of .* or a layer number, got 1.0"),
        ({"generate_kwargs": ["x"]}, "generate_kwargs must be a dictionary, got list"),
    ],
)
def test_arguments_of_no_sense_are_refused_when_made_and_when_asked(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        ReferringSegmentationPipeline(model=pipe.model, processor=pipe.processor, device=-1, **given)
    with pytest.raises(ValueError, match=message):
        pipe([{"image": gradient_image(8, 8), "text": "a tree"}], **given)


def test_the_model_is_told_how_many_prefixes_to_keep(pipe, monkeypatch):
    told, segment = [], pipe.model.segment

    def spy(*args, **kwargs):
        told.append(kwargs.get("max_kept_prefixes"))
        return segment(*args, **kwargs)

    monkeypatch.setattr(pipe.model, "segment", spy)
    image = gradient_image(30, 50)
    assert_same(ask(pipe, image, "a tree", max_kept_prefixes=0), ask(pipe, image, "a tree"))
    assert told == [0, None]


def test_none_is_the_default(pipe):
    image, names = (
        gradient_image(30, 50),
        ("threshold", "mask_threshold", "reject_threshold", "batch_size", "max_rows"),
    )
    assert_same(ask(pipe, image, "a tree", **dict.fromkeys(names)), ask(pipe, image, "a tree"))


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("segment_token_id", 5, "for segment_token_id the config says 5, the tokenizer 38, and the vocabulary has 40"),
        ("reject_token_id", 6, "for reject_token_id the config says 6, the tokenizer 37, and the vocabulary"),
        ("segment_token_id", None, "for segment_token_id the config says None, the tokenizer 38"),
    ],
)
def test_a_processor_of_other_tokens_is_refused(pipe, name, said, message):
    model = tiny_model()
    model.config.__dict__[name] = said
    with pytest.raises(ValueError, match=message):
        ReferringSegmentationPipeline(model=model, processor=pipe.processor, device=-1)
    with pytest.raises(ValueError, match=message):
        model.image_session(gradient_image(8, 8), pipe.processor)


def test_tokens_beyond_the_vocabulary_are_refused(pipe):
    tokenizer = tiny_tokenizer(("[REJ]",))
    tokenizer.add_tokens([f"more{number}" for number in range(60)])
    tokenizer.add_tokens(["[SEG]"])
    model = tiny_model()
    model.config.__dict__["segment_token_id"] = tokenizer.convert_tokens_to_ids("[SEG]")
    with pytest.raises(ValueError, match="the config says 99, the tokenizer 99, and the vocabulary has 40"):
        ReferringSegmentationPipeline(model=model, processor=tiny_processor(tokenizer), device=-1)


def test_a_model_without_a_reject_token_takes_a_tokenizer_with_one(pipe):
    model = tiny_model()
    model.config.__dict__["reject_token_id"] = None
    ReferringSegmentationPipeline(model=model, processor=pipe.processor, device=-1)


def test_a_used_pipeline_is_pickled_and_copied(pipe):
    image = gradient_image(30, 50)
    expected = ask(pipe, image, ["the red cup", "[SEG] a tree"])
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe), pipe):
        for one, result in zip(ask(other, image, ["the red cup", "[SEG] a tree"]), expected, strict=True):
            assert_same(one, result)
    model = pickle.loads(pickle.dumps(pipe.model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pipe.model.state_dict().items())


def test_half_a_character_is_named_in_a_stream(pipe):
    items = [{"image": gradient_image(8, 8), "text": text} for text in ("a tree", "half \ud83d", "a tree")]
    stream = ask(pipe, iter(items))
    next(stream)
    with pytest.raises(ValueError, match=r"a query must hold whole characters, got the half '\\ud83d'"):
        next(stream)


def test_unusable_inputs_are_refused(pipe):
    image = gradient_image(8, 8)
    with pytest.raises(ValueError, match="text is needed with an image, got str alone"):
        pipe("image.png")
    with pytest.raises(ValueError, match="text is needed with an image, got Image alone"):
        pipe(Image.fromarray(image))
    with pytest.raises(ValueError, match="text is needed with an image, got ndarray alone"):
        pipe(image)
    with pytest.raises(ValueError, match="images must be given once.*got 2"):
        pipe(image, "a", image=image)
    with pytest.raises(ValueError, match="images must be given once.*got 0"):
        pipe(text="a")
    with pytest.raises(ValueError, match="an item must be .* got ndarray"):
        pipe([image])
    with pytest.raises(ValueError, match=r"an item must be .* got \['image', 'query', 'text'\]"):
        pipe({"image": image, "query": "a", "text": "a"})
    with pytest.raises(ValueError, match="of a stream of images one query can be asked, got list"):
        pipe(iter([image]), ["a", "b"])
    with pytest.raises(ValueError, match="expected 2, got 1"):
        pipe([image, image], ["a"])
    with pytest.raises(ValueError, match="must not be empty"):
        pipe(image, ["a", " "])
    with pytest.raises(ValueError, match="needs a processor"):
        ReferringSegmentationPipeline(model=pipe.model, device=-1)


@pytest.mark.parametrize("part", ["lmm", "mask_decoder"])
def test_nan_weights_are_an_error_and_no_empty_result(part):
    model = tiny_model()
    with torch.no_grad():
        next(getattr(model, part).parameters()).fill_(torch.nan)
    broken = ReferringSegmentationPipeline(model=model, processor=tiny_processor(), device=-1)
    with pytest.raises(ValueError, match="NaN"):
        ask(broken, gradient_image(8, 8), "a tree", answer="[SEG]")


def test_saved_pipeline_loads_as_a_task(pipe, tmp_path):
    image = gradient_image(30, 50)
    expected = ask(pipe, image, "the red cup")
    pipe.save_pretrained(tmp_path)
    for options in ({}, {"processor": pipe.processor}):
        loaded = pipeline("referring-segmentation", model=str(tmp_path), trust_remote_code=True, device=-1, **options)
        assert_same(expected, ask(loaded, image, "the red cup"))


def messages(image, *said, **part):
    """A conversation about an image, of texts by turns."""
    content = [{"type": "image", **({"image": image} if image is not None else part)}]
    turns = [
        {"role": "assistant" if turn % 2 else "user", "content": [{"type": "text", "text": text}]}
        for turn, text in enumerate(said)
    ]
    return [{"role": "user", "content": content + turns[0]["content"]}, *turns[1:]]


def test_one_query_of_many_images(pipe, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.fromarray(gradient_image(30 + number, 50)).save(file)
    expected = [ask(pipe, file, "the red cup") for file in files]
    rows = [{"image": file, "query": "the red cup"} for file in files]
    several = ask(pipe, [{"image": files[0], "query": ["the red cup", "a tree"]}])[0]
    assert len(several) == 2
    for found in (
        ask(pipe, files, "the red cup", batch_size=2),
        ask(pipe, rows, batch_size=2),
        list(ask(pipe, iter(files), "the red cup", batch_size=2)),
        list(ask(pipe, MapStyle(files), "the red cup")),
        list(ask(pipe, Stream(files), "the red cup")),
        ask(pipe, [np.asarray(Image.open(file)) for file in files], "the red cup"),
    ):
        assert len(found) == 3
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    assert pipe([], "the red cup") == []


def test_conversations_are_answered(pipe, tmp_path):
    image = Image.fromarray(gradient_image(30, 50))
    image.save(tmp_path / "image.png")
    path, uri = str(tmp_path / "image.png"), "data:image/png;base64,"
    encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    expected = ask(pipe, image, "the red cup")
    for found in (
        ask(pipe, messages(image, "the red cup")),
        pipe(text=messages(image, "the red cup"), generate_kwargs=write(pipe.processor, ANSWER)),
        ask(pipe, {"messages": messages(image, "the red cup")}),
        ask(pipe, [messages(image, "the red cup"), messages(image, "a tree")], batch_size=2)[0],
        next(ask(pipe, iter([messages(image, "the red cup")]))),
        ask(pipe, messages(None, "the red cup", path=path)),
        ask(pipe, messages(None, "the red cup", url=path)),
        ask(pipe, messages(None, "the red cup", base64=encoded)),
        ask(pipe, messages(uri + encoded, "the red cup")),
        ask(pipe, messages(None, "the red cup", type="image_url", image_url={"url": uri + encoded})),
    ):
        assert_same(found, expected)
        assert found.query == "the red cup" and found.size == (50, 30) and found.draw().size == expected.draw().size
    turns = messages(image, "the red cup", "it is [SEG].", "a tree")
    turns = [{"role": "system", "content": [{"type": "text", "text": "answer in few words"}]}, *turns]
    seen, original = [], pipe.model.segment
    pipe.model.segment = lambda **inputs: seen.append(inputs["input_ids"][0].tolist()) or original(**inputs)
    try:
        found = ask(pipe, turns, answer="a tree is [SEG] .")
    finally:
        del pipe.model.segment
    assert found.query == "a tree" and [one["label"] for one in found["segments"]] == ["a tree"]
    read = pipe.processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert seen[0] == np.asarray(read["input_ids"])[0].tolist()


def test_conversations_of_no_use_are_refused(pipe):
    image = Image.fromarray(gradient_image(30, 50))
    for given, message in (
        ([{"role": "user", "content": "hello"}], "a conversation must be about one image, got 0"),
        (messages(image, "a tree") + messages(image, "a cup"), "a conversation must be about one image, got 2"),
        (
            messages(image, "a tree", "no"),
            "the last message of a conversation must be the user's, got role 'assistant'",
        ),
        (messages(image, " "), "the last message of a conversation must ask something, got no text"),
        (messages(image, "a", "b", "c")[:1] + [{"role": "user", "content": 3}], "the content of a message must be"),
        (messages(None, "a tree", type="video", video="a"), 'a part of a message must be {"type": "text"'),
        (messages(None, "a tree"), "must stand under one of image, url, path, base64, image_url, got "),
        (messages("nowhere.png", "a tree"), "the image 'nowhere.png' does not exist"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            pipe(given)


def test_what_layers_disagree_about_is_in_image_pixels(pipe):
    image = Image.fromarray(gradient_image(30, 50))
    result = ask(pipe, image, "a tree", layer_selection="mc", num_layer_samples=8)
    for segment in result["segments"]:
        assert segment["uncertainty"].shape == (30, 50) and segment["uncertainty"].dtype == np.float32
        assert 0 <= segment["uncertainty"].min() <= segment["uncertainty"].max() <= 0.25
        assert type(segment["agreement"]) is float and 0 <= segment["agreement"] <= 1
    assert max(segment["uncertainty"].max() for segment in result["segments"]) > 0
    back = type(result).from_dict(json.loads(json.dumps(result.to_dict())))
    assert back == result and back.query == "a tree" and back.last_layer == 4
    assert result.draw().width == 3 * 640 + 2 * 8
    assert "uncertainty" not in ask(pipe, image, "a tree")["segments"][0]


def test_a_result_knows_what_is_absent(pipe):
    image = Image.fromarray(gradient_image(30, 50))
    found = ask(pipe, image, "a cup, a boat", answer="the cup is [SEG] and a boat is [REJ] .")
    assert found.absent == ("a boat",) and len(found["segments"]) == 1
    assert ask(pipe, image, "a tree", answer="[REJ]").absent == ("a tree",)
    assert ask(pipe, image, "a tree", answer="the cup").absent == ()
