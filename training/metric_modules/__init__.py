"""The metrics as modules of the `evaluate` library.

    metric = load_metric("grounding_iou", "rela")        # or evaluate.load(PATH_TO/grounding_iou.py, "rela")
    metric.add_batch(predictions=[masks, …], references=[masks, …])
    metric.compute()

The second argument is the protocol, see `uground.training.evaluation.protocols`.
"""

from uground.training.metric_modules.counting_metric import METRICS, load_metric, metric_path

__all__ = ["METRICS", "load_metric", "metric_path"]
