"""gIoU, cIoU and Pr@ of masks, under the protocols of LISA, ReLA and GSVA.

Not to be confused with the box losses GIoU and CIoU, which are other things of nearly the same names.
"""

from uground.training.metric_modules import counting_metric

DESCRIPTION = """
Overlap of predicted with wanted masks: `giou` is the mean IoU over queries, `ciou` the sum of intersections over the
sum of unions, `pr@0.5` to `pr@0.9` the share of queries with a target whose IoU reaches that, `box_acc` the share of
those whose bounding boxes reach 0.5. Empty against empty counts 1. These are figures of masks, in spite of the names
of the box measures GIoU and CIoU.
"""


class GroundingIoU(counting_metric.CountingMetric):
    """Protocols `lisa` (default), `rela`, `gsva`."""

    protocols = ("lisa", "rela", "gsva")
    figures = ("giou", "ciou", "pr@0.5", "pr@0.6", "pr@0.7", "pr@0.8", "pr@0.9", "box_acc")
    description = DESCRIPTION
