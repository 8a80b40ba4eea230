"""From outputs to masks, scores, boxes and labels, against values worked out by hand."""

import math

import pytest
import torch
from tiny_processor import gradient_image, tiny_processor
from torch.nn import functional as F

from uground.modeling_uground.image_frames import ImageFrame, apply_matrices, grid_to_image
from uground.processing import masks_to_boxes, post_process_masks, segment_scores
from uground.processing.answer_labels import decode_answer, label_segments, recover_query


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def outputs_of(processor, answers, rows, mask_logits, **fields):
    """What `model.segment` returns for queries about one 8x16 image in a frame of 16, half of it padding."""
    prompt = processor(gradient_image(8, 16), ["the red cup", "a tree"][: len(answers)])["input_ids"]
    written = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    length = max(map(len, written)) + 1
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    written = torch.tensor([ids + [eos] + [pad] * (length - len(ids) - 1) for ids in written])
    count = len(rows)
    return {
        "sequences": torch.cat([prompt, written], dim=1),
        "prompt_length": prompt.shape[1],
        "image_index": torch.zeros(len(answers), dtype=torch.long),
        "sam_valid_sizes": torch.tensor([[8, 16]]),
        "original_sizes": torch.tensor([[8, 16]]),
        "segment_row": torch.tensor(rows, dtype=torch.long),
        "layer_index": torch.arange(count),
        "mask_logits": mask_logits,
        "iou_scores": torch.full((count,), 0.64),
        "token_scores": torch.full((count,), 0.5),
        **fields,
    }


# Masks at image size


def test_low_resolution_becomes_frame_then_crop_then_image():
    """A ramp 0, 4, 8, 12 over four columns rises by one per pixel of the frame, between the outermost centres."""
    ramp = torch.tensor([0.0, 4.0, 8.0, 12.0]).expand(4, 4)
    (full,) = post_process_masks(ramp[None], [(8, 12)], [(8, 12)])
    expected = torch.arange(12.0).sub(1.5).clamp(0, 12)
    assert full.shape == (8, 12)
    assert torch.allclose(full, expected.expand(8, 12), atol=1e-5)
    (halved,) = post_process_masks(ramp[None], torch.tensor([[8, 12]]), torch.tensor([[4, 6]]))
    assert torch.allclose(halved[0], expected.view(6, 2).mean(1), atol=1e-5)


@pytest.mark.parametrize("image_hw", [(30, 40), (480, 640), (1, 90), (700, 20), (64, 64), (1, 1)])
def test_same_change_of_pixels_as_the_frames_of_the_model(image_hw):
    """Also with half-precision logits: both reckon in float32."""
    frame = ImageFrame("letterbox", 64)
    valid_hw = tuple(end for _, end in frame.windows(image_hw))
    logits = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    (full,) = post_process_masks(logits[None], [valid_hw], [image_hw])
    assert full.dtype == torch.float32
    by_frame = apply_matrices(logits, *grid_to_image((16, 16), frame, image_hw))
    assert torch.allclose(full, by_frame, atol=1e-6)
    in_frame = F.interpolate(logits[None].float(), (64, 64), mode="bilinear")[..., : valid_hw[0], : valid_hw[1]]
    assert torch.allclose(full, F.interpolate(in_frame, image_hw, mode="bilinear")[0], atol=1e-5)


def test_chunks_equal_the_loop_and_images_keep_their_sizes():
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(19, 4, 4, generator=generator)
    first, second, none = post_process_masks(
        [many, many[0], many[:0]], [(16, 10), (16, 16), (16, 10)], [(20, 13), (5, 5), (7, 3)]
    )
    assert (first.shape, second.shape, none.shape) == ((19, 20, 13), (5, 5), (0, 7, 3))
    for index in range(19):
        assert torch.equal(first[index], post_process_masks([many[index]], [(16, 10)], [(20, 13)])[0])


