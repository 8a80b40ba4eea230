"""Figures as the Hub reads them now, `.eval_results/*.yaml` of a repository, beside the card's older `model-index`."""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry
from huggingface_hub import eval_result_entries_to_yaml as entries_as_lists

ENTRIES_FILE = ".eval_results/uground.yaml"


def eval_entries(results: list[EvalResult]) -> list[EvalResultEntry]:
    """
    Entries of figures, those on data sets of the Hub only, as an entry must name one.

    Args:
        results: as in the metadata of a card.

    Returns:
        One per figure; its task is split and metric, its notes say how answers were made.
    """
    return [
        EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id="_".join(filter(None, (result.dataset_split, result.metric_type))),
            value=result.metric_value,
            notes=result.metric_name,
        )
        for result in results
        if result.dataset_type.count("/") == 1
    ]


def write_eval_entries(folder: Path, results: list[EvalResult] | None) -> None:
    """Write the entries of a checkpoint folder, and remove those that no figure stands behind any more."""
    path, entries = folder / ENTRIES_FILE, eval_entries(results or [])
    if not entries:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(entries_as_lists(entries), sort_keys=False), encoding="utf-8")


__all__ = ["ENTRIES_FILE", "eval_entries", "write_eval_entries"]
