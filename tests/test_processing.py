"""The processor: tensors for the model, and refusals in one sentence."""

import base64
import functools
import struct
import threading
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_processor import WORDS, gradient_image, tiny_processor, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessorPil, PreTrainedTokenizerFast, ViTImageProcessorPil

from uground.processing import (
    UGroundProcessor,
    crop_image_processor,
    image_reading,
    letterbox_image_processor,
    read_image,
)
from uground.processing.prompt_format import PromptFormat
from uground.processing.query_layout import match_answers, pair_images_with_queries

MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
OFFICIAL_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def test_batch_has_the_contract_of_the_model(processor):
    images = [gradient_image(20, 40), gradient_image(48, 24)]
    batch = processor(images, [["the red cup", "a tree"], ["the blue boat is what"]])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 25),
        "attention_mask": (3, 25),
        "image_index": (3,),
        "pixel_values": (2, 3, 32, 32),
        "valid_sizes": (2, 2),
        "sam_pixel_values": (2, 3, 64, 64),
        "sam_valid_sizes": (2, 2),
        "original_sizes": (2, 2),
    }
    assert list(batch) and set(batch) == set(processor.model_input_names)
    assert batch["image_index"].tolist() == [0, 0, 1]
    assert batch["original_sizes"].tolist() == [[20, 40], [48, 24]]
    assert batch["valid_sizes"].tolist() == [[16, 32], [32, 16]]
    assert batch["sam_valid_sizes"].tolist() == [[32, 64], [64, 32]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16, 16]
    assert batch["attention_mask"].sum(1).tolist() == [23, 22, 25]
    assert batch["input_ids"][1, :3].tolist() == [processor.tokenizer.pad_token_id] * 3


def test_padding_does_not_change_a_row(processor):
    image, queries = gradient_image(20, 40), ["the red cup", "a tree and the blue boat"]
    together = processor(image, queries)
    for row, query in enumerate(queries):
        alone = processor(image, query)["input_ids"][0]
        assert torch.equal(together["input_ids"][row, -len(alone) :], alone)


def test_letterbox_by_hand():
    """Two columns 0 and 100 enlarged to four: 0, 25, 75, 100; then padding of zeros after normalising."""
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[:, 1] = 100
    wide = np.concatenate([image, image], axis=1)[:1].repeat(2, axis=0)
    features = letterbox_image_processor(4)([Image.fromarray(image), Image.fromarray(wide)])
    enlarged, kept = (torch.tensor(pixels) for pixels in features["pixel_values"])
    row = (torch.tensor([0.0, 25.0, 75.0, 100.0]) - MEAN[:, None]) / STD[:, None]
    assert torch.allclose(enlarged, row[:, None].expand(3, 4, 4), atol=1e-6)
    row = (torch.tensor([0.0, 100.0, 0.0, 100.0]) - MEAN[:, None]) / STD[:, None]
    assert torch.allclose(kept[:, :2], row[:, None].expand(3, 2, 4), atol=1e-6)
    assert (kept[:, 2:] == 0).all()
    assert [tuple(size) for size in features["reshaped_input_sizes"]] == [(4, 4), (2, 4)]


@pytest.mark.parametrize(
    ("size", "valid"), [((3, 8), (12, 32)), ((5, 32), (5, 32)), ((7, 50), (4, 32)), ((33, 32), (32, 31))]
)
def test_valid_sizes_round_half_up(processor, size, valid):
    assert processor(gradient_image(*size), "a")["valid_sizes"].tolist() == [list(valid)]


