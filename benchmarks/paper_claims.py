"""The papers' claims at equal budget: what points, a mask prompt and a layer policy add to the embedding alone.

    python benchmarks/paper_claims.py --start runs/tiny/start --runs runs/claims --steps 600 --seeds 0 1 \
        --trained hub/checkpoints/uground-tiny

Each system is trained by `recipes/tiny.yaml` for the same steps with a cosine schedule, from the same untrained
language model and the same trained towers, and measured on the same test scenes by its own choice of layer. Then the
trained checkpoint is read at every layer, by `argmax` and by `mc`. Prints both as Markdown tables, with mean and
spread (largest minus smallest) over seeds. What is finished in --runs is not done again.
"""

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

from uground import tiny_checkpoint
from uground.checkpoint_loading import load_model, load_processor
from uground.modeling_uground import UGroundForReferringSegmentation

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
LAST = {"layer_policy": False, "layer_selection": "last"}
AT_LAST = {"train_layer_selection": "last", "policy_weight": 0.0, "entropy_weight": 0.0}
# LISA and READ do not judge their similarity maps.
UNJUDGED = {"map_bce_weight": 0.0, "map_dice_weight": 0.0}
# Name of a system: what differs in its configuration, and in its training.
SYSTEMS = {
    "embedding (LISA)": ({**LAST, "prompts": ("embedding",)}, {**AT_LAST, **UNJUDGED}),
    "embedding + points (READ)": ({**LAST, "prompts": ("embedding", "points")}, {**AT_LAST, **UNJUDGED}),
    "embedding + mask, last layer": ({**LAST, "prompts": ("embedding", "mask")}, AT_LAST),
    "embedding + mask, policy (UGround)": ({}, {}),
}
COLUMNS = ("ciou", "giou", "n_acc", "t_acc")


def variant(start: str, output: Path, settings: dict) -> None:
    """The start with other settings: every weight that the variant has is that of the start."""
    model, processor = load_model(start), load_processor(start)
    config = deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    other, weights = UGroundForReferringSegmentation(config), model.state_dict()
    other.load_state_dict({name: weights[name] for name in other.state_dict()})
    other.save_pretrained(output)
    processor.save_pretrained(output)


def run(module: str, *arguments: object) -> None:
    """A command of the package, in a process of its own, its output to stderr."""
    command = [sys.executable, "-m", f"uground.training.{module}", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def measured(model: Path | str, output: Path, layers: list[str], count: int) -> dict[str, dict]:
    """Figures of test scenes by choice of layer."""
    if not (output / "results.json").is_file():
        scenes = ("--dataset", "scenes", "--split", "test", "--count", count, "--batch-size", 32)
        run("evaluate", "--model", model, *scenes, "--layers", *layers, "--output", output)
    figures = json.loads((output / "results.json").read_text())["figures"]
    return {layer: groups["overall"] for layer, groups in figures.items()}


def trained(start: str, folder: Path, name: str, seed: int, steps: int, count: int) -> dict:
    """Figures of one system after training with one seed."""
    settings, training = SYSTEMS[name]
    number = [*SYSTEMS].index(name)
    begun, output = folder / f"start-{number}", folder / f"system-{number}-seed-{seed}"
    if not (begun / "processor_config.json").is_file():
        variant(start, begun, settings)
    told = {"model": begun, "output_dir": output, "seed": seed, "scene_seed": seed, "max_steps": steps, **training}
    told["lr_scheduler_type"] = "cosine"
    run("finetune", "--config", RECIPE, *(part for key, value in told.items() for part in (f"--{key}", value)))
    (figures,) = measured(output, output / "results", ["last" if settings else "argmax"], count).values()
    return figures


def spread(rows: list[dict], column: str) -> str:
    """Mean, and the distance of the largest from the smallest."""
    values = [row[column] for row in rows if row[column] is not None]
    return f"{sum(values) / len(values):.3f} ± {max(values) - min(values):.3f}" if values else "–"


def table(first: str, rows: dict[str, list[dict]]) -> str:
    """A Markdown table of named rows, each with the figures of all seeds."""
    lines = [f"| {first} | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, figures in rows.items():
        lines.append(f"| {name} | " + " | ".join(spread(figures, column) for column in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--start", required=True, help="untrained checkpoint, of uground.training.scenes.tiny_model")
    parser.add_argument("--trained", default=tiny_checkpoint(), help="checkpoint that is read layer by layer")
    parser.add_argument("--runs", type=Path, required=True, help="folder for what is trained and measured")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--count", type=int, default=500, help="test queries")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    systems = {
        name: [trained(args.start, args.runs, name, seed, args.steps, args.count) for seed in args.seeds]
        for name in SYSTEMS
    }
    print(f"{args.steps} steps, seeds {args.seeds}, {args.count} test queries\n")
    print(table("system", systems), flush=True)
    layers = [*map(str, range(load_model(args.trained).config.num_layers)), "last", "argmax", "mc"]
    read = measured(args.trained, args.runs / "layers", layers, args.count)
    print("\n" + table("layer", {layer: [figures] for layer, figures in read.items()}))


if __name__ == "__main__":
    main()
