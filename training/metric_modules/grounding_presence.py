"""Whether what was asked for is there at all: N-acc, T-acc, "see", precision and recall."""

from uground.training.metric_modules import counting_metric

DESCRIPTION = """
Presence of what a query asks for: `n_acc`, the share of absent targets that are said to be absent; `t_acc`, the
share of present ones said to be present; under `sesame` also `see`, the accuracy over both, `precision` and `recall`
of presence, and `segment`, the cumulative IoU over all queries. Under `gsva` the reject token decides, under the
others the masks do. Figures without a query of their kind are None.
"""


class GroundingPresence(counting_metric.CountingMetric):
    """Protocols `rela` (default), `gsva`, `sesame`."""

    protocols = ("rela", "gsva", "sesame")
    figures = ("n_acc", "t_acc", "see", "segment", "precision", "recall")
    description = DESCRIPTION