def test_answers_give_labels_of_the_answer_only(processor):
    image = gradient_image(20, 40)
    batch = processor(image, ["the red cup", "a tree"], answers=["it is [SEG] .", "[REJ]"])
    eos = processor.tokenizer.eos_token_id
    segment, reject = processor.segment_token_id, processor.reject_token_id
    words = [WORDS.index(word) for word in ("it", "is", ".")]
    for row, expected in enumerate([[*words[:2], segment, words[2], eos], [reject, eos]]):
        labels = batch["labels"][row]
        start = len(labels) - len(expected)
        assert labels[:start].tolist() == [-100] * start
        assert labels[start:].tolist() == expected == batch["input_ids"][row, start:].tolist()
    prompt = processor(image, "the red cup")["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(prompt)], prompt)


def test_apply_chat_template_as_in_transformers(processor):
    picture = Image.fromarray(gradient_image(20, 40))
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "the red cup"}]}
    ]
    direct = processor(picture, "the red cup")
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    for given in (conversation, [conversation]):
        templated = processor.apply_chat_template(given, tokenize=True, return_dict=True, **options)
        assert all(torch.equal(templated[name], direct[name]) for name in direct)
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert torch.equal(processor(images=picture, text=prompt)["input_ids"], direct["input_ids"])


def test_history_of_several_turns(processor):
    picture = Image.fromarray(gradient_image(20, 40))
    history = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cup"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "it is [SEG]"}]},
        {"role": "user", "content": [{"type": "text", "text": "a tree"}]},
    ]
    prompt = processor.apply_chat_template(history, add_generation_prompt=True)
    ids = processor(picture, prompt)["input_ids"][0].tolist()
    assert ids.count(processor.segment_token_id) == 1 and ids.count(processor.image_token_id) == 16
    labels = processor(picture, prompt, answers="[REJ]")["labels"][0].tolist()
    assert [label for label in labels if label != -100] == [
        processor.reject_token_id,
        processor.tokenizer.eos_token_id,
    ]


def test_default_template_is_the_official_line():
    brackets = tiny_processor(tiny_tokenizer(("[SEG]", "[REJ]", "<im_start>", "<im_end>")), chat_template=None)
    form = PromptFormat.of(brackets)
    assert form.first == f"{OFFICIAL_SYSTEM} USER: <im_start><image><im_end>\n"
    assert (form.generation, form.before_answer, form.after_answer) == (" ASSISTANT:", " ", "</s>")
    assert form.next_turn == "</s>USER: "
    plain = tiny_processor(chat_template=None)
    assert PromptFormat.of(plain).first == f"{OFFICIAL_SYSTEM} USER: <image>\n"
    system = [{"role": "system", "content": "a cup ."}, {"role": "user", "content": "what"}]
    assert plain.apply_chat_template(system, add_generation_prompt=True) == "a cup . USER: what ASSISTANT:"


def test_save_and_load_are_exact(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "UGroundProcessor"
    settings = [
        {name: value for name, value in each.to_dict().items() if name != "auto_map"} for each in (loaded, processor)
    ]
    assert settings[0] == settings[1] and settings[0]["sam_image_processor"]["size"] == {"longest_edge": 64}
    assert loaded.chat_template == processor.chat_template == (tmp_path / "chat_template.jinja").read_text()
    inputs = (gradient_image(20, 40), ["the red cup", "a tree"], ["it is [SEG]", "[REJ]"])
    before, after = processor(*inputs), loaded(*inputs)
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_loading_from_a_folder_without_processor_says_so(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds no UGround processor.*got \\[\\]"):
        UGroundProcessor.from_pretrained(tmp_path)


# Tokens


def test_reject_token_may_be_absent():
    assert tiny_processor(tiny_tokenizer(("[SEG]",))).reject_token_id is None


def test_segment_token_must_be_known():
    with pytest.raises(ValueError, match=r"\[SEG\] as exactly one id"):
        tiny_processor(tiny_tokenizer(("[REJ]",)))


@pytest.mark.parametrize("torn", ["[SEG]", "[REJ]"])
def test_token_torn_apart_in_text_is_refused(torn):
    """A token in the vocabulary that the pre-tokenizer splits has an id, but no text is ever read as it."""
    names = ["<unk>", "<pad>", "</s>", "a", ".", torn]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens([token for token in ("[SEG]", "[REJ]", "<image>") if token != torn])
    with pytest.raises(ValueError, match=rf"\{torn} as exactly one id"):
        tiny_processor(tokenizer)


def test_other_image_processors_are_refused():
    with pytest.raises(ValueError, match="image_processor.*got ViTImageProcessorPil"):
        UGroundProcessor(ViTImageProcessorPil(), letterbox_image_processor(64), tiny_tokenizer())
    with pytest.raises(ValueError, match="sam_image_processor.* must make a letterbox or a stretch, got centre_crop"):
        UGroundProcessor(letterbox_image_processor(28), crop_image_processor(64), tiny_tokenizer())
    uneven = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 14})
    with pytest.raises(ValueError, match="must scale the shortest side and cut a square of the same side out"):
        UGroundProcessor(uneven, letterbox_image_processor(64), tiny_tokenizer())


