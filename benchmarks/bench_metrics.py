"""Time to count and reduce 1,000 pairs of 640x480 masks on one core: one JSON line.

Bound: 2 seconds. `plain` is the bare minimum with numpy, intersection and union of every pair, in the same process;
`from_rle` is the same work on masks that come as COCO RLE.
"""

import json
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402  (after the number of threads is set)

from uground.training.data.masks import encode_mask  # noqa: E402
from uground.training.metric_modules import load_metric  # noqa: E402

PAIRS, HEIGHT, WIDTH, ROUNDS = 1000, 480, 640, 3
DISTINCT = 50


def blobs(seed: int) -> list[np.ndarray]:
    """Round masks of many sizes, `(1, H, W)` each."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    masks = []
    for _ in range(DISTINCT):
        y, x, radius = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH), rng.uniform(10, 200)
        masks.append(((rows - y) ** 2 + (columns - x) ** 2 < radius**2)[None])
    return masks


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    found, wanted = blobs(0), blobs(1)
    predictions = [found[i % DISTINCT] for i in range(PAIRS)]
    references = [wanted[i // DISTINCT % DISTINCT] for i in range(PAIRS)]
    coded = [[encode_mask(mask[0])] for mask in (*found, *wanted)]
    coded_predictions = [coded[i % DISTINCT] for i in range(PAIRS)]
    coded_references = [coded[DISTINCT + i // DISTINCT % DISTINCT] for i in range(PAIRS)]

    def plain():
        for a, b in zip(predictions, references, strict=True):
            np.count_nonzero(a & b), np.count_nonzero(a | b)

    def metric(a, b):
        return lambda: load_metric("grounding_iou", "lisa").compute(predictions=a, references=b)

    works = {
        "plain": plain,
        "metric": metric(predictions, references),
        "from_rle": metric(coded_predictions, coded_references),
    }
    works["metric"]()
    times = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(seconds(work))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    result = {
        "benchmark": "metrics",
        "pairs": PAIRS,
        "size": [HEIGHT, WIDTH],
        "seconds": medians,
        "metric_over_plain": round(medians["metric"] / medians["plain"], 2),
        "bound_seconds": 2.0,
        "within_bound": medians["metric"] <= 2.0,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
