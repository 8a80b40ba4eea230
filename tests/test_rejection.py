"""The rejection rule, by itself and through the pipeline."""

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor, write

from uground.modeling_uground import UGroundConfig
from uground.processing import ReferringSegmentationPipeline
from uground.processing.rejection import is_rejected, map_peak
from uground.training.evaluation.predictions import predict

CASES = {
    "the token": ("[REJ].", [], 0.5, True),
    "words only": ("it is a cup.", [], 0.5, False),
    "nothing": ("", [], 0.5, False),
    "a strong one": ("it is [SEG].", [0.7], 0.5, False),
    "exactly at the threshold": ("it is [SEG].", [0.5], 0.5, False),
    "a weak one": ("it is [SEG].", [0.49], 0.5, True),
    "one of two is strong": ("[SEG] and [SEG].", [0.1, 0.6], 0.5, False),
    "all are weak": ("[SEG] and [SEG].", [0.1, 0.2], 0.5, True),
    "one found, one rejected": ("the cup is [SEG], the tree is [REJ].", [0.7], 0.5, False),
    "one weak, one rejected": ("the cup is [SEG], the tree is [REJ].", [0.2], 0.5, True),
    "the token alone": ("it is [SEG].", [0.0], 0.0, False),
}


@pytest.mark.parametrize("answer, peaks, threshold, expected", CASES.values(), ids=CASES)
def test_the_rule(answer, peaks, threshold, expected):
    assert is_rejected(answer, peaks, "[REJ]", threshold) is expected


def test_the_token_may_have_another_name():
    assert is_rejected("<none>", [], "<none>") and not is_rejected("[REJ]", [], "<none>")


def test_a_pipeline_leaves_out_weak_queries_only():
    pipe = ReferringSegmentationPipeline(
        model=tiny_model(3), processor=tiny_processor(), task="referring-segmentation", device=-1
    )
    answer = "the cup is [SEG] and a boat is [SEG] ."

    def ask(**settings):
        return pipe(gradient_image(30, 50), "fish", generate_kwargs=write(pipe.processor, answer), **settings)

    found = ask(return_similarity=True)
    low, high = sorted(map_peak(segment["similarity_map"]) for segment in found["segments"])
    assert 0 < low < high < 1
    # Between the two one map is strong, so both segments stay.
    assert len(ask(reject_threshold=(low + high) / 2)["segments"]) == 2
    assert ask(reject_threshold=(high + 1) / 2) == {"answer": found["answer"], "segments": []}
    pipe.model.config.reject_threshold = (high + 1) / 2
    assert ask()["segments"] == [] and len(ask(reject_threshold=0.0)["segments"]) == 2
    pipe.model.config.reject_threshold = 0.0
    pipe.model.config.similarity_scaling = "minmax"
    with pytest.raises(ValueError, match="reject_threshold needs a model with similarity_scaling='scaled'.*'minmax'"):
        ask(reject_threshold=0.5)


def test_the_peak_is_the_probability_of_the_surest_token():
    assert map_peak(np.array([[-3.0, 0.0], [-1.0, -2.0]])) == 0.5
    assert map_peak(np.array([[2.0, 0.0]])) == pytest.approx(0.8807970779)
    assert map_peak(np.array([[1e6]])) == pytest.approx(1) and map_peak(np.array([[-1e6]])) == pytest.approx(0)


def test_the_threshold_is_the_checkpoints(tmp_path):
    assert UGroundConfig().reject_threshold == 0.0
    UGroundConfig(reject_threshold=0.9).save_pretrained(tmp_path)
    assert UGroundConfig.from_pretrained(tmp_path).reject_threshold == 0.9
    for wrong in (1.5, -0.1, "high", True):
        with pytest.raises((ValueError, TypeError), match="reject_threshold"):
            UGroundConfig(reject_threshold=wrong)
    with pytest.raises(ValueError, match="reject_threshold needs similarity_scaling 'scaled'.*'minmax'"):
        UGroundConfig(reject_threshold=0.5, similarity_scaling="minmax")


def test_evaluation_rejects_by_the_checkpoints_threshold(monkeypatch):
    model, processor = tiny_model(3), tiny_processor()
    image = Image.fromarray(gradient_image(30, 50))
    written, script = model.write_answers, write(processor, "it is [SEG] .")
    monkeypatch.setattr(model, "write_answers", lambda *inputs, max_new_tokens: written(*inputs, **script))
    example = {"id": "a", "image": image, "query": "fish", "answer": "it is [SEG] .", "masks": [], "attribute": "res"}
    kept = predict(model, processor, [example], ["last"])["last"][0]
    model.config.reject_threshold = 1.0
    weak = predict(model, processor, [example], ["last"])["last"][0]
    assert kept.rejected == [False] and weak.rejected == [True]
    assert (kept.masks == weak.masks).all()


def test_presence_is_weak_by_itself_or_with_the_map():
    """A segment is weak by either measure, and an answer is rejected if all of its segments are."""
    rule = {"threshold": 0.5, "presence_threshold": 0.5}
    assert is_rejected("it is [SEG].", [0.9], presences=[0.4], **rule)
    assert not is_rejected("it is [SEG].", [0.9], presences=[0.6], **rule)
    assert is_rejected("[SEG] and [SEG].", [0.9, 0.4], presences=[0.4, 0.9], **rule)
    assert not is_rejected("[SEG] and [SEG].", [0.9, 0.4], presences=[0.6, 0.1], **rule)
    assert not is_rejected("it is [SEG].", [0.9], presences=[0.4], threshold=0.5, presence_threshold=0)
