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
from uground.modeling_uground.mask_head import ImageMaps, from_maps, maps_of

logger = logging.get_logger(__name__)

GIGABYTE = 2**30


def encoder_key(encoder: torch.nn.Module) -> str:
    """A name of an encoder that depends on its weights only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def join_images(found: list[dict[str, torch.Tensor]]) -> ImageMaps:
    """What a mask head made of several images, of [`SamEmbeddingCache.look_up`]; all are there."""
    return from_maps({name: torch.stack([maps[name] for maps in found]) for name in found[0]})


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

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The maps `(C, h, w)` of an image by name, or `None` where there are none that can be read."""
        try:
            return load_file(self._path(key))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning(f"the cached embedding {self._path(key)} cannot be read and is made anew: {error}")
            return None

    def put(self, key: str, maps: dict[str, torch.Tensor]) -> None:
        """Keep the maps `(C, h, w)` of an image, unless the limit is reached."""
        size = sum(values.numel() * values.element_size() for values in maps.values())
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
        save_file({name: values.detach().cpu().contiguous() for name, values in maps.items()}, draft)
        give_usual_mode(draft)
        os.replace(draft, path)
        self._used += size

    def look_up(self, keys: list[str], device: torch.device) -> list[dict[str, torch.Tensor] | None]:
        """The maps of a batch of images, `None` for each that is not here."""
        found = map(self.get, keys)
        return [None if maps is None else {name: values.to(device) for name, values in maps.items()} for maps in found]

    def keep(self, keys: list[str], found: list[dict[str, torch.Tensor] | None], embeddings: ImageMaps) -> None:
        """
        Keep what was made because it was not here.

        Args:
            keys, found: of [`look_up`].
            embeddings: of all the images, as the mask head makes them.
        """
        maps = maps_of(embeddings)
        missing = {
            key: {name: values[image] for name, values in maps.items()}
            for image, key in enumerate(keys)
            if found[image] is None
        }
        for key, of_image in missing.items():
            self.put(key, of_image)
        self.encoded += len(missing)
