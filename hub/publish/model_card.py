"""The model card that goes with a checkpoint: what it is, how to run it, what it was measured to do, what it cannot.

Everything in it is read from the configuration and from `CardFacts`; what nobody recorded is said to be unrecorded.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from uground.modeling_uground.configuration_uground import CODE_VERSION, TESTED_TRANSFORMERS, UGroundConfig
from uground.modeling_uground.short_card import TAGS, UNKNOWN_LICENCE, UNRELATED

REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "tags")
OVERALL = "overall"
# Name in results.json to the name in a table of figures.
METRIC_NAMES = {"ciou": "cIoU", "giou": "gIoU", "n_acc": "N-acc", "t_acc": "T-acc"}
PROMPT_NAMES = {"embedding": "the projected segment state", "mask": "the similarity map"}


@dataclass
class CardFacts:
    """
    What a card says that the configuration does not know.

    Attributes:
        repo_id: where the checkpoint lies or will lie; a placeholder if `None`.
        base_models: Hub ids of what it was made from; empty if it was trained from nothing, `None` if not recorded.
        datasets: names or Hub ids of the training data.
        license: licence of the weights, as the Hub spells it.
        recipe: text of the recipe.
        results: content of `results.json`, as `uground.training.evaluate` writes it.
        example: content of `example.json`: the `"query"` about the example image and its `"answer"`.
        is_adapter: the repository holds a LoRA adapter of `base_models[0]` and no whole model.
    """

    repo_id: str | None = None
    base_models: list[str] | None = None
    datasets: list[str] | None = None
    license: str | None = None
    recipe: str | None = None
    results: dict | None = None
    example: dict | None = None
    is_adapter: bool = False


def build_model_card(config: UGroundConfig | None, facts: CardFacts) -> ModelCard:
    """
    The card of a checkpoint with this configuration; `None` for an adapter whose base is elsewhere.

    Raises:
        ValueError: `facts.results` are no results of `uground.training.evaluate`.
    """
    name = facts.repo_id or "uground-checkpoint"
    title = name.split("/")[-1]
    sections = [
        f"# {title}",
        _what_it_is(config, facts),
        UNRELATED,
        _usage(facts, name),
        _example(facts),
        _parts(config),
        _origin(facts),
        _figures(facts.results),
        _limits(),
        _licences(facts),
        f"Saved by uground {CODE_VERSION}, tested with transformers {TESTED_TRANSFORMERS} and later.",
    ]
    data = _metadata(config, facts, title)
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


def check_card(content: str) -> ModelCard:
    """
    A card, if the Hub would take it and its required metadata are there.

    Raises:
        ValueError: the metadata are no YAML mapping, are incomplete, or list results the wrong way.
    """
    try:
        card = ModelCard(content)
    except Exception as error:  # the reader of YAML has errors of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata of the model card cannot be read: {reason}") from error
    missing = [name for name in REQUIRED_METADATA if not card.data.get(name)]
    if missing:
        raise ValueError(
            f"the model card must have the metadata {', '.join(REQUIRED_METADATA)}, it lacks {', '.join(missing)}"
        )
    return card


def _metadata(config: UGroundConfig | None, facts: CardFacts, title: str) -> ModelCardData:
    settings: dict[str, Any] = {"license": facts.license} if facts.license else {}
    if not facts.license:
        settings |= UNKNOWN_LICENCE
    if facts.base_models:
        settings["base_model"] = facts.base_models[0] if len(facts.base_models) == 1 else facts.base_models
    # The Hub looks these up: names of anything else stand in the text only.
    if on_hub := [name for name in facts.datasets or [] if "/" in name]:
        settings["datasets"] = on_hub
    if facts.results is not None:
        settings |= {"model_name": title, "eval_results": _eval_results(config, facts.results)}
    return ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="image-segmentation",
        tags=[*TAGS, "lora"] if facts.is_adapter else list(TAGS),
        language="en",
        **settings,
    )


def _eval_results(config: UGroundConfig | None, results: dict) -> list[EvalResult]:
    """The figures over all queries, at the layers the checkpoint chooses by itself if these were measured."""
    figures = _checked_figures(results)
    chosen = str(config.layer_selection) if config is not None else None
    layer = chosen if chosen in figures else next(iter(figures))
    overall = figures[layer].get(OVERALL, {})
    dataset = str(results.get("dataset", "unknown"))
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Referring segmentation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=results.get("split"),
            dataset_args={name: results[name] for name in ("count", "seed") if name in results} or None,
            metric_type=metric,
            metric_name=f"{name} (answers: {results.get('style', 'unknown')}, layer: {layer})",
            metric_value=overall[metric],
        )
        for metric, name in METRIC_NAMES.items()
        if overall.get(metric) is not None
    ]


def _checked_figures(results: dict) -> dict[str, dict[str, dict]]:
    figures = results.get("figures") if isinstance(results, dict) else None
    is_nested = isinstance(figures, dict) and all(
        isinstance(groups, dict) and groups and all(isinstance(group, dict) for group in groups.values())
        for groups in figures.values()
    )
    if not figures or not is_nested:
        raise ValueError(
            'results must be as uground.training.evaluate writes them, {"figures": {layer: {attribute: {metric: '
            f'value}}}}}}, got {type(figures).__name__} for "figures"'
        )
    return figures


def _what_it_is(config: UGroundConfig | None, facts: CardFacts) -> str:
    text = (
        "Ask about an image in words; get an answer and a pixel mask, score and box for each thing it names. A "
        "vision-language model writes `[SEG]` where it wants a mask; a policy picks the decoder layer at which that "
        "token is read; a SAM draws the mask"
    )
    if config is not None:
        prompts = " and ".join(PROMPT_NAMES.get(prompt, prompt) for prompt in config.prompts)
        rejects = "it writes `[REJ]`" if config.reject_token_id is not None else "it has no token to say so"
        text += f", prompted by {prompts}. Where a thing asked for is not there, {rejects}"
    if facts.is_adapter:
        text += f". This repository holds an adapter only; its base is `{(facts.base_models or ['unknown'])[0]}`"
    return text + "."


def _usage(facts: CardFacts, name: str) -> str:
    query = (facts.example or {}).get("query", "the red cup")
    image = "example.png" if facts.example else "photo.jpg"
    lines = ["## Use", "", "```python"]
    if facts.is_adapter:
        base = (facts.base_models or ["BASE"])[0]
        lines += [
            "from peft import PeftModel",
            "from transformers import AutoModel, AutoProcessor",
            "",
            f'base = AutoModel.from_pretrained("{base}", trust_remote_code=True)',
            f'model = PeftModel.from_pretrained(base, "{name}")',
            f'processor = AutoProcessor.from_pretrained("{base}", trust_remote_code=True)',
        ]
    else:
        lines += [
            "from transformers import pipeline",
            "",
            f'pipe = pipeline("referring-segmentation", model="{name}", trust_remote_code=True)',
            f'result = pipe("{image}", "{query}")',
            'print(result["answer"])',
            'for segment in result["segments"]:',
            '    print(segment["label"], segment["score"], segment["box"])',
            '    segment["mask"].save(f"{segment[\'label\']}.png")',
        ]
    lines += [
        "```",
        "",
        "The code lies beside the weights: read it first, then pass `trust_remote_code=True`, and pin",
    ]
    return "\n".join(lines) + " both with `revision=`."


def _example(facts: CardFacts) -> str:
    if not facts.example:
        return ""
    query, answer = facts.example["query"], facts.example["answer"]
    return f"![example.png with the masks found](example_overlay.png)\n\nAsked “{query}”, it wrote: `{answer}`"


def _parts(config: UGroundConfig | None) -> str:
    if config is None:
        return ""
    text, adapter = config.get_text_config(), config.adapter
    if adapter.frame is None:
        seen = f"images in their own proportions, a token for {adapter.cell_side} × {adapter.cell_side} pixels"
    else:
        rows, columns = config.token_grid_hw
        seen = f"images of {adapter.frame.side} pixels as {rows} × {columns} tokens"
    lines = [
        "## Parts",
        "",
        f"- LMM `{config.lmm_config.model_type}`: {text.num_hidden_layers} layers of width {text.hidden_size}, {seen}",
        f'- layer policy over {config.num_layers} layer states, `layer_selection="{config.layer_selection}"`'
        if config.layer_policy
        else f'- no layer policy, `layer_selection="{config.layer_selection}"` of {config.num_layers} layer states',
        f'- similarity map, `similarity_scaling="{config.similarity_scaling}"`',
        f"- SAM `{config.sam_config.model_type}` with a frame of {config.head_frame.side} pixels, prompted by "
        f"{', '.join(config.prompts)}"
        if config.mask_head
        else "- no mask head: a segment is its similarity map",
    ]
    return "\n".join(lines)


def _origin(facts: CardFacts) -> str:
    lines = ["## Training", ""]
    if facts.base_models is None:
        lines.append("- Base models: not recorded")
    elif facts.base_models:
        lines.append("- Base models: " + ", ".join(f"`{name}`" for name in facts.base_models))
    else:
        lines.append("- Base models: none, every weight was trained from nothing")
    lines.append("- Data: " + (", ".join(facts.datasets) if facts.datasets else "not recorded"))
    lines.append("- Recipe: " + ("as below" if facts.recipe else "not recorded"))
    if facts.recipe:
        lines += ["", "```yaml", facts.recipe.strip(), "```"]
    return "\n".join(lines)


def _figures(results: dict | None) -> str:
    if results is None:
        return "## Figures\n\nNot measured yet."
    figures = _checked_figures(results)
    metrics: list[str] = []
    for groups in figures.values():
        for group in groups.values():
            metrics += [name for name in group if name not in metrics]
    lines = [
        "## Figures",
        "",
        f"{results.get('dataset', 'unknown data')}, split `{results.get('split', 'unknown')}`; "
        f"answers: {results.get('style', 'unknown')}; protocol: {results.get('protocol', 'the default')}. "
        "Read from `results.json`.",
        "",
        "| layer | attribute | " + " | ".join(METRIC_NAMES.get(name, name) for name in metrics) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for layer, groups in figures.items():
        for name in sorted(groups, key=lambda name: name != OVERALL):
            cells = " | ".join(_cell(groups[name].get(metric)) for metric in metrics)
            lines.append(f"| {layer} | {name} | {cells} |")
    if results.get("command"):
        lines += ["", "```", str(results["command"]), "```"]
    versions = ", ".join(f"{package} {version}" for package, version in (results.get("versions") or {}).items())
    if versions:
        lines += ["", f"Measured with {versions}" + (f" on {results['date']}." if results.get("date") else ".")]
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _limits() -> str:
    return "\n".join(
        [
            "## Limits",
            "",
            "- It was measured on nothing but what is listed under Figures; expect less elsewhere.",
            "- A score ranks masks; it is no probability that a mask is right.",
            "- It may describe or segment what is not there, and miss what is. Do not let it decide about people.",
            "- Queries are English; very small or thin things are lost at the resolution of the SAM frame.",
        ]
    )


def _licences(facts: CardFacts) -> str:
    weights = f"`{facts.license}`" if facts.license else "bound by the licences of the base models and of the data"
    bases = "".join(f"\n- `{name}`: see its own card" for name in facts.base_models or [])
    return f"## Licence of the parts\n\n- Code (`*.py`, templates): Apache-2.0\n- Weights: {weights}{bases}"


__all__ = ["REQUIRED_METADATA", "CardFacts", "build_model_card", "check_card"]
