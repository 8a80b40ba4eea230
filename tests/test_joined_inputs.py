"""Outputs of the processor that are joined, cut and mixed: right where each image has one query, refused elsewhere."""

import datasets
import pytest
import torch
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor
from transformers import Trainer, TrainingArguments, default_data_collator

from uground.modeling_uground.image_rows import resolve_image_index

SIZES = [(20, 40), (48, 24), (32, 32), (40, 30)]
QUERIES = ["the red cup", "the blue tree", "what can swim", "a red boat"]
ANSWERS = ["it is [SEG] .", "a is [SEG] .", "it is [REJ] .", "is [SEG] and a"]
FIELDS = ("logits", "layer_logits", "similarity_map", "mask_logits", "iou_scores")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model():
    return tiny_model(similarity_scaling="scaled")


def images(count: int = 4):
    return [gradient_image(*size) for size in SIZES[:count]]


@pytest.fixture(scope="module")
def together(processor):
    return dict(processor(images(), QUERIES, ANSWERS))


def alone(processor, number: int) -> dict:
    return dict(processor(gradient_image(*SIZES[number]), QUERIES[number], ANSWERS[number]))


@torch.no_grad()
def run(model, batch):
    return model(**batch, layer_selection="argmax")


def assert_same(output, expected):
    for name in FIELDS:
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(output.segment_row, expected.segment_row)


def join(*outputs) -> dict:
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


def test_one_query_per_image_stacks_and_joins(processor, model, together):
    assert "image_index" not in together
    expected = run(model, together)
    assert len(expected.segment_row) == 3
    ones = [alone(processor, number) for number in range(4)]
    assert_same(run(model, join(*ones)), expected)
    items = [{name: value[0] for name, value in one.items()} for one in ones]
    assert_same(run(model, default_data_collator(items)), expected)
    halves = [{name: value[rows] for name, value in together.items()} for rows in (slice(0, 3), slice(3, 4))]
    assert_same(run(model, join(*halves)), expected)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = run(model, {name: value[order] for name, value in together.items()})
    torch.testing.assert_close(shuffled.logits, expected.logits[order], atol=1e-5, rtol=1e-5)
    text = {name: together[name] for name in ("input_ids", "attention_mask")}
    segmented = model.segment(**text, image_embeddings=model.get_image_embeddings(**together), max_new_tokens=2)
    assert segmented.image_index.tolist() == [0, 1, 2, 3]


def make_dataset(processor):
    rows = datasets.Dataset.from_dict({"number": list(range(4))})

    def encode(row):
        return {name: value[0] for name, value in alone(processor, row["number"]).items()}

    return rows.map(encode, remove_columns=["number"]).with_format("torch")


def test_a_mapped_and_shuffled_dataset_trains_with_a_plain_trainer(processor, model, together, tmp_path):
    rows = make_dataset(processor).shuffle(seed=3)
    batch = default_data_collator([rows[number] for number in range(4)])
    order = [together["input_ids"].tolist().index(ids) for ids in batch["input_ids"].tolist()]
    assert sorted(order) == [0, 1, 2, 3] != order
    expected = run(model, {name: value[order] for name, value in together.items()})
    assert_same(run(model, batch), expected)
    learner = tiny_model(similarity_scaling="scaled")
    learner.load_state_dict(model.state_dict())
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=1,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(learner, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(run(model, together).loss), abs=1e-4)


@pytest.fixture(scope="module")
def several(processor):
    """Two queries about one image, three about two: outputs that name the image of each row."""
    one = processor(images(1), [QUERIES[:2]])
    three = processor(images(2), [QUERIES[0], QUERIES[:2]])
    assert one["image_index"].tolist() == [0, 0] and three["image_index"].tolist() == [0, 1, 1]
    return dict(one), dict(three)


CASES = {
    "joined": (lambda one, three: join(one, one), "does not name image 1"),
    "joined of other sizes": (lambda one, three: join(three, one), "does not name image 2"),
    "joined without": (lambda one, three: join(*[without_index(one)] * 2), "4 rows ask about 2 images"),
    "stacked": (lambda one, three: {name: torch.stack([one[name]] * 2) for name in one}, "not stacked, got"),
    "stacked rows": (lambda one, three: {**one, "input_ids": one["input_ids"][None]}, r"the shape \(B, T\)"),
    "flattened": (
        lambda one, three: {name: torch.stack([one[name]] * 2).flatten(0, 1) for name in one},
        "does not name image 1",
    ),
    "cut in front": (
        lambda one, three: {name: value[1:] for name, value in three.items()},
        "one of 1 images for each of 2 rows",
    ),
    "fewer frames": (lambda one, three: {**three, "pixel_values": three["pixel_values"][:1]}, "as many images"),
    "index of another": (lambda one, three: {**one, "image_index": three["image_index"]}, "for each of 2 rows, got"),
}


def without_index(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "image_index"}


@pytest.mark.parametrize("case", CASES)
def test_several_queries_per_image_cannot_be_joined_or_cut(several, model, case):
    change, message = CASES[case]
    inputs = change(*several)
    for call in (model, model.segment, model.generate, model.get_image_embeddings):
        with pytest.raises(ValueError, match=message) as caught:
            call(**inputs)
        assert "\n" not in str(caught.value)


def test_images_that_were_encoded_before_may_be_asked_one_by_one(several, model):
    _, three = several
    embeddings = model.get_image_embeddings(**three)
    text = {name: three[name][1:] for name in ("input_ids", "attention_mask", "image_index")}
    output = model.segment(**text, image_embeddings=embeddings, max_new_tokens=1)
    assert output.image_index.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_images_are_named_by_whole_numbers(dtype):
    with pytest.raises(ValueError, match="image_index must name one of 2 images for each of 2 rows, got"):
        resolve_image_index(torch.tensor([0, 1]).to(dtype), 2, 2)
    assert resolve_image_index(torch.tensor([1, 0], dtype=torch.int32), 2, 2).tolist() == [1, 0]
