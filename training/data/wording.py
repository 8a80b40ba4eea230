"""From samples to examples: the query that asks and the answer that is wanted, by templates.

Evaluation words are fixed, those that published figures were measured with. Training words are drawn from lists,
seeded by the sample's id, so that an example does not depend on the order in which samples are read.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from uground.training.data.reason_reader import enumerate_phrases
from uground.training.data.samples import Sample

SEGMENT, REJECT = "[SEG]", "[REJ]"

EVALUATION_SENTENCE = "{} Please output segmentation mask."
EVALUATION_PHRASE = "What is {} in this image? Please output segmentation mask."

PHRASE_QUESTIONS = (
    "What is {} in this image? Please output segmentation mask.",
    "Can you segment {} in this image?",
    "Please segment {}.",
    "Where is {}? Answer with a segmentation mask.",
    "Show me {} in the picture as a mask.",
)
SENTENCE_QUESTIONS = (
    "{} Please output segmentation mask.",
    "{} Please respond with a segmentation mask.",
    "{} Mark it in the image.",
)
EXPLAINING_QUESTIONS = (
    "{} Please output segmentation mask and explain why.",
    "{} Please output segmentation mask and give your reason.",
    "{} Answer with a mask, then explain the answer.",
)
SINGLE_ANSWERS = (
    "It is {seg}.",
    "Sure, {seg}.",
    "Sure, it is {seg}.",
    "Sure, the segmentation result is {seg}.",
    "{seg}.",
)
DENIALS = ("There is no {} in this image", "I cannot find {} here", "The image does not show {}")
CORRECTIONS = ("There is no {} in this image, but there is {}", "The image does not show {}, but {}")

# A question that asks for a mask in its own words gets no second request.
ASKS_FOR_MASK = re.compile(r"\b(segment\w*|masks?|outline\w*|highlight\w*|mark(?:ed|ing|s)?)\b", re.IGNORECASE)

# Of samples with an explanation: how many are answered by it alone, and how many of the others with it.
TEXT_ONLY_SHARE = 0.1
EXPLAINED_SHARE = 0.5


class Wording:
    """
    Puts samples in words.

    Args:
        style: `"evaluation"` for the fixed prompts, `"training"` for drawn ones.
        seed: of the draws.
        rejection: how a false premise is answered in training: `"token"` denies and writes `[REJ]`, `"text"` denies
            in words alone, as the official training data do. An absent target of gRES is always `[REJ]`.

    Raises:
        ValueError: an unknown style or rejection.
    """

    def __init__(self, style: str = "evaluation", seed: int = 0, rejection: str = "token"):
        if style not in ("evaluation", "training"):
            raise ValueError(f"words must be those of evaluation or training, got {style!r}")
        if rejection not in ("token", "text"):
            raise ValueError(f"rejection must be by token or text, got {rejection!r}")
        self.style, self.seed, self.rejection = style, seed, rejection

    def example(self, sample: Sample) -> dict:
        """
        The example of a sample, in the common schema but for its image, which is not opened yet.

        Besides the schema's keys it has `subset`. `answer` holds one segment token per mask, in order; `phrases` are
        those of the masks.
        """
        rng = random.Random(f"{self.seed} {sample.id}")
        sample, query, answer = self._evaluation(sample) if self.style == "evaluation" else self._training(sample, rng)
        there = [(phrase, mask) for phrase, mask in zip(sample.phrases, sample.masks, strict=True) if mask is not None]
        if answer.count(SEGMENT) != len(there):
            raise ValueError(
                f"{sample.id}: the answer {answer!r} holds {answer.count(SEGMENT)} {SEGMENT}, expected one for each "
                f"of its {len(there)} masks"
            )
        return {
            "id": sample.id,
            "image": sample.image,
            "query": query,
            "answer": answer,
            "phrases": [phrase for phrase, _ in there],
            "masks": [mask for _, mask in there],
            "ignore": sample.ignore,
            "attribute": sample.attribute,
            "subset": sample.subset,
        }

    def _evaluation(self, sample: Sample) -> tuple[Sample, str, str]:
        if sample.attribute == "vqa":
            return sample, sample.question, sample.answer
        if sample.question is not None:
            query = EVALUATION_SENTENCE.format(sample.question)
        else:
            query = EVALUATION_PHRASE.format(enumerate_phrases(list(sample.phrases)))
        marks = [REJECT if mask is None else SEGMENT for mask in sample.masks] or [REJECT]
        return sample, query, enumerate_phrases(marks) + "."

    def _training(self, sample: Sample, rng: random.Random) -> tuple[Sample, str, str]:
        if sample.attribute == "vqa":
            return sample, sample.question, sample.answer
        if sample.explanation and sample.attribute != "fp_res":
            return self._explained(sample, rng)
        answer = sample.answer if sample.answer is not None else self._answer(sample, rng)
        return sample, self._question(sample, rng), answer

    def _question(self, sample: Sample, rng: random.Random) -> str:
        if sample.question is None:
            return rng.choice(PHRASE_QUESTIONS).format(enumerate_phrases([text.lower() for text in sample.phrases]))
        if ASKS_FOR_MASK.search(sample.question):
            return sample.question
        return rng.choice(SENTENCE_QUESTIONS).format(sample.question)

    def _explained(self, sample: Sample, rng: random.Random) -> tuple[Sample, str, str]:
        asked = sample.question or f"What is {sample.phrases[0].lower()} in this image?"
        if rng.random() < TEXT_ONLY_SHARE:
            return replace(sample, attribute="vqa", phrases=(), masks=(), ignore=None), asked, sample.explanation
        answer = self._answer(sample, rng)
        if rng.random() < EXPLAINED_SHARE:
            return sample, rng.choice(EXPLAINING_QUESTIONS).format(asked), f"{answer} {sample.explanation}"
        return sample, self._question(sample, rng), answer

    def _answer(self, sample: Sample, rng: random.Random) -> str:
        if sample.attribute == "fp_res":
            return self._refusal(sample, rng)
        marks = [REJECT if mask is None else SEGMENT for mask in sample.masks]
        phrases = [text.lower() for text in sample.phrases]
        if not marks:
            return f"There is none: {REJECT}."
        if len(marks) == 1 and marks[0] == REJECT:
            return f"{rng.choice(DENIALS).format(phrases[0])}: {REJECT}."
        if len(marks) == 1:
            return rng.choice(SINGLE_ANSWERS).format(seg=marks[0])
        if rng.random() < 0.5:
            return enumerate_phrases([f"{a} is {b}" for a, b in zip(phrases, marks, strict=True)]) + "."
        return f"{enumerate_phrases(phrases)} are {enumerate_phrases(marks)}."

    def _refusal(self, sample: Sample, rng: random.Random) -> str:
        phrase = sample.phrases[0].lower()
        if sample.explanation:
            words = sample.explanation.strip()
            return words if self.rejection == "text" else f"{words} {REJECT}."
        if sample.correction:
            words = rng.choice(CORRECTIONS).format(phrase, sample.correction.lower())
        else:
            words = rng.choice(DENIALS).format(phrase)
        return f"{words}." if self.rejection == "text" else f"{words}: {REJECT}."


def join_samples(samples: Sequence[Sample]) -> Sample:
    """
    Several samples of one image as one query for all their targets, "a, b and c".

    Raises:
        ValueError: they are not about one image, or one of them has a question or an answer of its own.
    """
    first = samples[0]
    if len(samples) == 1:
        return first
    if any(sample.image != first.image for sample in samples):
        raise ValueError(f"only samples of one image can be asked for at once, got {[s.id for s in samples]}")
    if not all(map(is_joinable, samples)):
        raise ValueError(f"samples with words of their own cannot be asked for at once, got {[s.id for s in samples]}")
    return Sample(
        id="+".join(sample.id for sample in samples),
        image=first.image,
        size=first.size,
        attribute="multi_rs",
        phrases=tuple(phrase for sample in samples for phrase in sample.phrases),
        masks=tuple(mask for sample in samples for mask in sample.masks),
        ignore=first.ignore,
    )


def is_joinable(sample: Sample) -> bool:
    """Whether templates ask for and answer a sample, so that it may be one of several targets."""
    return sample.question is None and sample.answer is None and sample.attribute in ("res", "gres")


def group_samples(
    samples: Sequence[Sample], seed: int = 0, targets_per_query: int = 1, queries_per_image: int | None = None
) -> list[Sample]:
    """
    Draw what is asked about each image.

    Args:
        samples: of any number of images.
        seed: of the draws.
        targets_per_query: so many samples are joined into one query at most; equal phrases never meet in one.
        queries_per_image: so many queries are kept of an image at most; all by default.

    Returns:
        Samples, images in the order of their first sample. With the default numbers, the samples as they are.
    """
    if targets_per_query == 1 and queries_per_image is None:
        return list(samples)
    images: dict[str, list[Sample]] = {}
    for sample in samples:
        images.setdefault(str(sample.image), []).append(sample)
    grouped = []
    for image, asked in images.items():
        rng = random.Random(f"{seed} {image}")
        rng.shuffle(asked)
        queries: list[list[Sample]] = []
        for sample in asked:
            fitting = next((query for query in queries if _fits(query, sample, targets_per_query)), None)
            if fitting is None:
                queries.append(fitting := [])
            fitting.append(sample)
        grouped += [join_samples(query) for query in queries[:queries_per_image]]
    return grouped


def _fits(query: list[Sample], sample: Sample, targets_per_query: int) -> bool:
    phrases = {phrase for one in query for phrase in one.phrases}
    return (
        len(query) < targets_per_query
        and all(map(is_joinable, [*query, sample]))
        and phrases.isdisjoint(sample.phrases)
    )
