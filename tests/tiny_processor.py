"""A word-level tokenizer and a processor for the models of `tiny.py`, and a way to make these write a given answer."""

import numpy as np
import torch
from tiny import END_TOKEN
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from uground.processing import UGroundProcessor, letterbox_image_processor, make_image_processor

# Ids 0 to 36; `[REJ]`, `[SEG]` and `<image>` follow.
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "the", "red", "blue", "cup", "tree", "boat", "is", "are", "it", "and"]
WORDS += [".", ",", ":", "USER", "ASSISTANT", "what", "can", "swim", "fish", *(f"w{number}" for number in range(13))]
# Short enough for the 256 positions of the tiny model, with everything that makes a template.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER : ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT : ' + message['content'][0]['text'] + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)


def tiny_tokenizer(tokens=("[REJ]", "[SEG]"), max_length: int = 200) -> PreTrainedTokenizerFast:
    """Words are tokens; everything else is `<unk>`. With both tokens, ids are those of `tiny.py`."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=max_length,
    )
    fast.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    fast.add_tokens(["<image>"], special_tokens=True)
    return fast


def tiny_processor(tokenizer=None, chat_template=TEMPLATE, frame="letterbox") -> UGroundProcessor:
    """32-pixel LMM images with patches of 8, 64-pixel SAM frames, as `tiny.tiny_config` wants them."""
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    return UGroundProcessor(
        make_image_processor(frame, 32),
        letterbox_image_processor(64),
        tokenizer,
        patch_size=8,
        chat_template=chat_template,
    )


def gradient_image(height: int, width: int) -> np.ndarray:
    """An `(H, W, 3)` uint8 picture whose rows and columns all differ."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 200 // height, columns * 200 // width, (rows + columns) % 251], axis=-1).astype(np.uint8)


class Script(LogitsProcessor):
    """Makes every row write the same tokens, whatever the model would: `[SEG]` included."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.start = None

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        step = input_ids.shape[1] - self.start
        token = self.tokens[step]
        if step == len(self.tokens) - 1:
            self.start = None
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


def write(processor, answer: str) -> dict:
    """Generation arguments that make a model write `answer` and stop."""
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"] + [END_TOKEN]
    return {"logits_processor": LogitsProcessorList([Script(ids)]), "max_new_tokens": len(ids)}


# As Qwen-VL writes a conversation, without the system's turn.
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ids of `tiny_families.py`, in the places of words that nobody needs.
QWEN_TOKENS = {
    33: "<|im_start|>",
    34: "<|vision_end|>",
    35: "<|vision_start|>",
    36: "<|video_pad|>",
    39: "<|image_pad|>",
    2: "<|im_end|>",
}


def qwen_tokenizer(tokens=("[REJ]", "[SEG]")) -> PreTrainedTokenizerFast:
    """Words are tokens, `user` and `assistant` too; the special tokens are Qwen's, with the ids of `tiny_families`."""
    words = [word for number, word in enumerate(WORDS) if number not in QWEN_TOKENS]
    words[words.index("USER")], words[words.index("ASSISTANT")] = "user", "assistant"
    names = {37 + place: token for place, token in enumerate(tokens)}
    rest = iter(words)
    vocabulary = {
        QWEN_TOKENS.get(number) or names.get(number) or next(rest, f"x{number}"): number for number in range(40)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=200,
        chat_template=QWEN_TEMPLATE,
    )
    fast.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    fast.add_tokens(list(QWEN_TOKENS.values()), special_tokens=True)
    return fast


def qwen_image_processor() -> Qwen2VLImageProcessorPil:
    """Tokens of 8 pixels, at most 20 of them."""
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 4 * 64, "longest_edge": 20 * 64}
    )


def qwen_processor() -> UGroundProcessor:
    """For the Qwen-VL models of `tiny_families.py`."""
    return UGroundProcessor(
        qwen_image_processor(), letterbox_image_processor(64), qwen_tokenizer(), image_token="<|image_pad|>"
    )
