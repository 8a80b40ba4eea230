"""Processors of LMMs with their own image processor and template: as the LMM's own, and cells in their places."""

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, family_model
from tiny_processor import gradient_image, qwen_image_processor, qwen_processor, qwen_tokenizer, write
from transformers import Qwen3VLProcessor

from uground.checkpoint_loading import check_pair
from uground.modeling_uground.image_frames import ImageFrame
from uground.modeling_uground.prompts import build_mask_prompts
from uground.processing import UGroundProcessor

SIZES = [(40, 90), (64, 24), (33, 33)]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def processor():
    return qwen_processor()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return family_model(request.param)


def pictures():
    return [gradient_image(*size) for size in SIZES]


def test_inputs_are_those_of_the_lmms_own_processor(processor, monkeypatch):
    # Its class of videos needs torchvision, and is asked for even where there are none.
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    own = Qwen3VLProcessor(qwen_image_processor(), qwen_tokenizer(), None, chat_template=processor.chat_template)
    prompts = [
        own.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in ("the red cup", "what can swim", "a tree")
    ]
    theirs = own(images=pictures(), text=prompts, padding=True, return_tensors="pt")
    for texts in (["the red cup", "what can swim", "a tree"], prompts):
        mine = processor(pictures(), texts)
        for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
            assert torch.equal(mine[name], theirs[name].to(mine[name].dtype)), name


def test_several_queries_per_image_turns_and_answers(processor):
    inputs = processor(
        pictures()[:2], [["the cup", "a tree"], ["it"]], answers=[["it is [SEG] .", "[REJ] ."], ["[SEG]"]]
    )
    counts = (inputs["input_ids"] == processor.image_token_id).sum(-1)
    grids = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    assert counts.tolist() == [grids[0], grids[0], grids[1]] and grids[0] != grids[1]
    assert inputs["image_index"].tolist() == [0, 0, 1]
    learnt = processor.tokenizer.decode(inputs["labels"][0][inputs["labels"][0] >= 0])
    assert learnt.replace(" ", "") == "itis[SEG].<|im_end|>"
    turns = processor.render_prompt([("the cup", "[SEG]")], "a tree")
    assert turns.count("<|image_pad|>") == 1 and turns.endswith("<|im_start|>assistant\n")


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = UGroundProcessor.from_pretrained(tmp_path)
    assert loaded.patch_size == 8 and loaded.num_image_tokens is None and loaded.image_frame == "stretch"
    before, after = (made(pictures(), ["a", "the", "it"]) for made in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_session_and_a_batch_answer_alike(model, processor):
    check_pair(model.config, processor, "here")
    images = pictures()
    inputs = processor(images, ["the cup", "a tree", "it"])
    settings = write(processor, "it is [SEG]")
    together = model.segment(**inputs, **settings, layer_selection="argmax")
    results = processor.post_process_instance_segmentation(together)
    for image, query, result in zip(images, ["the cup", "a tree", "it"], results, strict=True):
        with model.image_session(image, processor) as session:
            alone = session(query, **write(processor, "it is [SEG]"), layer_selection="argmax")
        assert alone["masks"][0].shape == image.shape[:2]
        np.testing.assert_array_equal(np.asarray(alone["masks"]), np.asarray(result["masks"]))
        assert alone["scores"] == pytest.approx(result["scores"], abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 88), (72, 16), (32, 32)])
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_one_bright_cell_lights_its_cell_and_its_corner(model, processor, size, corner):
    """The tower's attention is switched off, so that a feature tells of its own pixels only."""
    for name, parameter in model.lmm.model.visual.named_parameters():
        if ".attn.proj." in name:
            parameter.zero_()
    dark = np.zeros((*size, 3), dtype=np.uint8)
    bright = dark.copy()
    rows, columns = (slice(0, 8) if side == 0 else slice(-8, None) for side in corner)
    bright[rows, columns] = 255
    inputs = processor([dark, bright], ["a", "a"])
    images = model.get_image_embeddings(**inputs)
    height, width = images.grid_sizes[1].tolist()
    changed = torch.zeros(1, *images.token_valid.shape[1:])
    difference = (images.lmm_features[1] - images.lmm_features[0]).abs().amax(-1)
    changed[0].view(-1)[images.token_cells[1]] = difference
    lit = (changed[0] > 1e-4).nonzero().tolist()
    assert lit == [[corner[0] % height, corner[1] % width]]
    frame = model.adapter.frames_of(images.grid_sizes)
    prompt = build_mask_prompts(changed, torch.tensor([1]), [size, size], frame, ImageFrame("letterbox", 16), 0.0)
    peak = divmod(int(prompt.argmax()), 16)
    _, rows = ImageFrame("letterbox", 16).windows(size)[0]
    _, columns = ImageFrame("letterbox", 16).windows(size)[1]
    assert [place < side / 2 for place, side in zip(peak, (rows, columns), strict=True)] == [
        side == 0 for side in corner
    ]
