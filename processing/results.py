"""What the pipeline returns: a dictionary as before, that can be drawn, written as JSON and handed to other tools."""

import base64
import importlib
import zlib
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from .drawing import draw_result
from .image_reading import read_image
from .mask_rle import decode_mask, encode_mask

# Of a segment, what is written as it stands; `area` is derived, the others are masks and maps.
PLAIN_FIELDS = ("label", "score", "box", "layer")
DERIVED_FIELDS = ("area",)
# One value per token: few enough to be read in JSON. What has one per pixel is packed.
MAP_FIELDS, PACKED_FIELDS = ("similarity_map",), ("uncertainty",)
MAP_TYPE = "<f4"
DETECTIONS_PACKAGE = "supervision"


class FoundSegment(dict):
    """
    A segment of a [`GroundingResult`]: a dictionary that compares its maps by value.

    Keys are `"mask"` (PIL image `"L"` of 0 and 255 in image size), `"score"` (in 0..1), `"label"`, `"box"` (x0, y0,
    x1, y1 in pixels) and `"layer"`; and where they were asked for, `"similarity_map"`, `"similarity_box"`,
    `"uncertainty"` (`(H, W)` float32, the variance of the mask probability over layers, in 0..0.25) and
    `"agreement"` (in 0..1).
    """

    __hash__ = None

    def __eq__(self, other) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return set(self) == set(other) and all(_same(value, other[name]) for name, value in self.items())

    def __ne__(self, other) -> bool:
        return not self == other

    @property
    def area(self) -> int:
        """Number of pixels of the mask."""
        return int(np.count_nonzero(np.asarray(self["mask"])))

    def to_dict(self) -> dict:
        """The segment for `json.dumps`, see [`GroundingResult.to_dict`]."""
        written = {name: _plain(value) for name, value in self.items() if name not in ("mask", *PACKED_FIELDS)}
        written |= {name: _pack(self[name]) for name in PACKED_FIELDS if name in self}
        return {**written, "area": self.area, "mask": encode_mask(self["mask"])}

    @classmethod
    def from_dict(cls, written: Mapping) -> "FoundSegment":
        """The segment that [`to_dict`] wrote."""
        missing = [name for name in (*PLAIN_FIELDS, "mask") if name not in written]
        if missing:
            raise ValueError(f"a segment must have {', '.join(missing)}, got {sorted(written)}")
        segment = {"mask": Image.fromarray(decode_mask(written["mask"]).astype(np.uint8) * 255)}
        for name, value in written.items():
            if name in MAP_FIELDS:
                segment[name] = np.asarray(value, dtype=np.float32)
            elif name in PACKED_FIELDS:
                segment[name] = _unpack(value)
            elif name not in ("mask", *DERIVED_FIELDS):
                segment[name] = value
        return cls(segment)


