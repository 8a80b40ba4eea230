"""Sessions about one image: same results as a single call, one encoding, memory given back, misuse refused."""

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor, tiny_tokenizer, write

from uground.modeling_uground import UGroundForReferringSegmentation
from uground.modeling_uground.session_uground import image_fingerprint

ANSWER = "the cup is [SEG] ."
QUERIES = ["the red cup", "a tree and the blue boat", "fish"]


@pytest.fixture
def model():
    # Its masks are neither empty nor full, and its IoU estimates are positive.
    return tiny_model(3)


@pytest.fixture
def processor():
    return tiny_processor()


def ask_once(model, processor, image, queries, answer=ANSWER):
    outputs = model.segment(**processor(image, queries), **write(processor, answer))
    return processor.post_process_instance_segmentation(
        outputs, queries=[queries] * isinstance(queries, str) or queries
    )


def assert_same(one, other):
    assert (one["answer"], one["labels"]) == (other["answer"], other["labels"])
    assert torch.equal(one["masks"], other["masks"])
    assert 0 < one["masks"].sum() < one["masks"].numel() or not len(one["masks"])
    torch.testing.assert_close(one["scores"], other["scores"], atol=1e-5, rtol=1e-4)


def test_answers_are_those_of_single_calls(model, processor):
    image = gradient_image(30, 50)
    with model.image_session(image, processor) as session:
        for query in QUERIES:
            assert_same(session(query, **write(processor, ANSWER)), ask_once(model, processor, image, query)[0])
        together = session(QUERIES, **write(processor, ANSWER))
        for one, query in zip(together, QUERIES, strict=True):
            assert_same(one, ask_once(model, processor, image, query)[0])
        assert session(QUERIES[0], threshold=1.0, **write(processor, ANSWER))["labels"] == []


def test_image_and_prefix_are_read_once(model, processor):
    calls = []
    parts = {"sam": model.mask_decoder.sam.vision_encoder, "clip": model.lmm.model.vision_tower}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model.lmm.model.language_model.norm.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    with model.image_session(gradient_image(30, 50), processor) as session:
        assert sorted(calls[:2]) == ["clip", "sam"] and len(calls) == 3
        assert calls[2] > 16
        del calls[:]
        session("the red cup", **write(processor, "it"))
        session("fish", **write(processor, "it"))
    assert all(isinstance(count, int) and count < 16 for count in calls) and len(calls) == 4


def test_sessions_do_not_mix_their_images(model, processor):
    images = [gradient_image(30, 50), gradient_image(50, 30), gradient_image(50, 30)[::-1].copy()]
    sessions = [model.image_session(image, processor) for image in images]
    found = [session("fish", **write(processor, ANSWER)) for _ in range(2) for session in sessions]
    for image, first, second in zip(images, found[:3], found[3:], strict=True):
        expected = ask_once(model, processor, image, "fish")[0]
        assert_same(first, expected)
        assert_same(second, expected)


def prompts_of(model, processor, monkeypatch):
    seen, segment = [], model.segment

    def watch(input_ids, **others):
        seen.append(processor.tokenizer.decode([token for token in input_ids[0].tolist() if token not in (0, 39)]))
        return segment(input_ids, **others)

    monkeypatch.setattr(model, "segment", watch)
    return seen


def test_history_is_repeated_in_front_of_a_query(model, processor, monkeypatch):
    image, seen = gradient_image(30, 50), prompts_of(model, processor, monkeypatch)
    with model.image_session(image, processor, history=True, max_turns=2) as session:
        for query in ("the red cup", "a tree", "fish", "what can swim"):
            result = session(query, **write(processor, ANSWER))
        assert session.turns == [("fish", "the cup is [SEG]."), ("what can swim", "the cup is [SEG].")]
    texts = [text.replace(" ", "") for text in seen]
    assert texts[0] == "USER:theredcupASSISTANT:"
    assert texts[1] == "USER:theredcupASSISTANT:thecupis[SEG].</s>USER:atreeASSISTANT:"
    assert texts[3].count("USER") == 3 and "theredcup" not in texts[3] and "atree" in texts[3]
    assert len(result["masks"]) == 1
    # The turns before it change what is seen, so the history was read and not only kept.
    alone = ask_once(model, processor, image, "what can swim")[0]
    assert not torch.equal(alone["scores"], result["scores"])