def test_lengths_and_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one entry per image, got \(1, 2, 1\)"):
        post_process_masks(torch.zeros(1, 4, 4), [(8, 8), (8, 8)], [(8, 8)])
    with pytest.raises(ValueError, match=r"within the SAM frame of \(16, 16\), got \(17, 8\)"):
        post_process_masks(torch.zeros(1, 4, 4), [(17, 8)], [(8, 8)])


# Scores and boxes


def test_score_by_hand():
    """Masks of one pixel of probability .75: .5 * sqrt(.64 * .75), an IoU estimate above 1, and an empty mask."""
    logits = torch.full((3, 2, 2), -3.0)
    logits[0, 0, 0] = logits[1, 0, 0] = math.log(3)
    scores = segment_scores(logits, torch.tensor([0.64, 1.7, 0.9]), torch.tensor([0.5, 1.0, 1.0]))
    assert torch.allclose(scores, torch.tensor([0.5 * math.sqrt(0.64 * 0.75), math.sqrt(0.75), 0.0]))
    assert segment_scores(logits[:0], torch.ones(0), torch.ones(0)).shape == (0,)


def test_score_ranks_by_each_of_its_three_sources():
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0]).view(4, 1, 1)
    scores = segment_scores(logits, torch.tensor([0.5, 0.5, 0.6, 0.5]), torch.tensor([0.5, 0.5, 0.5, 0.6]))
    assert (scores[1:] > scores[0]).all() and ((scores >= 0) & (scores <= 1)).all()


def test_boxes_by_hand():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 3, 0] = True
    assert masks_to_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 3, 1, 4], [0, 0, 0, 0]]
    assert masks_to_boxes(masks[:0]).shape == (0, 4)


# Everything together


def test_queries_get_their_own_segments(processor):
    logits = torch.full((3, 4, 4), -2.0)
    logits[0, :2, :2] = 2.0
    logits[1, :, 2:] = 2.0
    outputs = outputs_of(processor, ["the cup is [SEG] and a boat is [SEG] .", "it is [SEG] ."], [0, 0, 1], logits)
    first, second = processor.post_process_instance_segmentation(outputs)
    assert first["answer"] == "the cup is [SEG] and a boat is [SEG]."
    assert first["labels"] == ["the cup", "a boat"] and second["labels"] == ["a tree"]
    assert first["masks"].shape == (2, 8, 16) and first["masks"].dtype == torch.bool
    assert first["boxes"].tolist() == [[0, 0, 8, 8], [8, 0, 16, 8]]
    assert first["layers"].tolist() == [0, 1]
    assert (first["scores"] > 0.3).all()
    assert second["boxes"].tolist() == [[0, 0, 0, 0]] and second["scores"].tolist() == [0.0]


def test_padding_counts_neither_in_masks_nor_in_scores(processor):
    clean = torch.full((1, 4, 4), -2.0)
    clean[0, 0] = 2.0
    dirty = clean.clone()
    dirty[0, 3] = 9.0
    results = [
        processor.post_process_instance_segmentation(outputs_of(processor, ["it is [SEG] ."], [0], logits))[0]
        for logits in (clean, dirty)
    ]
    assert torch.equal(results[0]["scores"], results[1]["scores"])
    assert torch.equal(results[0]["masks"], results[1]["masks"])


def test_nothing_found(processor):
    outputs = outputs_of(processor, ["[REJ]"], [], torch.zeros(0, 4, 4))
    (result,) = processor.post_process_instance_segmentation(outputs)
    assert result["answer"] == "[REJ]" and result["labels"] == []
    assert result["masks"].shape == (0, 8, 16) and result["boxes"].shape == (0, 4)
    assert result["scores"].shape == result["layers"].shape == (0,)