# Images


def test_exif_orientation_is_applied(processor, tmp_path):
    upright = Image.fromarray(gradient_image(20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for given in (tmp_path / "turned.png", str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        batch = processor(given, "a")
        assert batch["original_sizes"].tolist() == [[20, 40]]
        assert torch.equal(batch["pixel_values"], processor(upright, "a")["pixel_values"])


def test_every_kind_of_image_reads_the_same():
    array = gradient_image(6, 9)
    tensor = torch.tensor(array)
    for given in (
        array,
        array / 255.0,
        np.moveaxis(array, -1, 0),
        array.astype(np.uint16) * 257,
        array.astype(np.int64),
        tensor,
        tensor.permute(2, 0, 1),
        (tensor.permute(2, 0, 1) / 255).double(),
        Image.fromarray(array).convert("RGBA"),
    ):
        assert np.array_equal(np.asarray(read_image(given)), array)


def test_grey_and_transparent_modes():
    grey = Image.fromarray(gradient_image(6, 9)[..., 0])
    expected = np.asarray(grey.convert("RGB"))
    for mode in ("L", "LA", "RGBA", "F", "I", "P"):
        assert np.array_equal(np.asarray(read_image(grey.convert(mode))), expected), mode
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert sixteen.mode == "I;16" and np.array_equal(np.asarray(read_image(sixteen)), expected)
    assert np.array_equal(np.asarray(read_image(np.asarray(grey))), expected)
    assert np.unique(np.asarray(read_image(grey.convert("1")))).tolist() == [0, 255]
    clear = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    assert (np.asarray(read_image(clear)) == 255).all()
    half = Image.new("LA", (4, 3), (100, 128))
    expected = np.asarray(read_image(half)).astype(int)
    assert np.abs(np.asarray(read_image(half.convert("La"))) - expected).max() <= 1


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path):
    """The URL that `tmp_path` is served at."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_and_data_uris_read_as_paths(site, tmp_path):
    grey = gradient_image(6, 9)[..., 0]
    pictures = {
        "clear": Image.fromarray(np.dstack([gradient_image(6, 9), grey])),
        "deep grün": Image.fromarray(grey.astype(np.uint16) * 257),
        "plain": Image.fromarray(gradient_image(6, 9)),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    for stem, picture in pictures.items():
        path = tmp_path / f"{stem}.png"
        picture.save(path, exif=exif)
        expected = np.asarray(read_image(path))
        assert expected.shape == (9, 6, 3)
        assert np.array_equal(np.asarray(read_image(f"{site}/{stem}.png")), expected)
        encoded = base64.b64encode(path.read_bytes()).decode()
        for content in (encoded, encoded.replace("+", "%2B")):
            assert np.array_equal(np.asarray(read_image(f"data:image/png;base64,{content}")), expected)
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep grün.png").rotate(90, expand=True))[..., 0], grey)


def test_unusable_urls_are_named(site, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler) as closed:
        port = closed.server_address[1]
    (tmp_path / "text.png").write_text("not a picture")
    for url, reason in (
        (f"http://127.0.0.1:{port}/a.png", "cannot be loaded: .*refused"),
        (f"{site}/nowhere.png", "cannot be loaded: HTTP Error 404: File not found"),
        (f"{site}/text.png", "cannot be read: it is no known image format"),
        ("http://127.0.0.1:x/a.png", "cannot be loaded: nonnumeric port: 'x'"),
        ("data:image/png;base64,abc", "cannot be loaded: Incorrect padding"),
        ("data:image/png;base64", "cannot be read: it is no known image format"),
    ):
        with pytest.raises(OSError, match=f"the image '{url}' {reason}") as caught:
            read_image(url)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(image_reading, "MAX_URL_BYTES", 5)
    with pytest.raises(ValueError, match="text.png' is too large: expected at most 5 bytes, got more"):
        read_image(f"{site}/text.png")


@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 5, 3), (5, 1, 3), (1, 1)])
def test_images_without_extent_are_refused(processor, shape):
    with pytest.raises(ValueError, match="at least 2 pixels wide and high, got"):
        processor(np.zeros(shape, dtype=np.uint8), "a")
    with pytest.raises(ValueError, match="at least 2 pixels wide and high, got"):
        processor(Image.new("RGB", shape[1::-1]), "a")


def test_elongated_image_is_refused(processor):
    with pytest.raises(ValueError, match="short side vanishes at 32 pixels, got 200 wide and 2 high"):
        processor(gradient_image(2, 200), "a")


def test_missing_unreadable_and_truncated_files_are_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png' does not exist"):
        processor(tmp_path / "nowhere.png", "a")
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        processor(str(tmp_path), "a")
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(OSError, match=r"text.png' cannot be read: it is no known image format"):
        processor(text, "a")
    for suffix in ("png", "jpg"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(gradient_image(64, 64)).save(whole)
        content = whole.read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(content[:-100])
        with pytest.raises(OSError, match=f"cut.{suffix}' cannot be read: .*[tT]runcated"):
            processor(cut, "a")
        with pytest.raises(OSError, match=f"cut.{suffix}' cannot be read: .*[tT]runcated"):
            processor(Image.open(cut), "a")


class Broken(Image.Image):
    """An image whose decoder fails when its pixels are asked for, as Pillow's formats do in their own ways."""

    filename = "broken.avif"

    def __init__(self, error):
        super().__init__()
        self._size, self._mode, self._error = (8, 8), "RGB", error

    def load(self):
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to decode frame 0"),
        SyntaxError("broken PNG file"),
        struct.error("unpack requires a buffer of 4 bytes"),
        EOFError("no more images"),
        ValueError("bad value"),
        MemoryError(),
        zlib.error("Error -3 while decompressing"),
        OverflowError("too large to convert"),
        IndexError("index out of range"),
        KeyError("mode"),
        TypeError("an integer is required"),
    ],
)
def test_whatever_a_decoder_raises_names_the_image(processor, tmp_path, monkeypatch, error):
    path = tmp_path / "broken.avif"
    path.write_bytes(b"anything")
    monkeypatch.setattr(image_reading.Image, "open", lambda _: Broken(error))
    for given in (path, str(path), Broken(error)):
        with pytest.raises(OSError, match=r"the image '.*broken.avif' cannot be read: \S") as caught:
            processor(given, "a")
        assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_picture_bombs_and_names_too_long_are_refused(processor, tmp_path, monkeypatch):
    Image.fromarray(gradient_image(40, 40)).save(tmp_path / "bomb.png")
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        processor("iVBORw0KGgo" * 1000, "a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb.png' is too large: Image size \(1600 pixels\) exceeds limit"):
        processor(tmp_path / "bomb.png", "a")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4), "x"), "must hold real numbers, got <U1"),
        (np.full((4, 4), 1j), "must hold real numbers, got complex128"),
        (np.full((4, 4), None), "must hold real numbers, got object"),
        (torch.zeros(4, 4, dtype=torch.complex64), "a dense tensor of real numbers, got one of torch.complex64"),
        (torch.zeros(4, 4, device="meta"), "a dense tensor of real numbers"),
        (torch.eye(4).to_sparse(), "a dense tensor of real numbers, got one of torch.float32, torch.sparse_coo"),
        (np.full((4, 4, 3), 2.0), r"float64 values within 0..1, got 2..2"),
        (np.full((4, 4, 3), np.nan), r"float64 values within 0..1, got nan..nan"),
        (np.full((4, 4), 300), r"int64 values within 0..255, got 300..300"),
        (np.zeros((5, 4, 2), dtype=np.uint8), r"1, 3 or 4 channels, got \(5, 4, 2\)"),
        (b"bytes", "a path or a URL, got bytes"),
    ],
)
def test_unusable_arrays_are_refused(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image, "a")