class GroundingResult(dict):
    """
    What a model says about a query: `{"answer": str, "segments": [FoundSegment, …]}`, and what can be made of it.

    Two results are equal, and equal to a plain dictionary, if answer and segments are.

    Args:
        answer: what was written.
        segments: dictionaries, see [`FoundSegment`].
        query (*optional*): what was asked.
        size (*optional*): width and height of the image in pixels.
        absent: names of what was asked for and is not there.
        last_layer (*optional*): number of the last layer that a segment can be read at.
        image (*optional*): what was asked about: anything [`read_image`] takes.

    Attributes:
        query, size, absent, last_layer, image: as above. They are no keys of the dictionary.
    """

    __hash__ = None

    def __init__(
        self,
        answer: str,
        segments: Iterable[dict],
        query: str | None = None,
        size: Any = None,
        absent: Iterable[str] = (),
        last_layer: int | None = None,
        image: Any = None,
    ):
        super().__init__(answer=answer, segments=[FoundSegment(segment) for segment in segments])
        self.query, self.size = query, None if size is None else tuple(size)
        self.absent, self.last_layer, self.image = tuple(absent), last_layer, image

    def __reduce__(self):
        given = (self["answer"], self["segments"], self.query, self.size, self.absent, self.last_layer, self.image)
        return type(self), given

    def draw(self, image: Any = None, min_side: int | None = None) -> Image.Image:
        """
        A picture of what was found, see [`draw_result`].

        Args:
            image: the image that was asked about, if the result does not hold it.
            min_side: pixels of the shorter side of a panel, at least.

        Raises:
            OSError, ValueError: there is no image, it cannot be read, or it has another size.
        """
        image = self.image if image is None else image
        if image is None:
            raise ValueError("this result holds no image to draw on, so draw(image) needs one, got None")
        image = read_image(image)
        if self.size is not None and image.size != self.size:
            raise ValueError(f"the result is about an image of the size {self.size}, got one of {image.size}")
        return draw_result(image, self, **({} if min_side is None else {"min_side": min_side}))

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; text, where there is no image to draw on any more."""
        try:
            picture = self.draw()
        except (OSError, ValueError):
            return None
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    def to_dict(self) -> dict:
        """
        The result for `json.dumps`; [`from_dict`] reads it.

        Returns:
            `{"query", "answer", "width", "height", "absent", "last_layer", "segments": [{"label", "score", "box",
            "layer", "area", "mask", …}]}`. A mask is a COCO run-length encoding, a similarity map a list of rows, an
            uncertainty `{"shape": [H, W], "float32": …}`: little-endian, compressed by zlib, in base64.
        """
        width, height = self.size or (None, None)
        return {
            "query": self.query,
            "answer": self["answer"],
            "width": width,
            "height": height,
            "absent": list(self.absent),
            "last_layer": self.last_layer,
            "segments": [segment.to_dict() for segment in self["segments"]],
        }

    @classmethod
    def from_dict(cls, written: Mapping, image: Any = None) -> "GroundingResult":
        """
        The result that [`to_dict`] wrote.

        Args:
            written: a dictionary.
            image (*optional*): the image that it is about, for [`draw`].

        Raises:
            ValueError: it is no such dictionary.
        """
        is_result = isinstance(written, Mapping) and {"answer", "segments"} <= set(written)
        if not is_result or not isinstance(written["segments"], (list, tuple)):
            raise ValueError(
                f'a result must be a dictionary with "answer" and a list "segments", got {written!r:.100}'
            )
        width, height = written.get("width"), written.get("height")
        return cls(
            written["answer"],
            [FoundSegment.from_dict(segment) for segment in written["segments"]],
            query=written.get("query"),
            size=None if width is None or height is None else (width, height),
            absent=written.get("absent", ()),
            last_layer=written.get("last_layer"),
            image=image,
        )

    def to_coco(
        self, image_id: int | str, category_id: int | dict[str, int] = 1, first_id: int | None = None
    ) -> list[dict]:
        """
        The segments as annotations of COCO, which its results format takes too.

        Args:
            image_id: of the image.
            category_id: of all segments; or a mapping of labels to ids.
            first_id (*optional*): the annotations are numbered from it on; results have no numbers.

        Returns:
            One dictionary per segment: `image_id`, `category_id`, `segmentation` (run-length encoding), `area` in
            pixels, `bbox` (x, y, width, height), `iscrowd` 0 and `score`.

        Raises:
            ValueError: the mapping lacks a label.
        """
        annotations = []
        for number, segment in enumerate(self["segments"]):
            category = category_id
            if isinstance(category_id, Mapping):
                if segment["label"] not in category_id:
                    raise ValueError(f"category_id must know the label {segment['label']!r}, got {list(category_id)}")
                category = category_id[segment["label"]]
            x0, y0, x1, y1 = segment["box"]
            annotations.append(
                {
                    **({} if first_id is None else {"id": _plain(first_id + number)}),
                    "image_id": _plain(image_id),
                    "category_id": _plain(category),
                    "segmentation": encode_mask(segment["mask"]),
                    "area": segment.area,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                    "score": segment["score"],
                }
            )
        return annotations

    def to_detections(self) -> Any:
        """
        The segments as `supervision.Detections`.

        Returns:
            With `xyxy` `(n, 4)` float32, `mask` `(n, H, W)` bool, `confidence` `(n,)` float32, `class_id` `(n,)`
            int64, which counts the labels in order of their first appearance, and `data["class_name"]` and
            `data["layer"]` `(n,)`.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            # Only here: it brings OpenCV and Matplotlib along, which nothing else needs.
            supervision = importlib.import_module(DETECTIONS_PACKAGE)
        except ImportError as error:
            raise ImportError(
                f"to_detections needs the package {DETECTIONS_PACKAGE}, which cannot be imported ({error}); "
                f"install it with `pip install {DETECTIONS_PACKAGE}`"
            ) from error
        segments = self["segments"]
        width, height = self.size or (0, 0)
        labels = [segment["label"] for segment in segments]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        masks = [np.asarray(segment["mask"]) > 0 for segment in segments]
        return supervision.Detections(
            xyxy=np.array([segment["box"] for segment in segments], dtype=np.float32).reshape(-1, 4),
            mask=np.stack(masks) if masks else np.zeros((0, height, width), dtype=bool),
            confidence=np.array([segment["score"] for segment in segments], dtype=np.float32),
            class_id=np.array([numbers[label] for label in labels], dtype=np.int64),
            data={
                "class_name": np.array(labels, dtype=str),
                "layer": np.array([segment["layer"] for segment in segments], dtype=np.int64),
            },
        )


def _same(one, other) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
    return one == other


def _plain(value):
    """Arrays as lists; a float32 is a Python float, which JSON keeps to the bit."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _pack(values: np.ndarray) -> dict:
    content = zlib.compress(np.ascontiguousarray(values, dtype=MAP_TYPE).tobytes())
    return {"shape": list(values.shape), "float32": base64.b64encode(content).decode("ascii")}


def _unpack(packed: Mapping) -> np.ndarray:
    try:
        content = zlib.decompress(base64.b64decode(packed["float32"]))
        return np.frombuffer(content, dtype=MAP_TYPE).astype(np.float32).reshape(packed["shape"])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f'a map must be {{"shape": [H, W], "float32": …}}, got {packed!r:.100}') from error


__all__ = ["FoundSegment", "GroundingResult"]