def test_history_that_is_too_long_is_forgotten_first(model):
    processor = tiny_processor(tiny_tokenizer(max_length=16 + 18))
    with model.image_session(gradient_image(30, 50), processor, history=True) as session:
        for _ in range(5):
            session("a tree", **write(processor, "it is [SEG] ."))
        assert len(session.turns) == 1 + 1
        with pytest.raises(ValueError, match="is too long"):
            session("a tree " * 20, max_new_tokens=1)
        assert len(session.turns) == 2
        with pytest.raises(ValueError, match="one query at a time, got 2"):
            session(["a", "the"], max_new_tokens=1)


def whole_prompt(processor, query):
    content = [{"type": "image"}, {"type": "text", "text": query}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_a_whole_prompt_is_refused_with_history(model, processor):
    with model.image_session(gradient_image(30, 50), processor, history=True) as session:
        for count in range(2):
            for query in (whole_prompt(processor, "fish"), "the <image>"):
                with pytest.raises(
                    ValueError, match="a session with history takes plain queries, got a text with <im"
                ):
                    session(query, max_new_tokens=1)
            assert len(session.turns) == count
            session("a tree", **write(processor, ANSWER))
        assert len(session.turns) == 2


def test_only_a_prompt_that_is_too_long_drops_turns(model, processor, monkeypatch):
    with model.image_session(gradient_image(30, 50), processor, history=True) as session:
        session("a tree", **write(processor, ANSWER))
        encode = processor.encode_queries

        def refuse_conversations(queries, **settings):
            if queries != ["fish"]:
                raise ValueError("of the template")
            return encode(queries, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(processor, "encode_queries", refuse_conversations)
            with pytest.raises(ValueError, match="of the template"):
                session("fish", max_new_tokens=1)
        assert session.turns == [("a tree", "the cup is [SEG].")]
        # An answer that spells the placeholder of an image puts no second image into the conversation.
        session.turns = [("a tree", "the <image> is [SEG].")]
        session("fish", **write(processor, ANSWER))
        assert len(session.turns) == 2


def test_a_whole_prompt_does_not_become_a_label(model, processor):
    image, answer = gradient_image(30, 50), "it is [SEG] ."
    prompt = whole_prompt(processor, "the red cup")
    with model.image_session(image, processor) as session:
        assert session(prompt, **write(processor, answer))["labels"] == ["the red cup"]
        mixed = session(["fish", prompt], **write(processor, answer))
        assert [result["labels"] for result in mixed] == [["fish"], ["the red cup"]]
        assert session(prompt, **write(processor, ANSWER))["labels"] == ["the cup"]


@pytest.mark.parametrize("leave", ["close", "with", "error"])
def test_memory_is_given_back(model, processor, leave):
    session = model.image_session(gradient_image(30, 50), processor)
    session("fish", **write(processor, ANSWER))
    held = [
        session._images.sam_embeddings,
        session._prefix.image_states.layers[0],
        session._prefix.cache.layers[0].keys,
    ]
    held = [weakref.ref(tensor) for tensor in held]
    assert all(reference() is not None for reference in held)
    if leave == "close":
        session.close()
        session.close()
    elif leave == "with":
        with session:
            pass
    else:
        with pytest.raises(RuntimeError, match="of the caller"), session:
            raise RuntimeError("of the caller")
    gc.collect()
    assert [reference() for reference in held] == [None] * 3
    with pytest.raises(ValueError, match="the image session is closed; open another one"):
        session("fish")


def test_nothing_grows_from_call_to_call(model, processor):
    with model.image_session(gradient_image(30, 50), processor, history=True, max_turns=2) as session:
        sizes = []
        for _ in range(4):
            session("fish", **write(processor, ANSWER))
            sizes.append((session._prefix.cache.get_seq_length(), len(session.turns)))
    assert len({length for length, _ in sizes}) == 1
    assert [turns for _, turns in sizes] == [1, 2, 2, 2]


def test_a_changed_image_is_noticed(model, processor, tmp_path):
    array = gradient_image(30, 50)
    picture = Image.fromarray(array)
    path = tmp_path / "image.png"
    picture.save(path)
    listed, swapped = [array.copy()], [array.copy()]
    indexed, clear = picture.quantize(8), picture.quantize(8)
    changes = {
        "array": (array, lambda: array.__setitem__((3, 4, 0), 255 - array[3, 4, 0])),
        "picture": (picture, lambda: picture.putpixel((2, 2), (9, 9, 9))),
        "file": (path, lambda: Image.fromarray(array).save(path)),
        "tensor": (tensor := torch.from_numpy(array.copy()), lambda: tensor[0, 0].add_(1)),
        "list": (listed, lambda: listed[0].fill(7)),
        "another in the list": (swapped, lambda: swapped.__setitem__(0, array[::-1])),
        "palette": (indexed, lambda: indexed.putpalette(indexed.getpalette()[::-1])),
        "transparency": (clear, lambda: clear.info.update(transparency=0)),
    }
    for image, change in changes.values():
        with model.image_session(image, processor) as session:
            session("fish", max_new_tokens=1)
            change()
            with pytest.raises(ValueError, match="the image has changed since its session was opened"):
                session("fish", max_new_tokens=1)


def test_fingerprints_tell_shapes_apart():
    flat = np.zeros((4, 6, 3), dtype=np.uint8)
    prints = {image_fingerprint(image) for image in (flat, flat.reshape(6, 4, 3), flat[:2], Image.fromarray(flat))}
    assert len(prints) == 4
    assert image_fingerprint(flat) == image_fingerprint(flat.copy()) == image_fingerprint([flat])
    grey = Image.new("L", (6, 4))
    prints = {
        image_fingerprint(image) for image in (grey, grey.convert("P"), grey.resize((4, 6)), Image.new("P", (6, 4)))
    }
    assert len(prints) == 4


def test_asking_about_a_palette_image_does_not_change_it(model, processor, tmp_path):
    path = tmp_path / "image.gif"
    Image.fromarray(gradient_image(30, 50)).quantize(8).save(path, transparency=0)
    with Image.open(path) as picture, model.image_session(picture, processor) as session:
        for _ in range(2):
            picture.convert("RGBA")
            session("fish", max_new_tokens=1)


def test_the_processor_of_the_checkpoint_is_found(model, processor, tmp_path):
    image = gradient_image(30, 50)
    with pytest.raises(ValueError, match="needs processor=…, as the model was not loaded"):
        model.image_session(image)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = UGroundForReferringSegmentation.from_pretrained(tmp_path)
    with loaded.image_session(image) as session:
        assert_same(session("fish", **write(processor, ANSWER)), ask_once(model, processor, image, "fish")[0])


def test_bad_arguments_are_refused(model, processor):
    with pytest.raises(ValueError, match="max_turns must be a whole number of at least 1, got 0"):
        model.image_session(gradient_image(8, 8), processor, max_turns=0)
    with model.image_session(gradient_image(8, 8), processor) as session:
        with pytest.raises(ValueError, match="must not be empty"):
            session(" ")
        with pytest.raises(ValueError, match="layer_selection must be one of"):
            session("fish", layer_selection="best")


def test_an_answer_that_was_cut_says_so(model, processor):
    def short():
        return {**write(processor, ANSWER), "max_new_tokens": 2}

    with model.image_session(gradient_image(30, 50), processor) as session:
        whole, cut = session("fish", **write(processor, ANSWER)), session("fish", **short())
        assert (whole["finished"], cut["finished"]) == (True, False)
        assert len(cut["masks"]) < len(whole["masks"])
        assert [found["finished"] for found in session(QUERIES, **short())] == [False] * len(QUERIES)
