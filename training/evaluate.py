"""Measure a checkpoint on a dataset, under a named protocol.

    python -m uground.training.evaluate --model PATH --dataset scenes --split test --count 1000 \
        --layers last argmax mc --output results/
    python -m uground.training.evaluate --model PATH --dataset reasonseg --root DIR --split val \
        --protocol lisa --style generate --output results/

Answers are written (or forced) once and masks read at one or several choices of layer. Prints a table; with --output,
writes `results.json` and `predictions.parquet` there, and takes up an interrupted run. docs/evaluation.md says more.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

import uground
from uground import tiny_checkpoint
from uground.checkpoint_loading import load_model, load_processor
from uground.command_line import DTYPES, RESUMABLE, SEEDS, CommandParser, checked_seed, run_command, seed_number
from uground.job_processes import job_state
from uground.processing import UGroundProcessor
from uground.training.data.masks import decode_mask, encode_mask
from uground.training.data.samples import OVERALL
from uground.training.evaluation.calibration import calibration
from uground.training.evaluation.counts import GroundingCounts, count_query, restore_counts
from uground.training.evaluation.datasets import EvaluationData, evaluation_data
from uground.training.evaluation.predictions import STYLES, Prediction, predict
from uground.training.evaluation.prompts import READ, Asking, read_asking
from uground.training.evaluation.protocols import PROTOCOLS, REJECTING, query_iou
from uground.training.evaluation.store import BlockStore, write_overlays, write_results

COLUMNS = {
    "ordered": ("queries", "ciou", "giou", "union_ciou", "union_giou", "n_acc", "t_acc", "score_rank_correlation"),
    "lisa": ("queries", "giou", "ciou", "pr@0.5", "pr@0.7", "pr@0.9", "box_acc"),
    "rela": ("queries", "giou", "ciou", "n_acc", "t_acc", "pr@0.7", "pr@0.8", "pr@0.9"),
    "gsva": ("queries", "giou", "ciou", "n_acc", "t_acc"),
    "sesame": ("queries", "see", "segment", "precision", "recall"),
    "muse": ("queries", "giou", "giou_per_query", "ciou"),
}
PACKAGES = ("uground", "torch", "transformers", "accelerate", "datasets", "pycocotools", "numpy", "pillow")
RULES = ("last", "argmax", "sample", "mc")


@dataclass
class EvaluationArguments:
    """What is measured, and how; the flags of the command."""

    model: str
    dataset: str = "scenes"
    root: str | None = None
    split: str = "test"
    protocol: list[str] = field(default_factory=list)
    style: str | None = None
    count: int | None = None
    seed: int = 0
    layers: list[str | int] = field(default_factory=list)
    batch_size: int = 32
    max_new_tokens: int | None = None
    dtype: str | None = None
    overlays: int = 0
    output: str | None = None

    def __post_init__(self):
        for name, least in (("count", 1), ("batch_size", 1), ("max_new_tokens", 1), ("overlays", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        checked_seed(self.seed, "--seed")
        if READ in self.protocol and len(self.protocol) > 1:
            raise ValueError(f"--protocol {READ} asks in words of its own and stands alone, got {self.protocol}")
        usual = "generate" if self.asking is None else self.asking.style
        self.style = usual if self.style is None else self.style
        if self.asking is not None and self.style != usual:
            raise ValueError(f"--protocol {READ} of {self.dataset} is {usual}, got --style {self.style}")
        if self.style not in STYLES:
            raise ValueError(f"--style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.overlays and not self.output:
            raise ValueError("--overlays are written to a folder: name it with --output")

    @property
    def asking(self) -> Asking | None:
        """How the protocol asks, if it says that too."""
        return read_asking(self.dataset) if READ in self.protocol else None


def checked_protocols(arguments: EvaluationArguments, data: EvaluationData, processor: UGroundProcessor) -> list[str]:
    """
    The protocols to report: those asked for, or the usual one of the dataset.

    Raises:
        ValueError: a protocol does not exist or makes no sense for the dataset, or the model cannot say "not there".
    """
    protocols = list(dict.fromkeys(arguments.protocol)) or [data.protocols[0]]
    if arguments.asking is not None:
        protocols = [arguments.asking.figures]
    for protocol in protocols:
        if protocol not in data.protocols:
            known = "" if protocol in PROTOCOLS else f"there is no protocol {protocol!r}; "
            raise ValueError(
                f"{known}{arguments.dataset} is measured under {', '.join(data.protocols)}, got {protocol!r}"
            )
        needs_token = protocol in REJECTING or (protocol == "sesame" and arguments.style == "teacher-forced")
        if needs_token and processor.reject_token_id is None:
            raise ValueError(
                f"protocol {protocol} ({arguments.style}) needs a model that can write {processor.reject_token}, but "
                f"the tokenizer of {arguments.model} does not hold it"
            )
    return protocols


def checked_layers(layers: list[str | int], num_layers: int, has_policy: bool = True) -> list[str | int]:
    """
    Choices of layer, with "all" as every single one; of none the likeliest of the policy, or without one the last.

    Raises:
        ValueError: a choice is neither a rule nor a layer of the model.
    """
    chosen = []
    for layer in layers or ["argmax" if has_policy else "last"]:
        if layer == "all":
            chosen += range(num_layers)
        elif layer in RULES or (isinstance(layer, int) and 0 <= layer < num_layers):
            chosen.append(layer)
        else:
            raise ValueError(
                f"--layers must be {', '.join(RULES)}, all, or numbers in 0..{num_layers - 1}, got {layer!r}"
            )
    return list(dict.fromkeys(chosen))


def evaluate(arguments: EvaluationArguments, command: str | None = None) -> dict:
    """
    Measure as told, on however many processes there are; all of them return the same figures.

    The examples are cut into blocks of a batch, numbered from the first example. A block is one batch on one process,
    seeded by its number, so neither the number of processes nor an interruption changes a figure.

    Args:
        arguments: what to measure, and how.
        command: how it was called; kept with the results.

    Returns:
        `{"figures": {layer selection: {"overall" or attribute: figures}}, …}` with all that says how they came about;
        `figures` are those of the first protocol, `more_figures` those of the others, by protocol.

    Raises:
        ValueError, OSError: see `evaluation_data`, `checked_protocols`, `checked_layers` and `BlockStore`.
    """
    state = job_state()
    data = evaluation_data(arguments.dataset, arguments.root, arguments.split, arguments.count, arguments.seed)
    processor = load_processor(arguments.model)
    protocols = checked_protocols(arguments, data, processor)
    if data.turns is not None and arguments.style == "teacher-forced":
        raise ValueError(
            f"{data.turns}: several turns can be measured with --style generate only, got {arguments.style}"
        )
    dtype = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    model = load_model(arguments.model, **dtype).to(state.device)
    layers = checked_layers(arguments.layers, model.config.num_layers, model.config.layer_policy)
    settings = _settings(arguments, data, protocols, layers)
    store = BlockStore(arguments.output, settings)
    blocks = store.finished()
    # Before anybody adds to it: all must see the same blocks, or two would share the rest out differently.
    state.wait_for_everyone()
    total = -(-data.size // arguments.batch_size)
    remaining = [number for number in range(total) if number not in blocks]
    mine = remaining[state.process_index :: state.num_processes]
    fresh = []
    for number in tqdm(mine, unit="batch", disable=not state.is_main_process):
        set_seed((arguments.seed * 1_000_003 + number) % len(SEEDS))
        fresh.append(_measure_block(number, arguments, data, model, processor, layers))
        store.add(fresh[-1])
    blocks |= {block["block"]: block for block in gather_object(fresh)}
    results = _reduce([blocks[number] for number in range(total)], protocols, layers, arguments, data)
    results |= {"command": command, "processes": state.num_processes, "settings": settings}
    if arguments.output and state.is_main_process:
        rows = [row for number in range(total) for row in blocks[number]["predictions"]]
        write_results(arguments.output, results, rows)
        if arguments.overlays:
            first = [row for row in rows if row["layer_selection"] == str(layers[0])]
            write_overlays(arguments.output, first, arguments.overlays, data.example)
    state.wait_for_everyone()
    if state.is_main_process:
        store.clear()
    return results


def _settings(arguments: EvaluationArguments, data: EvaluationData, protocols, layers: list[str | int]) -> dict:
    """Everything that the results depend on, for those of another evaluation to be recognised."""
    names = ("dataset", "root", "style", "seed", "batch_size", "max_new_tokens", "dtype")
    weights = sorted(Path(arguments.model).glob("*.safetensors")) if Path(arguments.model).is_dir() else []
    return {
        "model": str(Path(arguments.model).resolve()) if weights else arguments.model,
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime] for path in weights],
        **{name: getattr(arguments, name) for name in names},
        "split": data.split,
        "content": data.content,
        "count": data.size,
        "protocol": protocols if arguments.asking is None else arguments.protocol,
        "layers": layers,
    }


def _measure_block(number: int, arguments, data: EvaluationData, model, processor, layers) -> dict:
    """Counts and predictions of one block, as plain values."""
    start = number * arguments.batch_size
    indices = range(start, min(start + arguments.batch_size, data.size))
    examples, asking = [data.example(index) for index in indices], arguments.asking
    if asking is not None:
        examples = list(map(asking.example, examples))
    predicted = predict(
        model,
        processor,
        examples,
        layers,
        arguments.style,
        arguments.max_new_tokens,
        data.neutral_answer if asking is None else asking.answer,
        None if asking is None else asking.system_prompt,
    )
    counts, rows, wrong = {}, [], 0
    for layer in layers:
        counted = [_count(*pair) for pair in zip(examples, predicted[layer], strict=True)]
        counts[str(layer)] = [query._asdict() for query in counted]
        rows += [
            _row(index, str(layer), example, prediction, query_iou(query))
            for index, example, prediction, query in zip(indices, examples, predicted[layer], counted, strict=True)
        ]
    for example, prediction in zip(examples, predicted[layers[0]], strict=True):
        wrong += prediction.answer.strip() != example["answer"]
    return {"block": number, "counts": counts, "wrong_answers": wrong, "predictions": rows}


def _count(example: dict, prediction: Prediction):
    return count_query(
        prediction.masks,
        prediction.targets,
        example["attribute"],
        None if example["ignore"] is None else decode_mask(example["ignore"]),
        prediction.scores,
        prediction.rejected,
        example.get("subset"),
    )


def _row(index: int, layer: str, example: dict, prediction: Prediction, value: float) -> dict:
    return {
        "index": index,
        "id": example["id"],
        "attribute": example["attribute"],
        "layer_selection": layer,
        "query": example["query"],
        "expected": example["answer"],
        "answer": prediction.answer,
        "masks": [encode_mask(mask) for mask in prediction.masks],
        "scores": prediction.scores,
        "boxes": prediction.boxes,
        "labels": prediction.labels,
        "layers": prediction.layers,
        "rejected": prediction.rejected,
        "iou": value,
    }


def _reduce(blocks: list[dict], protocols: list[str], layers, arguments: EvaluationArguments, data) -> dict:
    """The results of all blocks together."""
    figures: dict[str, dict] = {protocol: {} for protocol in protocols}
    scores = {}
    for layer in map(str, layers):
        whole = GroundingCounts()
        whole.queries = [restore_counts(fields) for block in blocks for fields in block["counts"][layer]]
        for protocol in protocols:
            figures[protocol][layer] = whole.evaluate(protocol)
        scores[layer] = calibration(whole.queries)
    results = {
        "figures": figures[protocols[0]],
        "protocol": protocols[0],
        "style": arguments.style,
        "more_figures": {protocol: figures[protocol] for protocol in protocols[1:]},
        "calibration": scores,
        "counts": {name: row["queries"] for name, row in figures[protocols[0]][str(layers[0])].items()},
        **{name: value for name, value in asdict(arguments).items() if name not in ("output", "protocol", "style")},
        "split": data.split,
        "count": data.size,
        "left_out": data.left_out,
        "layers": layers,
        "versions": {package: version(package) for package in PACKAGES},
        "commit": git_commit(Path(uground.__file__).parent),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if arguments.asking is not None:
        results |= {"asked_as": READ, "system_prompt": arguments.asking.system}
    if arguments.style == "generate" and data.is_answer_known:
        results["answers_as_written"] = 1 - sum(block["wrong_answers"] for block in blocks) / data.size
    return results


def git_commit(folder: Path) -> str | None:
    """The commit of a folder that is the root of a repository, with "-modified" if files changed since; else None."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        # An installed package may lie within a repository that is none of its own.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(results: dict, protocol: str | None = None) -> str:
    """Figures under a protocol as a Markdown table, one row per layer selection and attribute, labelled with style."""
    protocol = results["protocol"] if protocol is None else protocol
    figures = results["figures"] if protocol == results["protocol"] else results["more_figures"][protocol]
    columns = COLUMNS[protocol]
    label = protocol
    if "asked_as" in results:
        label = f"{results['asked_as']} ({protocol}, system prompt {results['system_prompt']})"
    lines = [
        "| protocol | style | layer | attribute | " + " | ".join(columns) + " |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]
    for layer, groups in figures.items():
        for name in [OVERALL, *(name for name in groups if name != OVERALL)]:
            cells = [_cell(groups[name][column]) for column in columns]
            lines.append(f"| {label} | {results['style']} | {layer} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibration_table(results: dict) -> str:
    """Figures of the scores as a Markdown table, one row per layer selection."""
    lines = ["| style | layer | segments | targets | ap@0.5 | ece |", "|---|---|---|---|---|---|"]
    for layer, figures in results["calibration"].items():
        cells = [_cell(figures[name]) for name in ("segments", "targets", "ap@0.5", "ece")]
        lines.append(f"| {results['style']} | {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _layer(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _parse(argv: list[str] | None) -> EvaluationArguments:
    parser = CommandParser("python -m uground.training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=tiny_checkpoint(), help="folder or Hub id; the bundled checkpoint by default"
    )
    parser.add_argument(
        "--dataset",
        default="scenes",
        help="scenes, a JSONL file, a name, a prepared folder, or a Hub id",
    )
    parser.add_argument("--root", help="folder of the dataset's original files")
    parser.add_argument(
        "--split", default="test", help="of a JSONL file whose lines name none, only a name for the results"
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=[],
        help=f"{', '.join((*PROTOCOLS, READ))}; by default the usual one of the dataset",
    )
    parser.add_argument("--style", choices=STYLES, help="answers written (default), or the wanted ones forced")
    parser.add_argument("--count", type=int, help="at most so many queries; all by default, 1000 of scenes")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the scenes, and of layers drawn under mc")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=_layer,
        default=[],
        help="last, argmax (default with a layer policy), sample, mc, numbers or all",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; as they are stored by default")
    parser.add_argument("--overlays", type=int, default=0, metavar="N", help="draw the N worst and the N best")
    parser.add_argument("--output", help="folder for results.json, predictions.parquet and overlays")
    return EvaluationArguments(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    command = " ".join(["python -m uground.training.evaluate", *(sys.argv[1:] if argv is None else argv)])
    return run_command("evaluate", lambda: _run(_parse(argv), command), RESUMABLE)


def _run(arguments: EvaluationArguments, command: str) -> None:
    results = evaluate(arguments, command)
    if not job_state().is_main_process:
        return
    for protocol in (results["protocol"], *results["more_figures"]):
        print(table(results, protocol), end="\n\n")
    print(calibration_table(results))
    if results["left_out"]:
        print(f"\n{results['left_out']}")
    if "answers_as_written" in results:
        print(f"\nanswers exactly as expected: {results['answers_as_written']:.3f}; style: {results['style']}")


if __name__ == "__main__":
    sys.exit(main())
