"""How READ's published figures were asked for: words, answers and system prompts, by name.

ReasonSeg and RefCOCO/+/g are teacher-forced with fixed words, under the system prompt of training. FP-RefCOCO/+/g is
generated under another system prompt, that of the default conversation of its script, which the weights never saw. The
official words there are drawn from a list; here they are the fixed ones.
"""

from dataclasses import dataclass

from uground.processing import UGroundProcessor
from uground.training.data.wording import EVALUATION_PHRASE, SEGMENT

READ = "read"
ANSWER = f"Sure, the segmentation result is {SEGMENT}."
REFERRING = ("refcoco", "refcoco+", "refcocog")
FORCED = ("reasonseg", *REFERRING, *(f"{name}-unified" for name in REFERRING))
GENERATED = ("fprefcoco", "fprefcoco+", "fprefcocog")
SYSTEM_PROMPTS = {
    name: f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
    f"detailed, and polite answers to the {who}'s questions."
    for name, who in (("llava_v1", "human"), ("vicuna_v1", "user"))
}


@dataclass(frozen=True)
class Asking:
    """
    How a model is asked under a protocol.

    Attributes:
        figures: name of the protocol that makes figures of the counts.
        style: `"generate"` or `"teacher-forced"`.
        system: a key of `SYSTEM_PROMPTS`.
        answer: what is forced.
    """

    figures: str
    style: str
    system: str
    answer: str = ANSWER

    @property
    def system_prompt(self) -> str:
        """The text of the system prompt."""
        return SYSTEM_PROMPTS[self.system]

    def example(self, example: dict) -> dict:
        """The example with the names in its query in lower case, and with the answer that is forced."""
        before, after = EVALUATION_PHRASE.split("{}")
        query = example["query"]
        if query.startswith(before) and query.endswith(after):
            query = EVALUATION_PHRASE.format(query[len(before) : -len(after)].lower())
        forced = {"answer": self.answer} if SEGMENT in example["answer"] else {}
        return {**example, "query": query, **forced}


def read_asking(dataset: str) -> Asking:
    """
    How READ is asked about a dataset, named with or without `:SPLIT`.

    Raises:
        ValueError: no figures of READ are published for it.
    """
    name = dataset.partition(":")[0]
    if name in FORCED:
        return Asking("lisa", "teacher-forced", "llava_v1")
    if name in GENERATED:
        return Asking("sesame", "generate", "vicuna_v1")
    raise ValueError(f"protocol {READ} is for {', '.join((*FORCED, *GENERATED))}, got {dataset!r}")


def with_system_prompt(processor: UGroundProcessor, query: str, system_prompt: str) -> str:
    """A whole prompt of one query behind another system prompt than the template's own."""
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": system_prompt}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query}]},
    ]
    return processor.apply_chat_template(conversation, add_generation_prompt=True)
