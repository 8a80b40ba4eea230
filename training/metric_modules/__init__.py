"""The metrics as modules of the `evaluate` library.

    metric = load_metric("grounding_iou", "rela")        # or evaluate.load(PATH_TO/grounding_iou.py, "rela")
    metric.add_batch(predictions=[masks, …], references=[masks, …])
    metric.compute()

The second argument is the protocol, see `uground.training.evaluation.protocols`.
"""

from uground.extras import require_extra

require_extra("metrics", "uground.training.metric_modules")

# Behind the check, which says it better than Python would.
from uground.training.metric_modules.counting_metric import METRICS, load_metric, metric_path  # noqa: E402

__all__ = ["METRICS", "load_metric", "metric_path"]
