"""How well "not there" is told on Scenes: by the reject token alone, and with the rule of `processing.rejection`.

    python benchmarks/rejection.py --count 500 [--model PATH]

The strength below which a map is weak is chosen on the validation split, for every kind of strength in two ways: the
best F1 of "not there" (`f1`), and the highest value that costs at most 2 % of the answerable queries (`careful`); it
is measured on the test split. Half of the queries ask for what is not there. One JSON line per choice of layer, kind
of strength and way to choose; and in the end a table of the three rules, `[REJ]`, peak and presence: the area under
the curve of false alarms and hits (0.5 knows nothing), and precision and recall of "not there" at the careful
threshold. Presence is of mask heads that estimate it.
"""

import argparse
import json

import torch
from accelerate.utils import set_seed

from uground import tiny_checkpoint
from uground.checkpoint_loading import load_model, load_processor
from uground.training.scenes import scenes

LAYERS = ("argmax", "mc")
# `score` is that of a segment; `peak` the largest value of its similarity map, as a probability; `token` and `iou`
# are parts of the score; `agreement` is that of the drawn layers.
# `presence` that of a SAM 2.
KINDS = ("score", "peak", "token", "iou", "agreement", "presence")
# What the table compares.
RULES = {"[REJ]": None, "peak": "peak", "presence": "presence"}
ASKED = {"fp_res": 0.5, "res": 0.25, "rs": 0.25}
BATCH = 16
# Share of the answerable queries that the careful threshold may lose.
COST = 0.02


@torch.no_grad()
def measure(model, processor, split: str, count: int) -> list[dict]:
    """Per query: whether it is answerable, whether `[REJ]` was written, and per layer and kind the best strength."""
    found = []
    examples = list(scenes(split, count, attributes=ASKED))
    for start in range(0, count, BATCH):
        batch = examples[start : start + BATCH]
        inputs = processor([example["image"] for example in batch], [example["query"] for example in batch])
        images = model.get_image_embeddings(**inputs)
        text = (inputs["input_ids"], inputs["attention_mask"], inputs.get("image_index"))
        answers = model.write_answers(*text, images, max_new_tokens=32)
        rows = [{"there": bool(example["masks"])} for example in batch]
        for layer in LAYERS:
            set_seed(start)
            outputs = model.read_masks(answers, layer)
            results = processor.post_process_instance_segmentation(outputs, queries=[e["query"] for e in batch])
            peaks = outputs.similarity_map.flatten(1).amax(1).sigmoid()
            for number, (row, result) in enumerate(zip(rows, results, strict=True)):
                mine = outputs.segment_row == number
                row["rejected"] = processor.reject_token in result["answer"] or not len(result["scores"])
                values = {
                    "score": result["scores"],
                    "peak": peaks[mine],
                    "token": outputs.token_scores[mine],
                    "iou": outputs.iou_scores[mine],
                    "agreement": [] if outputs.agreement is None else outputs.agreement[mine],
                    "presence": result.get("presences", []),
                }
                row[layer] = {kind: max((float(value) for value in values[kind]), default=0.0) for kind in KINDS}
        found += rows
    return found


def figures(rows: list[dict], layer: str | None = None, kind: str | None = None, threshold: float = 0.0) -> dict:
    """Precision, recall and F1 of "not there", and the share of answerable queries that are kept."""
    said = [row["rejected"] or (layer is not None and row[layer][kind] < threshold) for row in rows]
    right = sum(word and not row["there"] for word, row in zip(said, rows, strict=True))
    precision = right / max(sum(said), 1)
    recall = right / max(sum(not row["there"] for row in rows), 1)
    kept = [not word for word, row in zip(said, rows, strict=True) if row["there"]]
    return {
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / max(precision + recall, 1e-9), 4),
        "kept": round(sum(kept) / max(len(kept), 1), 4),
    }


def area_under_curve(rows: list[dict], layer: str, kind: str | None) -> float:
    """
    How often what is there is stronger than what is not, over all pairs of queries, ties counted half (Mann-Whitney).

    Args:
        rows: of [`measure`].
        layer: how layers were chosen.
        kind: of strength; `None` for the reject token alone. An answer with that token has no strength.
    """
    strengths = [0.0 if row["rejected"] else 1.0 if kind is None else row[layer][kind] for row in rows]
    there, absent = (
        torch.tensor([value for value, row in zip(strengths, rows, strict=True) if row["there"] == wanted])
        for wanted in (True, False)
    )
    difference = there[:, None] - absent[None]
    return round(float(((difference > 0).float() + 0.5 * (difference == 0)).mean()), 4)


def print_table(test: list[dict], careful: dict[str, float], has_presence: bool) -> None:
    """The three rules beside one another, at the most probable layer."""
    print(f"{'rule':<10}{'AUC':>8}{'precision':>11}{'recall':>8}{'kept':>8}")
    for rule, kind in RULES.items():
        if kind == "presence" and not has_presence:
            print(f"{rule:<10}  the mask head of this model estimates none")
            continue
        found = figures(test) if kind is None else figures(test, LAYERS[0], kind, careful[kind])
        numbers = f"{found['precision']:>11.4f}{found['recall']:>8.4f}{found['kept']:>8.4f}"
        print(f"{rule:<10}{area_under_curve(test, LAYERS[0], kind):>8.4f}{numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=tiny_checkpoint())
    parser.add_argument("--count", type=int, default=500, help="queries of each split")
    args = parser.parse_args()
    processor = load_processor(args.model)
    model = load_model(args.model)
    validation, test = (measure(model, processor, split, args.count) for split in ("validation", "test"))
    common = {"benchmark": "rejection", "queries": args.count}
    print(json.dumps({**common, "rule": "token alone", **figures(test)}), flush=True)
    has_presence, careful = model.mask_decoder.has_presence, {}
    for layer in LAYERS:
        for kind in KINDS:
            if (kind == "agreement" and layer != "mc") or (kind == "presence" and not has_presence):
                continue
            values = sorted({0.0, *(row[layer][kind] for row in validation)})
            tried = {value: figures(validation, layer, kind, value) for value in values}
            least = tried[0.0]["kept"] - COST
            chosen = {
                "f1": max(values, key=lambda value, tried=tried: (tried[value]["f1"], -value)),
                "careful": max(value for value in values if tried[value]["kept"] >= least),
            }
            if layer == LAYERS[0]:
                careful[kind] = chosen["careful"]
            for way, threshold in chosen.items():
                line = {**common, "rule": f"{kind} at {layer}", "chosen": way, "threshold": round(threshold, 4)}
                print(json.dumps({**line, **figures(test, layer, kind, threshold)}))
    print_table(test, careful, has_presence)


if __name__ == "__main__":
    main()
