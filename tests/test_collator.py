"""The collator on literal tensors, and rows packed behind one image against rows on their own."""

import numpy as np
import pytest
import torch
from tiny import SEGMENT_TOKEN, tiny_model
from tiny_processor import gradient_image, tiny_processor
from tiny_training import example, rle

from uground.modeling_uground.image_frames import letterbox_mask
from uground.training.collator import TARGET_KEYS, GroundingCollator, stable_key


def simple(number: int, query: str, answer: str, masks=(), size=(32, 32), **more) -> dict:
    """An example on a picture of `size` with the given bool masks."""
    return {
        "id": f"simple-{number}",
        "image": gradient_image(*size),
        "query": query,
        "answer": answer,
        "masks": [rle(mask) for mask in masks],
        **more,
    }


def corner(size=(32, 32), rows=8, columns=16) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[:rows, :columns] = True
    return mask


def words(processor, ids: torch.Tensor) -> str:
    """Tokens of a row, image and padding left out."""
    skipped = {processor.image_token_id, processor.tokenizer.pad_token_id}
    return processor.tokenizer.decode([token for token in ids.tolist() if token not in skipped])


def test_masks_in_the_letterbox_are_shares_of_pixels():
    mask = np.zeros((2, 4), bool)
    mask[0, 0] = mask[0, 3] = mask[1, 3] = True
    assert letterbox_mask(mask, 4).tolist() == [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert letterbox_mask(mask, 2).tolist() == [[0.25, 0.5], [0, 0]]


def test_targets_stand_in_reading_order_with_their_images_and_valid_pixels():
    collator = GroundingCollator(tiny_processor(), loss_size=4)
    ignored = rle(corner(rows=32, columns=8))
    items = [
        simple(0, "the cup", "it is [SEG] .", [corner()], ignore=ignored),
        simple(1, "what is red", "the cup ."),
        simple(2, "the tree", "a is [SEG] and a is [SEG] .", [corner((16, 32)), ~corner((16, 32))], (16, 32)),
    ]
    batch = collator(items)
    (group,) = batch["target_groups"]
    assert group["segments"].tolist() == [0, 1, 2] and group["images"].tolist() == [0, 2, 2]
    assert group["in_frame"]
    assert group["masks"][0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert group["masks"][2].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert group["valid"][0].tolist() == [[False, True, True, True]] * 4
    assert group["valid"][1].tolist() == [[True] * 4, [True] * 4, [False] * 4, [False] * 4]
    assert (batch["input_ids"] == SEGMENT_TOKEN).sum(-1).tolist() == [1, 0, 2]
    assert batch["segment_keys"].tolist() == [stable_key(name) for name in ("simple-0/0", "simple-2/0", "simple-2/1")]
    assert batch["example_ids"] == ["simple-0", "simple-1", "simple-2"]


def test_masks_at_image_size_are_grouped_by_size():
    items = [example(0), example(1), example(4, 0)]
    groups = GroundingCollator(tiny_processor())(items)["target_groups"]
    sizes = {tuple(group["masks"].shape[1:]): group["segments"].tolist() for group in groups}
    assert sizes == {(40, 40): [0], (24, 48): [1, 2, 3]}
    assert not groups[0]["in_frame"]


def packed_and_single(groups: list[list[dict]], **settings):
    """Outputs for items of several queries each, packed and not."""
    processor, model = tiny_processor(), tiny_model(similarity_scaling="scaled")
    items = [{"image": group[0]["image"], "examples": group} for group in groups]
    results = []
    for pack in (True, False):
        batch = GroundingCollator(processor, 8, pack_queries=pack, **settings)(items)
        inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
        with torch.no_grad():
            results.append((batch, model(**inputs, layer_selection="argmax")))
    return results


def test_packed_queries_give_what_single_rows_give():
    groups = [
        [simple(0, "the red cup", "it is [SEG] .", [corner()]), simple(1, "the tree", "it is [REJ] .")],
        [
            simple(2, "what can swim", "a fish is [SEG] and a boat is [SEG] .", [corner((16, 32))] * 2, (16, 32)),
            simple(3, "what is red", "the cup .", size=(16, 32)),
            simple(4, "the boat", "it is [SEG] .", [corner((16, 32))], (16, 32)),
        ],
    ]
    (packed, together), (single, apart) = packed_and_single(groups)
    assert packed["input_ids"].shape[0] == 2 and single["input_ids"].shape[0] == 5
    assert (packed["labels"] != -100).sum() == (single["labels"] != -100).sum()
    for name in ("layer_logits", "similarity", "mask_logits", "iou_scores"):
        torch.testing.assert_close(together[name], apart[name], atol=1e-4, rtol=1e-4)
    assert torch.equal(together.layer_index, apart.layer_index)
    torch.testing.assert_close(together.loss, apart.loss, atol=1e-5, rtol=1e-5)
    learnt = packed["labels"] != -100
    assert packed["labels"][learnt].tolist() == single["labels"][single["labels"] != -100].tolist()


def test_prompts_that_begin_differently_are_not_packed():
    whole = ["USER : <image> the cup ASSISTANT :", "the USER : <image> the cup ASSISTANT :"]
    items = [{"image": gradient_image(32, 32), "examples": [simple(n, text, "it .") for n, text in enumerate(whole)]}]
    with pytest.raises(ValueError, match="must begin alike"):
        GroundingCollator(tiny_processor(), 8)(items)


def test_a_batch_without_segments_gets_one_that_nobody_sees():
    processor, model = tiny_processor(), tiny_model()
    items = [simple(0, "what is red", "the cup ."), simple(1, "the tree", "it is [REJ] .")]
    batch = GroundingCollator(processor, 8)(items)
    assert (batch["input_ids"] == SEGMENT_TOKEN).sum() == 1 and batch["input_ids"][0, -1] == SEGMENT_TOKEN
    assert batch["labels"][0, -1] == -100 and len(batch["segment_keys"]) == 0 and batch["target_groups"] == []
    images, queries = [item["image"] for item in items], [item["query"] for item in items]
    plain = processor(images, queries, ["the cup .", "it is [REJ] ."])
    inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, model(**plain).loss)


def test_what_is_too_long_loses_its_end_and_the_masks_of_it():
    processor = tiny_processor()
    answer = " and ".join(["a cup is [SEG]"] * 25) + " ."
    masks = [corner(columns=column + 1) for column in range(25)]
    long = simple(0, "the red cup", answer, masks)
    full = GroundingCollator(processor, 32)([long])
    assert len(full["target_groups"][0]["masks"]) == 25
    room = full["input_ids"].shape[1]
    for cut in (1, 3, 40, 77):
        batch = GroundingCollator(processor, 32, max_length=room - cut)([long])
        count = int((batch["input_ids"] == SEGMENT_TOKEN).sum())
        assert batch["input_ids"].shape[1] == room - cut
        assert count == len(batch["segment_keys"]) == len(batch["target_groups"][0]["masks"])
        torch.testing.assert_close(batch["target_groups"][0]["masks"], full["target_groups"][0]["masks"][:count])
        assert torch.equal(batch["input_ids"][0], full["input_ids"][0, : room - cut])
    assert count < 20
    with pytest.raises(ValueError, match="example simple-0: the prompt is too long, expected it and the beginning"):
        GroundingCollator(processor, 32, max_length=10)([long])


def test_earlier_turns_are_learnt_and_keep_their_masks():
    processor, masks = tiny_processor(), [corner(), ~corner(), corner(rows=4)]
    turns = [{"query": "the cup", "answer": "it is [SEG] ."}, {"query": "what is red", "answer": "the cup ."}]
    talk = simple(0, "what can swim", "a is [SEG] and a is [SEG] .", masks, history=turns)
    batch = GroundingCollator(processor, 32)([talk])
    learnt = batch["labels"][0] != -100
    said = words(processor, batch["input_ids"][0][learnt]).split()
    assert " ".join(said) == "it is [SEG] . </s> the cup . </s> a is [SEG] and a is [SEG] . </s>"
    assert torch.equal(batch["labels"][0][learnt], batch["input_ids"][0][learnt])
    assert len(batch["target_groups"][0]["masks"]) == 3
    first = batch["target_groups"][0]["masks"][0]
    assert torch.equal(first, letterbox_mask(corner(), 32))
    with pytest.raises(ValueError, match=r"holds 3 \[SEG\], expected one for each of its 2 masks"):
        GroundingCollator(processor, 32)([{**talk, "masks": talk["masks"][:2]}])


# A whole prompt with an earlier answer whose mask is not there.
ANSWERED = "USER : <image> a cup ASSISTANT : it is [SEG]</s> USER : the tree ASSISTANT :"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "it is [REJ] ."}, r"simple-0: the answer 'it is \[REJ\] .' holds 0 \[SEG\], expected one for"),
        ({"query": ANSWERED}, r"simple-0: prompt and answer hold 2 \[SEG\] tokens, expected 1"),
        ({"masks": [rle(corner((16, 16)))]}, r"simple-0: a mask has size \(16, 16\), expected that of the image"),
        ({"ignore": rle(corner((8, 8)))}, r"simple-0: a mask has size \(8, 8\), expected that of the image"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    bad = {**simple(0, "the cup", "it is [SEG] .", [corner()]), **change}
    with pytest.raises(ValueError, match=message):
        GroundingCollator(tiny_processor(), 8)([bad])


def test_frames_are_named_by_their_pixels():
    collator = GroundingCollator(tiny_processor(), 8, frame_keys=True)
    one, other = simple(0, "the cup", "it ."), simple(1, "the tree", "it .", size=(16, 32))
    keys = collator([one, {**one, "id": "again"}, other])["frame_keys"]
    assert keys[0] == keys[1] != keys[2]
