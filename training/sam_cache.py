"""SAM's image embeddings on disk: the frozen encoder sees an image once, in however many epochs and processes."""

import hashlib
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from uground.modeling_uground.hub_files import give_usual_mode

logger = logging.get_logger(__name__)

GIGABYTE = 2**30


def encoder_key(encoder: torch.nn.Module) -> str:
    """A name of an encoder that depends on its weights only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class SamEmbeddingCache:
    """
    Embeddings in files, named by the pixels of the SAM frame, in a folder named by the encoder's weights.

    Several processes may share the folder: a file appears whole, by renaming, or not at all. When the folder has
    reached its limit nothing more is written and nothing is thrown out: training goes round and round through its
    images, so whatever was thrown out would be the next thing wanted.

    Args:
        folder: where the embeddings of all encoders lie.
        encoder: SAM's image encoder, which must stay as it is.
        limit_gb: most gigabytes of files of this encoder.
    """

    def __init__(self, folder: str | os.PathLike, encoder: torch.nn.Module, limit_gb: float):
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ValueError("SAM's image encoder is trained, so its embeddings cannot be cached; expected it frozen")
        self.folder = Path(folder) / encoder_key(encoder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.limit = limit_gb * GIGABYTE
        self.encoded = 0
        self._used = self._size_on_disk()
        self._is_full = False

    def _size_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> torch.Tensor | None:
        """An embedding `(C, S/16, S/16)`, or `None` where there is none that can be read."""
        try:
            return load_file(self._path(key))["embedding"]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning(f"the cached embedding {self._path(key)} cannot be read and is made anew: {error}")
            return None

    def put(self, key: str, embedding: torch.Tensor) -> None:
        """Keep an embedding `(C, S/16, S/16)`, unless the limit is reached."""
        size = embedding.numel() * embedding.element_size()
        if self._used + size > self.limit and not self._is_full:
            # Other processes write too: look before giving up.
            self._used = self._size_on_disk()
            self._is_full = self._used + size > self.limit
            if self._is_full:
                logger.warning(f"{self.folder} has reached its limit of {self.limit / GIGABYTE:g} GB; no more is kept")
        if self._is_full:
            return
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_name(f".{uuid.uuid4().hex}.part")
        save_file({"embedding": embedding.detach().cpu().contiguous()}, draft)
        give_usual_mode(draft)
        os.replace(draft, path)
        self._used += size

    def look_up(self, keys: list[str], device: torch.device) -> list[torch.Tensor | None]:
        """The embeddings of a batch of images, `None` for each that is not here."""
        found = map(self.get, keys)
        return [None if embedding is None else embedding.to(device) for embedding in found]

    def keep(self, keys: list[str], found: list[torch.Tensor | None], embeddings: torch.Tensor) -> None:
        """
        Keep what was made because it was not here.

        Args:
            keys, found: of [`look_up`].
            embeddings (`(I, C, S/16, S/16)`): of all the images.
        """
        missing = {key: embeddings[image] for image, key in enumerate(keys) if found[image] is None}
        for key, embedding in missing.items():
            self.put(key, embedding)
        self.encoded += len(missing)