# Layout of images, queries and answers


def test_pairing_of_images_and_queries():
    one, two = np.zeros((4, 4, 3)), np.ones((4, 4, 3))
    assert pair_images_with_queries(one, "a")[1] == [["a"]]
    assert pair_images_with_queries(one, ["a", "b"])[1] == [["a", "b"]]
    assert pair_images_with_queries(one, [["a", "b"]])[1] == [["a", "b"]]
    assert pair_images_with_queries([one, two], ["a", "b"])[1] == [["a"], ["b"]]
    assert pair_images_with_queries([one, two], ["a", ["b", "c"]])[1] == [["a"], ["b", "c"]]
    assert pair_images_with_queries(np.stack([one, two]), ["a", "b"])[1] == [["a"], ["b"]]
    images, queries = pair_images_with_queries([[one], [two]], ["a", "b"])
    assert images[1] is two and queries == [["a"], ["b"]]
    assert match_answers([["x", "y"], "z"], [["a", "b"], ["c"]]) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (2, ["a"], "expected 2, got 1"),
        (1, ["a", "b"], "expected 1, got 2"),
        (2, "a", "expected 2, got 1"),
        (2, [["a"], []], "at least one query, got none for image 2"),
        (2, ["a", "  \n"], r"must not be empty, got '  \\n' for image 2"),
        (1, [""], "must not be empty"),
        (1, [3], "must be a string, got int"),
        (1, None, "got no text"),
        (0, [], "at least one image"),
    ],
)
def test_counts_and_queries_that_do_not_fit(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor([gradient_image(4, 4)] * images, text)


def test_answers_that_do_not_fit(processor):
    images = [gradient_image(4, 4)] * 2
    with pytest.raises(ValueError, match="expected 3, got 2"):
        processor(images, [["a", "b"], ["c"]], answers=["x", "y"])
    with pytest.raises(ValueError, match="image 1 has 2 queries, so it needs as many answers, got 1"):
        processor(images, [["a", "b"], ["c"]], answers=[["x"], ["y", "z"]])


def test_too_long_query_is_refused_and_nothing_is_cut(processor):
    image = gradient_image(4, 4)
    short = tiny_processor(tiny_tokenizer(max_length=30))
    length = short(image, "a " * 10)["input_ids"].shape[1]
    assert length == 30
    with pytest.raises(ValueError, match="query 2 is too long.*may have 30 tokens, got 31"):
        short(image, ["a", "a " * 11])
    with pytest.raises(ValueError, match="may have 20 tokens, got 21"):
        processor(image, "a", max_length=20)


def test_image_token_in_a_plain_query_is_refused(processor):
    with pytest.raises(ValueError, match="text 1 holds <image>, so it must be a whole prompt"):
        processor(gradient_image(4, 4), "<image> the red cup")


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_turned_tiff_is_read_alike_from_a_path_and_from_a_stream(tmp_path, mode, orientation):
    """Pillow maps a file that is given by its path into memory, and then mixes up the rows of turned ones."""
    stored = Image.fromarray((np.arange(21) * 12).astype(np.uint8).reshape(3, 7)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.tiff", exif=exif)
    stored.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.tiff")), expected)
    with open(tmp_path / "turned.tiff", "rb") as stream:
        assert np.array_equal(np.asarray(read_image(Image.open(stream))), expected)
