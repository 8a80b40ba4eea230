"""`pipeline("referring-segmentation")`: an image and queries in, answers and masks out."""

import os
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .answer_labels import label_absent
from .argument_checks import check_number, check_one_of, check_whole
from .conversation import is_conversation, read_conversation
from .halving import halve_batch, is_out_of_memory, release_memory
from .image_processors import seen_box
from .prompt_format import EARLIER_FRAME, check_token_ids
from .query_layout import is_list_of_images, pair_images_with_queries
from .rejection import is_rejected, map_peak, valid_maps
from .results import GroundingResult

logger = logging.get_logger(__name__)

FORWARD_ARGUMENTS = ("max_new_tokens", "layer_selection", "num_layer_samples", "max_rows", "max_kept_prefixes")
POSTPROCESS_ARGUMENTS = ("threshold", "mask_threshold", "reject_threshold", "return_similarity", "presence_threshold")
CALL_ARGUMENTS = (*FORWARD_ARGUMENTS, "generate_kwargs", *POSTPROCESS_ARGUMENTS)
# Names of what an item asks, and of what stands for image and query in it.
TEXT_KEYS, CONVERSATION_KEY = ("text", "query"), "messages"
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
    pipe(files, "the red cup", batch_size=8)                  # a list: one query of many images
    pipe([{"image": image, "query": "the red cup"}, …], batch_size=8)  # a list; a "query" may be a list of queries
    pipe([{"role": "user", "content": [{"type": "image", "url": …}, {"type": "text", "text": "the red cup"}]}])
    ```

    A result is a [`GroundingResult`]: the dictionary `{"answer": str, "segments": [{"mask": PIL image "L" of 0 and 255
    in image size, "score": float in 0..1, "label": str, "box": [x0, y0, x1, y1] in pixels, "layer": int}, …]}`, which
    can be drawn and written; `segments` is empty for what is not in the image. With a SAM 2 a segment has also its
    `"presence"`, in 0..1. An answer that was cut, by `max_new_tokens` for one, may lack segments: of the first one a
    warning is logged, unless `warns_of_cut` is false.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("a referring-segmentation pipeline needs a processor, got processor=None")
        check_token_ids(self.model.config, self.processor)
        self.warns_of_cut = True
        _check_loader(self._batch_size, self._num_workers)

    def __call__(
        self,
        inputs: Any = None,
        text: str | list[str] | None = None,
        *,
        image: Any = None,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            inputs: an image, or a list, dataset or iterable of images, with `text`; without it `{"image": …,
                "query": …}` (or `"text"`), or a conversation as `pipeline("image-text-to-text")` takes it, about one
                image; or a list, dataset or iterable of such items. `image=` and `images=` are other names for it.
            text: a query or a list of queries, nested as in [`UGroundProcessor.__call__`]; of a list of images, one
                query is asked of each. Or a conversation, or a list of them, without `inputs`.
            batch_size (`int`): how many images go through the model at a time, with all of their queries.
            max_new_tokens (`int`): most tokens of an answer; by default what the model's `generation_config` says.
            layer_selection, num_layer_samples: how the layer of each segment is picked, see `model.segment`.
            max_rows (`int`): most queries that go through the language model at a time, see `model.segment`.
            max_kept_prefixes (`int`): where a policy picks the layers, image tokens of so many images at a time are
                kept at all of them, see `model.segment`; 0 takes least memory.
            generate_kwargs (`dict`): anything else `model.segment` should generate with.
            threshold (`float`, defaults to 0): segments with a lower score are left out.
            mask_threshold (`float`, defaults to 0): logit above which a pixel is mask.
            reject_threshold (`float`): a query whose similarity maps all have a lower peak, in 0..1, is taken to ask
                for what is not there, and gets no segments; by default as the checkpoint's config says, where 0 leaves
                that to the reject token. Needs a model with `similarity_scaling="scaled"`.
            presence_threshold (`float`, defaults to 0): the same for the presence of segments, which a SAM 2
                estimates; its own rule is 0.5.
            return_similarity (`bool`): adds `"similarity_map"` to every segment, a float32 array with one value per
                image token that sees image, rows first; and `"similarity_box"` where these see a part of the image
                only, as of a model that is shown a centre crop: x0, y0, x1, y1 in pixels.

        With `layer_selection="mc"` every segment has `"uncertainty"`, `(H, W)` float32 in image pixels, the variance
        of the mask probability over the drawn layers, in 0..0.25, and `"agreement"`, how alike their masks are, in
        0..1.

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
        if not given and isinstance(text, (list, tuple)) and text and not isinstance(text[0], str):
            given, text = [text], None
        if len(given) != 1:
            raise ValueError(f"images must be given once, as the first argument, image= or images=; got {len(given)}")
        inputs = _make_items(given[0], text)
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

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        """Tensors of one item: one image with its queries, or a conversation."""
        image, text, messages = _read_item(input_)
        is_single = isinstance(text, str)
        if messages is None:
            inputs = self.processor([image], [text], **preprocess_parameters)
        else:
            settings: dict[str, Any] = {
                "tokenize": True,
                "return_dict": True,
                "return_tensors": "pt",
                "add_generation_prompt": True,
            }
            inputs = self.processor.apply_chat_template(messages, **settings, **preprocess_parameters)
        queries = [text] if is_single else list(text)
        return {"inputs": dict(inputs), "queries": queries, "is_single": is_single, "image": image}

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
        model_outputs: dict,
        threshold: float = 0.0,
        mask_threshold: float = 0.0,
        reject_threshold: float | None = None,
        return_similarity: bool = False,
        presence_threshold: float = 0.0,
    ) -> list[dict | list[dict]]:
        """Results of every item of a batch, nested as the items were."""
        queries = self._plain_queries(model_outputs["queries"])
        if reject_threshold is None:
            # Configs of release 0.1.0 do not have it.
            reject_threshold = getattr(self.model.config, "reject_threshold", 0.0)
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
        found: list[tuple] = []
        for outputs in model_outputs["outputs"]:
            asked = queries[len(found) : len(found) + len(outputs["sequences"])]
            rows = self.processor.post_process_instance_segmentation(
                outputs, mask_threshold=mask_threshold, queries=asked
            )
            details = (self._similarity_maps(outputs), self._seen_boxes(outputs), self._uncertainties(outputs))
            found += zip(rows, asked, *details, _image_sizes(outputs), strict=True)
        layout = zip(model_outputs["images"], model_outputs["layout"], strict=True)
        images = [image for image, (count, _) in layout for _ in range(count)]
        marks = self.processor.segment_token, self.processor.reject_token
        results = []
        for (row, query, maps, box, uncertainties, size), image in zip(found, images, strict=True):
            segments = _make_segments(row)
            for segment, similarity_map, uncertainty in zip(segments, maps, uncertainties, strict=True):
                segment |= uncertainty
                if return_similarity:
                    segment["similarity_map"] = similarity_map
                    segment |= {} if box is None else {"similarity_box": list(box)}
            absent, peaks = label_absent(row["answer"], query or "", *marks), list(map(map_peak, maps))
            presences = row["presences"].tolist() if "presences" in row else ()
            limits: dict[str, Any] = {"presences": presences, "presence_threshold": presence_threshold}
            if is_rejected(row["answer"], peaks, self.processor.reject_token, reject_threshold, **limits):
                absent, segments = list(dict.fromkeys([*(one["label"] for one in segments), *absent])), []
            results.append(
                GroundingResult(
                    answer=row["answer"],
                    segments=[segment for segment in segments if segment["score"] >= threshold],
                    query=query,
                    size=size,
                    absent=[name for name in absent if name],
                    last_layer=self.model.config.num_layers - 1,
                    image=image,
                )
            )
        nested: list = []
        start = 0
        for count, is_single in model_outputs["layout"]:
            nested.append(results[start] if is_single else results[start : start + count])
            start += count
        return nested

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        """One item, by the same way as a batch of items."""
        batch = self._collate([self.preprocess(inputs, **preprocess_params)])
        return self.postprocess(self.forward(batch, **forward_params), **postprocess_params)[0]

    def run_batch(self, items: list[dict]) -> list:
        """Results of items that went through [`preprocess`], nested as these were, with the pipeline's settings."""
        outputs = self.forward(self._collate(items), **self._forward_params)
        return self.postprocess(outputs, **self._postprocess_params)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Any:
        """
        Results item by item, computed batch by batch.

        The base class pads what it knows and cuts batches by rows; here an item has one image and any number of
        rows, and any number of segments comes out.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        items: PipelineDataset | PipelineIterator
        if isinstance(inputs, Sized) and not isinstance(inputs, IterableDataset):
            items = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            items = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)  # each of several would go through all items
        loader = DataLoader(items, batch_size=batch_size, num_workers=num_workers, collate_fn=self._collate)
        for batch in loader:
            yield from self.postprocess(self.forward(batch, **forward_params), **postprocess_params)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
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
            "images": [item["image"] for item in items],
            "layout": [(len(item["queries"]), item["is_single"]) for item in items],
        }

    def _plain_queries(self, texts: list[str]) -> list[str | None]:
        """The queries, with `None` where a text is a whole prompt."""
        return [None if self.processor.image_token in text else text for text in texts]

    def _similarity_maps(self, outputs) -> list[list]:
        """Per row, the similarity maps of its segments, without the tokens that see padding only."""
        return valid_maps(outputs, self.processor.patch_size)

    def _uncertainties(self, outputs) -> list[list[dict]]:
        """Per row, of each segment what layers disagree about, in image pixels; nothing unless several were drawn."""
        found: list[list[dict]] = [[] for _ in range(len(outputs["sequences"]))]
        spread, agreement = outputs.get("uncertainty"), outputs.get("agreement")
        for number, row in enumerate(outputs["segment_row"].tolist()):
            if spread is None:
                found[row].append({})
                continue
            image = int(outputs["image_index"][row])
            sizes = (outputs[name][image : image + 1] for name in ("sam_valid_sizes", "original_sizes"))
            (full,) = self.processor.post_process_masks(spread[number : number + 1], *sizes)
            found[row].append({"uncertainty": full.cpu().numpy(), "agreement": float(agreement[number])})
        return found

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
    if "max_kept_prefixes" in given:
        check_whole("max_kept_prefixes", given["max_kept_prefixes"], 0)
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


def _make_items(inputs, text):
    """What the base class takes: an item, a list of them, a dataset, or a generator."""
    if text is None and is_conversation(inputs):
        return {CONVERSATION_KEY: inputs}
    if text is None and isinstance(inputs, (list, tuple)):
        # The base class knows conversations too, and would make something else of them.
        return [{CONVERSATION_KEY: item} if is_conversation(item) else item for item in inputs]
    if text is None and isinstance(inputs, (Mapping, Dataset)):
        return inputs
    is_many = isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")
    if isinstance(inputs, (*IMAGE_TYPES, os.PathLike)) or not is_many:
        if text is None:
            raise ValueError(f"text is needed with an image, got {type(inputs).__name__} alone")
    elif text is None:
        # The base class streams torch datasets and generators only.
        return ({CONVERSATION_KEY: item} if is_conversation(item) else item for item in inputs)
    elif not isinstance(inputs, (list, tuple)):
        if not isinstance(text, str):
            raise ValueError(f"of a stream of images one query can be asked, got {type(text).__name__} as text")
        items = inputs if isinstance(inputs, Iterable) else (inputs[number] for number in range(len(inputs)))
        return ({"image": image, "text": text} for image in items)
    is_list = is_list_of_images(inputs)
    if is_list and isinstance(text, str):
        text = [text] * len(inputs)
    images, queries = pair_images_with_queries(inputs, text) if not is_list or len(inputs) else ([], [])
    texts = list(text) if is_list else [text]
    items = [
        {"image": image, "text": entry if isinstance(entry, str) else asked}
        for image, asked, entry in zip(images, queries, texts, strict=True)
    ]
    return items if is_list else items[0]


def _read_item(item) -> tuple[object, str | list[str], list[dict] | None]:
    """Image and text of an item, and its messages where it is a conversation."""
    if isinstance(item, Mapping) and set(item) == {CONVERSATION_KEY}:
        messages, image, query = read_conversation(item[CONVERSATION_KEY])
        return image, query, messages
    given = [key for key in TEXT_KEYS if isinstance(item, Mapping) and key in item]
    if len(given) != 1 or set(item) != {"image", *given}:
        got = sorted(item) if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(
            f'an item must be {{"image": …, "query": …}}, {{"image": …, "text": …}} or messages, got {got}'
        )
    return item["image"], item[given[0]], None


def _image_sizes(outputs) -> list[tuple[int, int]]:
    """Per row, width and height of its image."""
    sizes = outputs["original_sizes"].tolist()
    return [tuple(sizes[image][::-1]) for image in outputs["image_index"].tolist()]


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
