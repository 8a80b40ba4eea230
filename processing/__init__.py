"""What a user hands in and gets back: processor, post-processing, pipeline, drawing."""

from .drawing import draw_overlay, draw_result, draw_similarity
from .image_reading import read_image
from .pipeline_uground import ReferringSegmentationPipeline
from .post_processing import masks_to_boxes, post_process_masks, segment_scores
from .processing_uground import UGroundProcessor, letterbox_image_processor
from .rejection import REJECT_THRESHOLD, is_rejected, map_peak

__all__ = [
    "REJECT_THRESHOLD",
    "ReferringSegmentationPipeline",
    "UGroundProcessor",
    "draw_overlay",
    "draw_result",
    "draw_similarity",
    "is_rejected",
    "letterbox_image_processor",
    "map_peak",
    "masks_to_boxes",
    "post_process_masks",
    "read_image",
    "segment_scores",
]
