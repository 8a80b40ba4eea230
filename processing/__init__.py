"""What a user hands in and gets back: processor, post-processing, pipeline, drawing."""

from .drawing import draw_map, draw_overlay, draw_result, draw_similarity
from .image_processors import (
    crop_image_processor,
    letterbox_image_processor,
    make_image_processor,
    sam2_image_processor,
    stretch_image_processor,
)
from .image_reading import read_image
from .mask_rle import decode_mask, encode_mask
from .pipeline_uground import ReferringSegmentationPipeline
from .post_processing import masks_to_boxes, post_process_masks, segment_scores
from .processing_uground import UGroundProcessor
from .rejection import PRESENCE_THRESHOLD, is_rejected, map_peak
from .results import FoundSegment, GroundingResult

__all__ = [
    "PRESENCE_THRESHOLD",
    "FoundSegment",
    "GroundingResult",
    "ReferringSegmentationPipeline",
    "UGroundProcessor",
    "crop_image_processor",
    "decode_mask",
    "draw_map",
    "draw_overlay",
    "draw_result",
    "draw_similarity",
    "encode_mask",
    "is_rejected",
    "letterbox_image_processor",
    "make_image_processor",
    "map_peak",
    "masks_to_boxes",
    "post_process_masks",
    "sam2_image_processor",
    "read_image",
    "segment_scores",
    "stretch_image_processor",
]