def test_thresholds_and_target_sizes(processor):
    logits = torch.full((2, 4, 4), -2.0)
    logits[0], logits[1, 0, 0] = 1.0, 1.0
    outputs = outputs_of(processor, ["[SEG] [SEG]"], [0, 0], logits, token_scores=torch.tensor([0.9, 0.1]))
    (kept,) = processor.post_process_instance_segmentation(outputs, threshold=0.5, target_sizes=[(4, 8)])
    assert kept["masks"].shape == (1, 4, 8) and kept["layers"].tolist() == [0] and kept["labels"] == ["the red cup"]
    (strict,) = processor.post_process_instance_segmentation(outputs, mask_threshold=1.5)
    assert not strict["masks"].any() and strict["scores"].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"per image \(1\) or per query \(1\), got 3"):
        processor.post_process_instance_segmentation(outputs, target_sizes=[(4, 8)] * 3)
    (named,) = processor.post_process_instance_segmentation(outputs, queries=["what"])
    assert named["labels"] == ["what", "what"]
    with pytest.raises(ValueError, match="expected 1, got 2"):
        processor.post_process_instance_segmentation(outputs, queries=["a", "b"])


@pytest.mark.parametrize("field", ["mask_logits", "iou_scores", "token_scores"])
def test_nan_is_an_error_and_no_empty_mask(processor, field):
    outputs = outputs_of(processor, ["[SEG]"], [0], torch.ones(1, 4, 4))
    outputs[field] = outputs[field] * torch.nan
    with pytest.raises(ValueError, match=f"NaN in {field}: its weights are broken"):
        processor.post_process_instance_segmentation(outputs)


def test_outputs_of_something_else(processor):
    with pytest.raises(ValueError, match="what model.segment.* got dict without sequences"):
        processor.post_process_instance_segmentation({"logits": torch.zeros(1)})


# Words


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("the tree is [SEG] and whatever can swim is [SEG].", ["the tree", "whatever can swim"]),
        ("It is [SEG].", ["query"]),
        ("They are [SEG], [SEG].", ["query", "query"]),
        ("Sure, it is [SEG].", ["query"]),
        ("Sure, the segmentation result is [SEG].", ["query"]),
        ("[SEG].", ["query"]),
        ("a dog, the cat and an island are [SEG], [SEG] and [SEG].", ["a dog", "the cat", "an island"]),
        ("a dog is [SEG], b is [SEG] and c is [SEG].", ["a dog", "b", "c"]),
        ("a dog is [SEG] and the boat is [REJ] and c is [SEG].", ["a dog", "c"]),
        ("a, b and c are [SEG], [REJ] and [SEG].", ["a", "c"]),
        ("the red things are [SEG] and [SEG].", ["the red things", "the red things"]),
        ("What swims is a fish, so it is [SEG].", ["query"]),
        ("There are two. The left one is [SEG]. The other: [SEG].", ["The left one", "The other"]),
        ("There is none: [REJ].", []),
        ("no such thing", []),
    ],
)
def test_labels(answer, labels):
    assert label_segments(answer, "query", "[SEG]", "[REJ]") == labels


def test_answer_ends_at_the_end_token(processor):
    ids = processor.tokenizer("it is [SEG] .", add_special_tokens=False)["input_ids"]
    eos, pad, bos = (getattr(processor.tokenizer, f"{name}_token_id") for name in ("eos", "pad", "bos"))
    assert decode_answer(processor, [bos, *ids, eos, *ids, pad]) == "it is [SEG]."
    assert decode_answer(processor, [eos, pad]) == ""


def test_white_space_around_tokens_is_evened_out(processor, monkeypatch):
    """Added tokens of official tokenizers swallow the white space on both sides; others add some."""
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *args, **kwargs: "a tree is[SEG]and b is [REJ] .")
    assert decode_answer(processor, [5]) == "a tree is [SEG] and b is [REJ]."


def test_query_is_read_off_the_prompt(processor):
    batch = processor(gradient_image(8, 16), ["the red cup and a tree", "what"])
    assert [recover_query(processor, ids) for ids in batch["input_ids"].tolist()] == ["the red cup and a tree", "what"]
    history = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cup"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "it is [SEG]"}]},
        {"role": "user", "content": [{"type": "text", "text": "a tree"}]},
    ]
    prompt = processor.apply_chat_template(history, add_generation_prompt=True)
    ids = processor(gradient_image(8, 16), prompt)["input_ids"][0].tolist()
    assert recover_query(processor, ids) == "a tree"
    assert recover_query(processor, ids[:-2]) == ""
