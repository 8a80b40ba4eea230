"""`pipeline("referring-segmentation")`: an image and queries in, answers and masks out."""

import gc
import os
from collections.abc import Iterable, Mapping, Sized

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .argument_checks import check_number, check_one_of, check_whole
from .image_processors import seen_box
from .prompt_format import EARLIER_FRAME, check_token_ids
from .query_layout import is_list_of_images, pair_images_with_queries
from .rejection import is_rejected, map_peak

logger = logging.get_logger(__name__)

FORWARD_ARGUMENTS = ("max_new_tokens", "layer_selection", "num_layer_samples", "max_rows")
POSTPROCESS_ARGUMENTS = ("threshold", "mask_threshold", "reject_threshold", "return_similarity", "presence_threshold")
CALL_ARGUMENTS = (*FORWARD_ARGUMENTS, "generate_kwargs", *POSTPROCESS_ARGUMENTS)
# What is one image, or none at all, although it may be iterable.
IMAGE_TYPES = (str, bytes, np.ndarray, torch.Tensor, Image.Image)
# `pipeline(...)` reads these for the download and hands them on.
LOADING_ARGUMENTS = ("local_files_only",)


class ReferringSegmentationPipeline(Pipeline):
    """
    Answers queries about images in words and masks.

    ```python
    pipe = pipeline("referring-segmentation", model=path, trust_remote_code=True)
    pipe(image, "the red cup")                                # one result
    pipe(image, ["the red cup", "the tree"])                  # a list of results; the image is encoded once
    pipe([{"image": image, "text": "the red cup"}, …], batch_size=8)   # a list; a "text" may be a list of queries
    ```

    A result is `{"answer": str, "segments": [{"mask": PIL image "L" of 0 and 255 in image size, "score": float in
    0..1, "label": str, "box": [x0, y0, x1, y1] in pixels, "layer": int}, …]}`; `segments` is empty for what is not in
    the image. With a SAM 2 a segment has also its `"presence"`, in 0..1. An answer that was cut, by `max_new_tokens`
    for one, may lack segments: of the first one a warning is logged, unless `warns_of_cut` is `False`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("a referring-segmentation pipeline needs a processor, got processor=None")
        check_token_ids(self.model.config, self.processor)
        self.warns_of_cut = True
        _check_loader(self._batch_size, self._num_workers)

    def __call__(self, inputs=None, text=None, *, image=None, images=None, **kwargs):
        """
        Args:
            inputs: an image, or a list of images, with `text`; without it, `{"image": …, "text": …}`, or a list,
                dataset or iterable of such items. `image=` and `images=` are other names for it.
            text: a query or a list of queries, nested as in [`UGroundProcessor.__call__`].
            batch_size (`int`): how many images go through the model at a time, with all of their queries.
            max_new_tokens (`int`): most tokens of an answer; by default what the model's `generation_config` says.
            layer_selection, num_layer_samples: how the layer of each segment is picked, see `model.segment`.
            max_rows (`int`): most queries that go through the language model at a time, see `model.segment`.
            generate_kwargs (`dict`): anything else `model.segment` should generate with.
            threshold (`float`, defaults to 0): segments with a lower score are left out.
            mask_threshold (`float`, defaults to 0): logit above which a pixel is mask.
            reject_threshold (`float`, defaults to 0): a query whose similarity maps all have a lower peak, in 0..1,
                is taken to ask for what is not there, and gets no segments; `rejection.REJECT_THRESHOLD` is the value
                for the bundled checkpoint. Needs a model with `similarity_scaling="scaled"`.
            presence_threshold (`float`, defaults to 0): the same for the presence of segments, which a SAM 2
                estimates; its own rule is 0.5.
            return_similarity (`bool`): adds `"similarity_map"` to every segment, a float32 array with one value per
                image token that sees image, rows first; and `"similarity_box"` where these see a part of the image
                only, as of a model that is shown a centre crop: x0, y0, x1, y1 in pixels.

        Returns:
            For one image and one query a result, for one image and a list of queries a list of results; for a list
            of images or items a list of these; for a dataset or other iterable an iterator over them.

        Raises:
            TypeError: an argument is not known.
            ValueError: an argument has a value that it cannot have.
            OSError, ValueError: an image or query is not usable, see [`UGroundProcessor.__call__`].
            MemoryError: a batch does not fit into memory, and neither does a half of it.
        """
        _check_loader(kwargs.get("batch_size"), kwargs.get("num_workers"))
        given = [value for value in (inputs, image, images) if value is not None]
        if len(given) != 1:
            raise ValueError(f"images must be given once, as the first argument, image= or images=; got {len(given)}")
        inputs = given[0]
        if text is not None:
            inputs = _make_items(inputs, text)
        elif isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
        elif not isinstance(inputs, (Mapping, Dataset)):
            if isinstance(inputs, IMAGE_TYPES) or not isinstance(inputs, Iterable):
                raise ValueError(f"text is needed with an image, got {type(inputs).__name__} alone")
            # The base class streams torch datasets and generators only.
            inputs = (item for item in inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        unknown = sorted(set(kwargs) - set(CALL_ARGUMENTS) - set(LOADING_ARGUMENTS))
        if unknown:
            raise TypeError(
                f"a referring-segmentation pipeline does not know {', '.join(unknown)}; it takes "
                f"{', '.join(CALL_ARGUMENTS)}, batch_size and num_workers"
            )
        given = {name: value for name, value in kwargs.items() if value is not None}
        _check_values(given)
        self.model._resolve_selection(given.get("layer_selection"), given.get("num_layer_samples"))
        forward = {name: given[name] for name in FORWARD_ARGUMENTS if name in given}
        forward.update(given.get("generate_kwargs", {}))
        return {}, forward, {name: given[name] for name in POSTPROCESS_ARGUMENTS if name in given}

    def preprocess(self, input_, **preprocess_parameters):
        """Tensors of one item: one image with its queries."""
        if not isinstance(input_, Mapping) or set(input_) != {"image", "text"}:
            got = sorted(input_) if isinstance(input_, Mapping) else type(input_).__name__
            raise ValueError(f'an item must be {{"image": …, "text": …}}, got {got}')
        text = input_["text"]
        is_single = isinstance(text, str)
        inputs = self.processor([input_["image"]], [text], **preprocess_parameters)
        return {"inputs": dict(inputs), "queries": [text] if is_single else list(text), "is_single": is_single}

    def _forward(self, input_tensors, **forward_parameters):
        outputs = self._segment(input_tensors.pop("inputs"), forward_parameters)
        cut = sum(int((~part["finished"]).sum()) for part in outputs)
        if cut and self.warns_of_cut:
            self.warns_of_cut = False
            rows = sum(len(part["finished"]) for part in outputs)
            logger.warning(f"{cut} of {rows} answers were cut and may lack segments; pass a larger max_new_tokens")
        return {**input_tensors, "outputs": outputs}

    def _segment(self, inputs: dict, parameters: dict) -> list:
        """Outputs of `model.segment` for all rows in order: one, or two where memory did not hold them all."""
        try:
            return [self.model.segment(**inputs, **parameters)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            halves = halve_batch(inputs)
            reason = str(error).split("\n", 1)[0]
        # Here and not in the handler, whose exception keeps the tensors of the failed call alive.
        release_memory()
        lower = "batch_size, max_rows, max_new_tokens, num_layer_samples or the dtype"
        if len(halves) < 2:
            raise MemoryError(f"one query does not fit into memory; lower {lower}: {reason}")
        try:
            return [self.model.segment(**half, **parameters) for half in halves]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows = max(len(half["input_ids"]) for half in halves)
            raise MemoryError(f"half a batch, {rows} queries, does not fit into memory; lower {lower}") from error

    def postprocess(
        self,
        model_outputs,
        threshold=0.0,
        mask_threshold=0.0,
        reject_threshold=0.0,
        return_similarity=False,
        presence_threshold=0.0,
    ):
        """Results of every item of a batch, nested as the items were."""
        queries = self._plain_queries(model_outputs["queries"])
        if reject_threshold and self.model.config.similarity_scaling != "scaled":
            raise ValueError(
                "reject_threshold needs a model with similarity_scaling='scaled', whose maps have a strength, got "
                f"{self.model.config.similarity_scaling!r}"
            )
        head = getattr(self.model, "mask_decoder", None)
        if presence_threshold and not getattr(head, "has_presence", False):
            raise ValueError(
                "presence_threshold needs a model with a SAM 2, which estimates presence, got one without"
            )
        rows, maps, boxes = [], [], []
        for outputs in model_outputs["outputs"]:
            asked = queries[len(rows) : len(rows) + len(outputs["sequences"])]
            rows += self.processor.post_process_instance_segmentation(
                outputs, mask_threshold=mask_threshold, queries=asked
            )
            maps += self._similarity_maps(outputs)
            boxes += self._seen_boxes(outputs)
        results = []
        for found, similarity_maps, box in zip(rows, maps, boxes, strict=True):
            segments = _make_segments(found)
            if return_similarity:
                for segment, similarity_map in zip(segments, similarity_maps, strict=True):
                    segment["similarity_map"] = similarity_map
                    segment.update({} if box is None else {"similarity_box": list(box)})
            segments = [segment for segment in segments if segment["score"] >= threshold]
            peaks = list(map(map_peak, similarity_maps))
            presences = found["presences"].tolist() if "presences" in found else ()
            limits = {"presences": presences, "presence_threshold": presence_threshold}
            if is_rejected(found["answer"], peaks, self.processor.reject_token, reject_threshold, **limits):
                segments = []
            results.append({"answer": found["answer"], "segments": segments})
        nested, start = [], 0
        for count, is_single in model_outputs["layout"]:
            nested.append(results[start] if is_single else results[start : start + count])
            start += count
        return nested

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        """One item, by the same way as a batch of items."""
        batch = self._collate([self.preprocess(inputs, **preprocess_params)])
        return self.postprocess(self.forward(batch, **forward_params), **postprocess_params)[0]

    def run_batch(self, items: list[dict]) -> list:
        """Results of items that went through [`preprocess`], nested as these were, with the pipeline's settings."""
        outputs = self.forward(self._collate(items), **self._forward_params)
        return self.postprocess(outputs, **self._postprocess_params)

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        """
        Results item by item, computed batch by batch.

        The base class pads what it knows and cuts batches by rows; here an item has one image and any number of
        rows, and any number of segments comes out.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if isinstance(inputs, Sized) and not isinstance(inputs, IterableDataset):
            items = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            items = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)  # each of several would go through all items
        loader = DataLoader(items, batch_size=batch_size, num_workers=num_workers, collate_fn=self._collate)
        for batch in loader:
            yield from self.postprocess(self.forward(batch, **forward_params), **postprocess_params)

    def save_pretrained(self, save_directory, **kwargs):
        """Save model, processor and code, so that `pipeline("referring-segmentation", model=save_directory)` works."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        custom_object_save(self, save_directory)

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        """The last step of `push_to_hub`: the empty card of the base class gives way to the model's."""
        self.model.prepare_upload(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _collate(self, items: list[dict]) -> dict:
        """One batch of several items: rows padded on the left to the longest, image numbers counted on."""
        inputs = [item["inputs"] for item in items]
        length = max(tensors["input_ids"].shape[1] for tensors in inputs)
        names = [name for name in inputs[0] if name != "image_index"]
        fills = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0}
        batch = {}
        for name in names:
            values = [tensors[name] for tensors in inputs]
            if name in fills:
                values = [
                    torch.nn.functional.pad(value, (length - value.shape[1], 0), value=fills[name]) for value in values
                ]
            batch[name] = torch.cat(values)
        rows = torch.tensor([len(item["queries"]) for item in items])
        if (rows > 1).any():
            batch["image_index"] = torch.repeat_interleave(torch.arange(len(items)), rows)
        return {
            "inputs": batch,
            "queries": [query for item in items for query in item["queries"]],
            "layout": [(len(item["queries"]), item["is_single"]) for item in items],
        }

    def _plain_queries(self, texts: list[str]) -> list[str | None]:
        """The queries, with `None` where a text is a whole prompt."""
        return [None if self.processor.image_token in text else text for text in texts]

    def _similarity_maps(self, outputs) -> list[list]:
        """Per row, the similarity maps of its segments, without the tokens that see padding only."""
        maps = [[] for _ in range(len(outputs["sequences"]))]
        for row, similarity_map in zip(outputs["segment_row"].tolist(), outputs["similarity_map"], strict=True):
            valid = outputs["valid_sizes"][outputs["image_index"][row]]
            rows, columns = (-(-side // self.processor.patch_size) for side in valid.tolist())
            maps[row].append(similarity_map[:rows, :columns].float().numpy())
        return maps

    def _seen_boxes(self, outputs) -> list[tuple | None]:
        """Per row, the part of its image that its similarity maps cover; `None` for all of it."""
        sizes = outputs["original_sizes"].tolist()
        # Processors of release 0.1.0 show whole images.
        frame = getattr(self.processor, "image_frame", EARLIER_FRAME)
        return [seen_box(frame, tuple(sizes[image])) for image in outputs["image_index"].tolist()]


def _check_values(given: dict) -> None:
    """Raise a `ValueError` where an argument of a call has a value that it cannot have."""
    for name in ("max_new_tokens", "num_layer_samples", "max_rows"):
        if name in given:
            check_whole(name, given[name])
    for name in ("threshold", "reject_threshold", "presence_threshold"):
        if name in given:
            check_number(name, given[name], 0, 1)
    if "mask_threshold" in given:
        check_number("mask_threshold", given["mask_threshold"])
    if "return_similarity" in given:
        check_one_of("return_similarity", given["return_similarity"], (True, False))
    settings = given.get("generate_kwargs", {})
    if not isinstance(settings, Mapping):
        raise ValueError(f"generate_kwargs must be a dictionary, got {type(settings).__name__}")


def _check_loader(batch_size: int | None, num_workers: int | None) -> None:
    """Raise a `ValueError` unless these are numbers of images and of processes."""
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    if num_workers is not None:
        check_whole("num_workers", num_workers, 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text


def release_memory() -> None:
    """Hand memory that nothing uses back to the device."""
    gc.collect()
    empty_cache = getattr(torch.get_device_module(), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def halve_batch(inputs: dict) -> list[dict]:
    """
    A processor's output as two batches: half of the images each, or half of the queries of the only image.

    Returns:
        Two batches with the rows in order; one, the given, where there is a single query.
    """
    rows, images = len(inputs["input_ids"]), len(inputs["original_sizes"])
    by_image = images > 1
    count = images if by_image else rows
    if count < 2:
        return [inputs]
    # Without `image_index` each image has one row.
    numbers = inputs["image_index"] if by_image and "image_index" in inputs else torch.arange(rows)
    halves = []
    for low, high in ((0, count // 2), (count // 2, count)):
        rows = (numbers >= low) & (numbers < high)
        half = {}
        for name, value in inputs.items():
            if name in ("input_ids", "attention_mask", "image_index"):
                half[name] = value[rows.to(value.device)]
            else:
                half[name] = value[low:high] if by_image else value
        if "image_index" in half:
            half["image_index"] = half["image_index"] - (low if by_image else 0)
        halves.append(half)
    return halves


def _make_items(images, text):
    """One item for an image, a list of items for a list of images."""
    is_list = is_list_of_images(images)
    flat, queries = pair_images_with_queries(images, text)
    texts = list(text) if is_list and not isinstance(text, str) else [text]
    items = [
        {"image": image, "text": entry if isinstance(entry, str) else asked}
        for image, asked, entry in zip(flat, queries, texts, strict=True)
    ]
    return items if is_list else items[0]


def _make_segments(found: dict) -> list[dict]:
    """One dictionary per segment of a post-processed query."""
    masks = found["masks"].cpu().numpy()
    rows = zip(
        masks,
        found["scores"].tolist(),
        found["labels"],
        found["boxes"].tolist(),
        found["layers"].tolist(),
        strict=True,
    )
    segments = [
        {
            "mask": Image.fromarray(mask.astype("uint8") * 255),
            "score": score,
            "label": label,
            "box": [int(side) for side in box],
            "layer": layer,
        }
        for mask, score, label, box, layer in rows
    ]
    if "presences" in found:
        for segment, presence in zip(segments, found["presences"].tolist(), strict=True):
            segment["presence"] = presence
    return segments


__all__ = ["ReferringSegmentationPipeline"]
