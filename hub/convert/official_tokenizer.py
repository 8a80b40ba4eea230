"""The slow LLaMA tokenizer of a released UGround checkpoint as a fast one that gives the same ids.

Two habits of the slow tokenizer of transformers 4.31 matter, because the weights were trained with them: every piece
of text between two added tokens begins with a space of its own ("legacy"), and white space on both sides of an added
token is dropped, so that "is [SEG] ." and "<im_end>\\nWhat" lose theirs.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from uground.hub.weights.weight_files import first_line
from uground.modeling_uground.checkpoint_files import read_json_object

SEGMENT, REJECT, IMAGE = "[SEG]", "[REJ]", "<image>"
BRACKETS = ("<im_start>", "<im_end>")
# Added to LLaMA's vocabulary by the official scripts, in this order.
OFFICIAL_TOKENS = (SEGMENT, REJECT, *BRACKETS)
SPM_FILE, FAST_FILE = "tokenizer.model", "tokenizer.json"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of one of the two kinds."""
    return any((folder / name).is_file() for name in (SPM_FILE, FAST_FILE))


def convert_tokenizer(
    folder: Path, num_rows: int, max_length: int, source: str, brackets: bool = True
) -> PreTrainedTokenizerFast:
    """
    The tokenizer of an official checkpoint, with `<image>` as a new last id.

    Args:
        folder: holds `tokenizer.model` with `added_tokens.json`, or `tokenizer.json`.
        num_rows: rows of the checkpoint's embeddings, one for each of its tokens.
        max_length: most tokens of a row, image tokens included.
        source: what to call the checkpoint in an error.
        brackets: whether the checkpoint puts `<im_start>` and `<im_end>` around its image.

    Raises:
        OSError: a file is absent or damaged.
        ValueError: a token is missing, or there are more or fewer tokens than embeddings.
    """
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"the tokenizer folder {folder} holds no {SPM_FILE} or {FAST_FILE}")
    backend = _read_spm(folder) if (folder / SPM_FILE).is_file() else _read_fast(folder)
    missing = [
        token
        for token in (SEGMENT, *(BRACKETS if brackets else ()))
        if token not in backend.get_vocab(with_added_tokens=True)
    ]
    if missing:
        raise ValueError(
            f"the tokenizer in {folder} lacks {', '.join(missing)}, so it is not that of an official checkpoint"
        )
    count = backend.get_vocab_size(with_added_tokens=True)
    if count != num_rows:
        raise ValueError(f"the tokenizer in {folder} has {count} tokens, but {source} has {num_rows} embeddings")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        padding_side="left",
        # Padding with the unknown token is what the official scripts do.
        **{role: _special_tokens(folder)[source] for role, source in _ROLES.items()},
    )
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    return tokenizer


_ROLES = {"bos_token": "bos_token", "eos_token": "eos_token", "unk_token": "unk_token", "pad_token": "unk_token"}
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def _special_tokens(folder: Path) -> dict[str, str]:
    """Unknown, first and last token: those of LLaMA unless the folder says something else."""
    tokens = dict(_LLAMA_TOKENS)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            for role, token in read_json_object(folder / name).items():
                text = token.get("content") if isinstance(token, dict) else token
                if role in tokens and isinstance(text, str):
                    tokens[role] = text
    return tokens


def _read_spm(folder: Path) -> Tokenizer:
    """The fast equivalent of a sentencepiece model with the tokens that were added to it."""
    path = folder / SPM_FILE
    try:
        model = import_protobuf().ModelProto()
    except ImportError as error:
        raise OSError(f"{path} can be read only with the package protobuf, which is not installed") from error
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's error has another base class in each of its implementations
        raise OSError(f"{path} is no sentencepiece model, or it is damaged ({first_line(error)})") from error
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    names = _special_tokens(folder)
    absent = [token for token in names.values() if token not in vocab]
    if absent:
        raise ValueError(f"{path} holds no {', '.join(absent)}, so it is no tokenizer of LLaMA")
    settings = (
        read_json_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    llama = LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab), legacy=settings.get("legacy") is not False, **names
    )
    backend = llama.backend_tokenizer
    first, number = names["bos_token"], vocab[names["bos_token"]]
    backend.post_processor = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, number)]
    )
    for token, number in sorted(_added_tokens(folder, len(vocab)).items(), key=lambda entry: entry[1]):
        backend.add_tokens([AddedToken(token, lstrip=True, rstrip=True, normalized=False)])
        if backend.token_to_id(token) != number:
            raise ValueError(
                f"the tokenizer in {folder} says that {token} is number {number}, but it would be number "
                f"{backend.token_to_id(token)}"
            )
    return backend


def _added_tokens(folder: Path, num_pieces: int) -> dict[str, int]:
    """Tokens that were added after the sentencepiece model was made, with their ids."""
    tokens = {}
    if (folder / "added_tokens.json").is_file():
        tokens |= read_json_object(folder / "added_tokens.json")
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        tokens |= {token["content"]: int(number) for number, token in decoder.items()}
    return {token: number for token, number in tokens.items() if number >= num_pieces}


def _read_fast(folder: Path) -> Tokenizer:
    """A fast tokenizer, its added tokens made to drop the white space around them."""
    path = folder / FAST_FILE
    content = read_json_object(path)
    for token in content.get("added_tokens", []):
        if token.get("content") in OFFICIAL_TOKENS:
            token |= {"lstrip": True, "rstrip": True, "normalized": False}
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises the base class alone
        raise ValueError(f"{path} is no fast tokenizer ({first_line(error)})") from error
