"""Several targets at once: masks are matched to targets, as MUSE has it."""

from uground.training.metric_modules import counting_metric

DESCRIPTION = """
Overlap of sets of masks: masks and targets are matched by least cross-entropy and dice loss, those left over count
against an empty mask. `giou` is the sum of IoUs over the sum of max(masks, targets), `giou_per_query` its mean over
queries, `ciou` the sum of intersections over the sum of unions.
"""


class GroundingSets(counting_metric.CountingMetric):
    """Protocol `muse`."""

    protocols = ("muse",)
    figures = ("giou", "giou_per_query", "ciou")
    description = DESCRIPTION
