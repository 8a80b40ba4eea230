"""Samples put in words: fixed for evaluation, drawn but repeatable for training, one segment token per mask."""

from dataclasses import replace

import pytest
from miniatures import SIZE, box_mask

from uground.training.data.masks import encode_mask
from uground.training.data.samples import Sample
from uground.training.data.wording import PHRASE_QUESTIONS, Wording, group_samples, join_samples

ONE, TWO = encode_mask(box_mask(0, 0, 4, 4)), encode_mask(box_mask(8, 8, 12, 12))


def sample(number=1, attribute="res", phrases=("Red Cup",), masks=(ONE,), **fields):
    return Sample(f"s-{number}", "a.jpg", SIZE, attribute, tuple(phrases), tuple(masks), **fields)


def words(one, **settings):
    example = Wording(**settings).example(one)
    return example["query"], example["answer"]


def test_evaluation_prompts_are_those_of_the_papers():
    assert words(sample()) == ("What is Red Cup in this image? Please output segmentation mask.", "[SEG].")
    asked = sample(question="What holds tea?", attribute="rs")
    assert words(asked) == ("What holds tea? Please output segmentation mask.", "[SEG].")
    assert words(sample(masks=(None,), attribute="gres"))[1] == "[REJ]."
    assert words(sample(masks=(None,), attribute="fp_res", correction="blue cup"))[1] == "[REJ]."
    several = sample(phrases=("a", "b", "c"), masks=(ONE, None, TWO), attribute="multi_rs")
    assert words(several)[1] == "[SEG], [REJ] and [SEG]."
    talk = sample(phrases=(), masks=(), attribute="vqa", question="Why?", answer="Because.")
    assert words(talk) == ("Why?", "Because.")


def test_an_example_is_in_the_common_schema():
    several = sample(phrases=("a", "b"), masks=(None, TWO), attribute="multi_rs", ignore=ONE, subset="long")
    example = Wording().example(several)
    assert example == {
        "id": "s-1",
        "image": "a.jpg",
        "query": "What is a and b in this image? Please output segmentation mask.",
        "answer": "[REJ] and [SEG].",
        "phrases": ["b"],
        "masks": [TWO],
        "ignore": ONE,
        "attribute": "multi_rs",
        "subset": "long",
    }


def test_training_words_are_drawn_by_seed_and_id():
    training = Wording("training", seed=3)
    drawn = [training.example(sample(number))["query"] for number in range(40)]
    assert drawn == [Wording("training", seed=3).example(sample(number))["query"] for number in range(40)]
    assert drawn != [Wording("training", seed=4).example(sample(number))["query"] for number in range(40)]
    assert set(drawn) == {template.format("red cup") for template in PHRASE_QUESTIONS}
    assert {training.example(sample(number))["answer"].count("[SEG]") for number in range(40)} == {1}


def test_training_answers_to_several_targets():
    several = [sample(number, "multi_rs", ("A", "b", "c"), (ONE, None, TWO)) for number in range(20)]
    answers = {words(one, style="training")[1] for one in several}
    assert answers == {"a is [SEG], b is [REJ] and c is [SEG].", "a, b and c are [SEG], [REJ] and [SEG]."}


@pytest.mark.parametrize("correction", [None, "blue cup"])
def test_false_premises_are_denied_with_or_without_the_token(correction):
    false = sample(attribute="fp_res", masks=(None,), correction=correction)
    with_token = words(false, style="training")[1]
    without = words(false, style="training", rejection="text")[1]
    assert with_token.endswith(": [REJ].") and "red cup" in with_token
    assert without == with_token.replace(": [REJ].", ".")
    assert ("blue cup" in without) == (correction is not None)
    # what is missing in gRES is always rejected by the token
    assert "[REJ]" in words(sample(attribute="gres", masks=(None,)), style="training", rejection="text")[1]


def test_ready_questions_and_answers_are_kept():
    ready = sample(attribute="rs", question="Please segment the cup.", answer="The cup [SEG] is red.")
    assert words(ready, style="training") == ("Please segment the cup.", "The cup [SEG] is red.")
    plain = sample(attribute="rs", question="What holds tea?", answer="The cup [SEG].")
    assert words(plain, style="training")[0].startswith("What holds tea? ")
    with pytest.raises(
        ValueError, match=r"s-1: the answer 'None.' holds 0 \[SEG\], expected one for each of its 1 masks"
    ):
        Wording("training").example(replace(ready, answer="None."))


def test_explanations_are_mixed_in():
    explained = [sample(n, "rs", question="What holds tea?", explanation="It is hollow.") for n in range(400)]
    examples = [Wording("training").example(one) for one in explained]
    text_only = [example for example in examples if example["attribute"] == "vqa"]
    with_reason = [example for example in examples if example["masks"] and "hollow" in example["answer"]]
    assert all(example["answer"] == "It is hollow." and not example["masks"] for example in text_only)
    assert all(example["answer"].count("[SEG]") == 1 for example in with_reason)
    assert 20 < len(text_only) < 65
    assert 130 < len(with_reason) < 230
    assert Wording().example(explained[0])["answer"] == "[SEG]."


def test_samples_of_an_image_are_asked_for_together():
    samples = [sample(n, phrases=(f"thing {n}",), masks=(ONE if n % 2 else None,), attribute="gres") for n in range(7)]
    other = replace(sample(9, phrases=("dog",)), image="b.jpg")
    grouped = group_samples([*samples, other], seed=1, targets_per_query=3)
    assert [len(one.phrases) for one in grouped] == [3, 3, 1, 1]
    assert sorted(phrase for one in grouped[:3] for phrase in one.phrases) == [f"thing {n}" for n in range(7)]
    assert {one.image for one in grouped[:3]} == {"a.jpg"} and grouped[3] == other
    for one in grouped:
        assert [mask is None for mask in one.masks] == [
            int(p[-1]) % 2 == 0 if p[0] == "t" else False for p in one.phrases
        ]
    assert grouped == group_samples([*samples, other], seed=1, targets_per_query=3)
    assert len(group_samples([*samples, other], queries_per_image=2)) == 3
    assert group_samples(samples) == samples


def test_equal_phrases_and_questions_stay_apart():
    twins = [sample(n) for n in range(3)]
    assert [len(one.phrases) for one in group_samples(twins, targets_per_query=3)] == [1, 1, 1]
    asked = [sample(n, phrases=(f"p{n}",), question="Which?") for n in range(2)]
    assert len(group_samples(asked, targets_per_query=3)) == 2
    with pytest.raises(ValueError, match="words of their own"):
        join_samples(asked)
    with pytest.raises(ValueError, match="only samples of one image"):
        join_samples([twins[0], replace(twins[1], image="b.jpg")])


def test_unknown_settings():
    with pytest.raises(ValueError, match="words must be those of evaluation or training, got 'test'"):
        Wording("test")
    with pytest.raises(ValueError, match="rejection must be by token or text, got 'no'"):
        Wording("training", rejection="no")
