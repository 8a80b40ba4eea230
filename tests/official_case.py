"""Recorded behaviour of the official code (`tests/data/official_*`), and builders of checkpoints in its layout."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import import_protobuf

from uground.hub.convert_official import main as convert_command
from uground.hub.weights.weight_files import WeightFiles
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.processing import letterbox_image_processor
from uground.training.objectives.grounding_terms import Geometry
from uground.training.objectives.reward_baseline import BaselineTraining, RewardBaseline

DATA = Path(__file__).parent / "data"
CASES = sorted(DATA.glob("official_*"))
TINY = DATA / "official_tiny"
IMAGE_TOKENS = 576


class OfficialCase:
    """One recorded batch, and the converted checkpoint that has to reproduce it."""

    def __init__(self, folder: Path, output: Path):
        self.folder = output
        self.facts = json.loads((folder / "case.json").read_text())
        self.config = json.loads((folder / "official/config.json").read_text())
        self.tensors = load_file(folder / "case.safetensors")
        self.model = self._convert(folder, output)
        self.count = len(self.facts["sizes"])
        self.images = [
            Image.fromarray(self.tensors[f"in.image.{index}"].permute(1, 2, 0).numpy()) for index in range(self.count)
        ]
        self.pixels = self._pixels()
        # Encoded once for all runs; no recorded gradient flows through the images.
        with torch.no_grad():
            self.inputs = {**self._text(), "image_embeddings": self.model.get_image_embeddings(**self.pixels)}

    def _convert(self, folder: Path, output: Path) -> UGroundForReferringSegmentation:
        ids = ("--segment-token-id", self.facts["seg_token_id"], "--reject-token-id", self.facts["rej_token_id"])
        assert convert(folder / "official", folder / "clip", output, *ids) == 0
        return UGroundForReferringSegmentation.from_pretrained(output).eval()

    def _text(self) -> dict[str, torch.Tensor]:
        """Text inputs with the image tokens in place."""
        ids = self.tensors["in.input_ids"]
        places = (ids == self.facts["image_token_index"]).nonzero()[:, 1].tolist()
        fills = {"input_ids": self.model.config.image_token_id, "attention_mask": 1, "labels": -100}
        return {
            name: torch.stack(
                [
                    torch.cat([row[:place], torch.full((IMAGE_TOKENS,), fill), row[place + 1 :]])
                    for row, place in zip(self.tensors[f"in.{name}"], places, strict=True)
                ]
            )
            for name, fill in fills.items()
        }

    def _pixels(self) -> dict[str, torch.Tensor]:
        """Image inputs, letterboxed by the processors that a converted checkpoint gets."""
        config = self.model.config
        found = {"original_sizes": torch.tensor([(image.height, image.width) for image in self.images])}
        sizes = {"": config.lmm_config.vision_config.image_size, "sam_": config.frame_size}
        for prefix, size in sizes.items():
            features = letterbox_image_processor(size)(self.images)
            found[f"{prefix}pixel_values"] = torch.stack([torch.as_tensor(p) for p in features["pixel_values"]])
            found[f"{prefix}valid_sizes"] = torch.as_tensor(features["reshaped_input_sizes"])
        return found

    def run(self, kind: str):
        """Outputs of the model in the `last` or the `policy` run."""
        if kind == "last":
            return self.model(**self.inputs, layer_selection="last")
        return self.model(**self.inputs, layer_index=torch.tensor(self.facts["results"]["policy"]["actions"]))

    def target_groups(self) -> list[dict]:
        """Targets as the collator gives them, one group per image."""
        groups, start = [], 0
        for image in range(self.count):
            masks = self.tensors[f"in.masks.{image}"].float()
            groups.append(
                {
                    "segments": torch.arange(start, start + len(masks)),
                    "masks": masks,
                    "valid": torch.ones_like(masks, dtype=torch.bool),
                    "images": torch.full((len(masks),), image),
                    "in_frame": False,
                }
            )
            start += len(masks)
        return groups

    def geometry(self) -> Geometry:
        return Geometry.of(self.model.config, self.pixels)

    def baseline(self) -> RewardBaseline:
        """What rewards were held against; the critic as it was converted."""
        kind = self.config.get("baseline_type", "ema")
        found = RewardBaseline(self.model.config.num_layers, kind, 0.9, self.config.get("critic_hidden_dim", 128))
        assert BaselineTraining(found).load(self.folder) == (kind == "critic")
        return found


def convert(source, clip, output, *flags) -> int:
    """Run the command in this process; returns its exit status."""
    return convert_command([*map(str, (source, "--vision-tower", clip, "--output", output, *flags))])


def converted_weights(folder) -> dict[str, torch.Tensor]:
    """Everything in the safetensors of a folder."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def refused(capsys, message: str, *arguments) -> None:
    """The command fails with one line that holds `message`, and leaves no output behind."""
    assert convert(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_official: error: ") and error.count("\n") == 1
    assert message in error, error
    output = arguments[2]
    assert not output.exists() or not any(output.iterdir())
    assert not list(output.parent.glob("*.partial*"))


def official_weights(folder: Path = TINY / "official") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor.clone() for file in WeightFiles(folder).by_file() for name, tensor in file.items()}


def write_official(folder: Path, weights: dict[str, torch.Tensor] | None = None, **settings) -> Path:
    """A checkpoint like the toy one, in one safetensors file, with other `weights` or `settings` in its config."""
    folder.mkdir(parents=True)
    save_file(official_weights() if weights is None else weights, folder / "model.safetensors")
    config = json.loads((TINY / "official/config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_llama_tokenizer(folder: Path, num_pieces: int, added: tuple[str, ...]) -> None:
    """A slow LLaMA tokenizer as transformers 4.31 saves it: a sentencepiece BPE of `num_pieces`, and added tokens."""
    model = import_protobuf().ModelProto()
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    merged = ["▁t", "he", "▁the", "▁i", "▁is", "▁it", "▁S", "ur", "▁Sur", "▁Sure", "▁r", "ed", "▁red", "▁A", "▁U"]
    letters = sorted(set("▁.,:?'!-\n" + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    pieces = merged + letters
    pieces += [f"w{number}" for number in range(num_pieces - len(special) - len(pieces))]
    for score, (piece, kind) in enumerate(special + [(piece, 1) for piece in pieces]):
        model.pieces.add(piece=piece, score=-float(score), type=kind)
    model.trainer_spec.model_type = 2
    assert len(model.pieces) == num_pieces
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    ids = {token: num_pieces + number for number, token in enumerate(added)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    # What the official scripts were limited to, which says nothing of image tokens.
    settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 512, "unk_token": {"content": "<unk>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
