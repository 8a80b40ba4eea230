"""The slow tokenizer of a released checkpoint becomes a fast one that gives the same ids, in a whole processor."""

import json
import os
import subprocess
import sys

import pytest
from official_case import TINY, convert, refused, write_llama_tokenizer, write_official
from transformers import AutoProcessor, AutoTokenizer

CLIP = TINY / "clip"
OFFICIAL = TINY / "official"
ADDED = ("[SEG]", "[REJ]", "<im_start>", "<im_end>")
VOCAB_SIZE = 120


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """The toy checkpoint with a tokenizer of as many tokens in its own folder, converted."""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_official(folder / "source")
    write_llama_tokenizer(source, VOCAB_SIZE - len(ADDED), ADDED)
    assert convert(source, CLIP, folder / "converted") == 0
    return folder / "converted"


def test_tokens_are_resolved_by_name(with_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    config = json.loads((with_tokenizer / "config.json").read_text())
    assert [tokenizer.convert_tokens_to_ids(token) for token in (*ADDED, "<image>")] == [116, 117, 118, 119, 120]
    assert (config["segment_token_id"], config["reject_token_id"]) == (116, 117)
    assert config["lmm_config"]["image_token_index"] == 120 == len(tokenizer) - 1
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<unk>", 0, "left")
    assert tokenizer.model_max_length == 2048


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Sure, it is [SEG].", ["<s>", "▁Sure", ",", "▁it", "▁is", "[SEG]", "▁", "."]),
        ("Sure, it is[SEG] .", ["<s>", "▁Sure", ",", "▁it", "▁is", "[SEG]", "▁", "."]),
        ("[SEG]  [REJ]\n[SEG]", ["<s>", "[SEG]", "[REJ]", "[SEG]"]),
        ("is [REJ]</s>", ["<s>", "▁is", "[REJ]", "</s>"]),
        ("is </s>it", ["<s>", "▁is", "▁", "</s>", "▁it"]),
        (
            "A: <im_start><image><im_end>\nthe red",
            ["<s>", "▁A", ":", "<im_start>", "<image>", "<im_end>", "▁the", "▁red"],
        ),
    ],
)
def test_white_space_around_added_tokens_is_dropped(with_tokenizer, text, pieces):
    """As the slow tokenizer of transformers 4.31 does, which also begins every piece of text with a space."""
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces


def test_the_processor_is_written(with_tokenizer):
    processor = AutoProcessor.from_pretrained(with_tokenizer, trust_remote_code=True)
    sizes = (processor.image_processor.pad_size["height"], processor.sam_image_processor.pad_size["height"])
    assert sizes == (336, 1024) and processor.patch_size == 14 and processor.num_image_tokens == 576
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt.startswith("A chat between a curious human and an artificial intelligence assistant.")
    assert prompt.endswith("USER: <im_start><image><im_end>\nWhat? ASSISTANT:")


def test_an_existing_fast_tokenizer_is_kept_but_for_the_white_space(tmp_path, with_tokenizer):
    source = write_official(tmp_path / "source")
    content = json.loads((with_tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = [token | {"lstrip": False, "rstrip": False} for token in content["added_tokens"][:-1]]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(content))
    assert convert(source, CLIP, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer") == 0
    texts = ["Sure, it is [SEG] .", "<im_start><image><im_end>\nthe [REJ]"]
    found, expected = (
        AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] for folder in (tmp_path / "out", with_tokenizer)
    )
    assert found == expected


LOAD_ELSEWHERE = """
import sys
sys.modules["uground"] = None
import numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
path = sys.argv[1]
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
inputs = processor(np.zeros((30, 40, 3), np.uint8), "the red", answers="Sure, it is [SEG].")
print(type(model).__name__, type(AutoConfig.from_pretrained(path, trust_remote_code=True)).__name__)
print(tuple(model(**inputs).mask_logits.shape))
pipe = pipeline("referring-segmentation", model=path, trust_remote_code=True)
print(sorted(pipe(np.zeros((30, 40, 3), np.uint8), "the red", max_new_tokens=2)))
"""


def test_it_loads_where_the_package_is_not(with_tokenizer, tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(with_tokenizer)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = ["UGroundForReferringSegmentation UGroundConfig", "(1, 256, 256)", "['answer', 'segments']"]
    assert done.stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (("[REJ]", "<im_start>", "<im_end>"), "lacks [SEG]"),
        (("[SEG]", "[REJ]"), "lacks <im_start>, <im_end>"),
        (("[SEG]", "<im_start>", "<im_end>", "more", "tokens"), "has 121 tokens, but"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tmp_path, capsys, added, message):
    (tmp_path / "tokenizer").mkdir()
    write_llama_tokenizer(tmp_path / "tokenizer", 116, added)
    refused(capsys, message, OFFICIAL, CLIP, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer")


def test_a_damaged_tokenizer(tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    arguments = (OFFICIAL, CLIP, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer")
    refused(capsys, "holds no tokenizer.model or tokenizer.json", *arguments)
    (tmp_path / "tokenizer/tokenizer.json").write_text('{"added_tokens": []}')
    refused(capsys, "tokenizer.json is no fast tokenizer", *arguments)
    (tmp_path / "tokenizer/tokenizer.model").write_bytes(b"\xff\xff not a model")
    refused(capsys, "tokenizer.model is no sentencepiece model", *arguments)
    write_llama_tokenizer(tmp_path / "tokenizer", 116, ADDED)
    (tmp_path / "tokenizer/added_tokens.json").write_text(
        json.dumps({token: 117 + n for n, token in enumerate(ADDED)})
    )
    refused(capsys, "says that [SEG] is number 117, but it would be number 116", *arguments)


def test_ids_that_contradict_the_tokenizer(tmp_path, capsys, with_tokenizer):
    arguments = (OFFICIAL, CLIP, tmp_path / "out")
    flag = ("--segment-token-id", "110")
    (tmp_path / "tokenizer").mkdir()
    write_llama_tokenizer(tmp_path / "tokenizer", 116, ADDED)
    message = "[SEG] was said to be number 110, but the tokenizer says 116"
    refused(capsys, message, *arguments, "--tokenizer", tmp_path / "tokenizer", *flag)
    refused(capsys, "[SEG] must be one of the 120 tokens", *arguments, "--segment-token-id", "120")
