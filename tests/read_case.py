"""Recorded behaviour of the official READ code (`tests/data/read_*`)."""

from pathlib import Path

import torch
from official_case import DATA, OfficialCase, convert

from uground.modeling_uground import UGroundForReferringSegmentation
from uground.processing import letterbox_image_processor, make_image_processor
from uground.processing.image_processors import read_frames

CASES = sorted(DATA.glob("read_*"))


class ReadCase(OfficialCase):
    """One recorded batch, and the converted checkpoint that has to reproduce it."""

    def __init__(self, folder: Path, output: Path):
        super().__init__(folder, output)
        # Gradients of the projector are recorded, so that images are read with the rest.
        self.inputs = {**self._text(), **self.pixels}

    def _convert(self, folder: Path, output: Path) -> UGroundForReferringSegmentation:
        said = self.facts["sasp"]
        points = ("--num-points", said["num_points"], "--point-downsample", said["down_sample"])
        thresholds = ("--point-thresholds", said["t_pos"], said["t_neg"])
        flags = ("--system", "read", *points, *thresholds, "--segment-token-id", self.facts["seg_token_id"])
        assert convert(folder / "official", folder / "clip", output, *flags) == 0
        return UGroundForReferringSegmentation.from_pretrained(output).eval()

    def _text(self) -> dict[str, torch.Tensor]:
        offset = self.facts["offset"]
        rows = torch.tensor([end - start for start, end in zip(offset, offset[1:], strict=False)])
        return {**super()._text(), "image_index": torch.repeat_interleave(torch.arange(self.count), rows)}

    def _pixels(self) -> dict[str, torch.Tensor]:
        """Image inputs by the processors that a converted checkpoint gets."""
        config = self.model.config
        found = {"original_sizes": torch.tensor([(image.height, image.width) for image in self.images])}
        processors = {
            "": make_image_processor(config.image_frame, config.lmm_config.vision_config.image_size),
            "sam_": letterbox_image_processor(config.frame_size),
        }
        for prefix, processor in processors.items():
            pixels, valid = read_frames(processor, self.images, {})
            found |= {
                f"{prefix}pixel_values": torch.from_numpy(pixels),
                f"{prefix}valid_sizes": torch.from_numpy(valid),
            }
        return found

    @property
    def segment_image(self) -> torch.Tensor:
        """Image of each segment `(N,)`."""
        return torch.tensor([segment["image"] for segment in self.facts["segments"]])

    def masks(self) -> list[torch.Tensor]:
        """Targets of each image."""
        return [self.tensors[f"in.masks.{image}"] for image in range(self.count)]
