"""Fine-tune a UGround checkpoint.

    python -m uground.training.finetune --config recipes/tiny.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m uground.training.finetune \\
        --config recipes/llava-7b-lora.yaml --train_data mine.jsonl

A recipe is a yaml file of the flags below; flags on the command line win over it. A run that was interrupted goes on
from its last whole checkpoint when the same command is given again; one that is finished stays as it is.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from uground.checkpoint_loading import base_of, is_adapter, load_processor
from uground.checkpoint_loading import load_model as load_checkpoint
from uground.command_line import RESUMABLE, checked_seed, run_command
from uground.hub.publish.recipe_file import write_recipe
from uground.training.adapters import lora_config, quantization_config, with_adapter, with_saved_adapter
from uground.training.checkpoints import finished_steps, mark_finished, mark_unfinished
from uground.training.collator import GroundingCollator
from uground.training.data import scene_dataset
from uground.training.data.jsonl import JsonlSource, named_file
from uground.training.data.mixture import BAD_SAMPLE_POLICIES, Mixture, MixtureEpochs
from uground.training.data.prepared import prepared_dataset
from uground.training.readable_log import ReadableLog
from uground.training.settings_parser import SettingsParser
from uground.training.trainer import UGroundTrainer, UGroundTrainingConfig

SCENES = "scenes"
MODEL_SETTINGS = (
    "model",
    "dtype",
    "quantization",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_frozen",
    "adapter",
)


@dataclass
class FinetuneArguments:
    """What is trained, and on what."""

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the checkpoint to start from"})
    dtype: str = field(
        default="auto",
        metadata={"help": "of the weights: float32 or bfloat16; by default as saved, or float32 without an adapter"},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2"})
    quantization: str = field(default="none", metadata={"help": "of the frozen weights: none, 4bit or 8bit"})
    lora_rank: int = field(default=0, metadata={"help": "rank of a LoRA adapter, 0 to train the weights themselves"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapter"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of the adapter"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "layers of the language model to adapt"}
    )
    lora_frozen: list[str] = field(
        default_factory=list,
        metadata={"help": "modules beside the adapter that stay as they are, such as prompt_encoder"},
    )
    adapter: str | None = field(default=None, metadata={"help": "a saved adapter of this model to train further"})
    train_data: list[str] = field(
        default_factory=lambda: [SCENES],
        metadata={"help": "JSONL files, prepared folders or Hub ids (all with or without :SPLIT), or scenes"},
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "share of each of these in an epoch; by default its size"}
    )
    epoch_size: int | None = field(default=None, metadata={"help": "items per epoch; by default all there are"})
    on_bad_sample: str = field(default="fail", metadata={"help": "at a broken sample: fail, or skip, log and count"})
    eval_data: str | None = field(
        default=None, metadata={"help": "what to evaluate on, named like train_data; scenes by eval_scene_count"}
    )
    scene_count: int = field(default=10000, metadata={"help": "number of training scenes"})
    scene_seed: int = field(default=0, metadata={"help": "seed of the training scenes"})
    queries_per_scene: int = field(default=3, metadata={"help": "queries about each scene"})
    pairs_per_scene: int = field(
        default=0, metadata={"help": "of these, pairs that differ in one word, which makes one of them absent"}
    )
    attribute_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "how often each attribute is asked, such as {res: 0.3, fp_res: 0.2}"}
    )
    eval_scene_count: int = field(default=0, metadata={"help": "number of validation scenes; 0 for no validation"})

    def __post_init__(self):
        if self.on_bad_sample not in BAD_SAMPLE_POLICIES:
            raise ValueError(f"on_bad_sample must be one of {BAD_SAMPLE_POLICIES}, got {self.on_bad_sample!r}")
        checked_seed(self.scene_seed, "scene_seed")


def open_source(name: str, arguments: FinetuneArguments, split: str = "train") -> Any:
    """
    Items of one source and what they are, as plain JSON.

    Args:
        name: `"scenes"`, a JSONL file or what `prepared_dataset` reads, both with or without `:SPLIT`.
        arguments: settings of the scenes.
        split: of scenes, and where the name does not say.

    Raises:
        OSError: there is no such file or folder. ValueError: it is not what it should be.
    """
    if name == SCENES:
        count = arguments.scene_count if split == "train" else arguments.eval_scene_count
        settings = [arguments.scene_seed, arguments.queries_per_scene, arguments.attribute_weights]
        # Only where there are some: records of earlier runs know of none.
        settings += [arguments.pairs_per_scene] if arguments.pairs_per_scene else []
        return scene_dataset(split, count, *settings), {"scenes": split, "count": count, "settings": settings}
    if file := named_file(name):
        path, named_split = file
        source = JsonlSource(path, named_split or split)
        return source, source.record()
    dataset, _, named_split = name.partition(":")
    source = prepared_dataset(dataset, named_split or split)
    known_as = Path(dataset).name if Path(dataset).exists() else dataset
    return source, {"prepared": known_as, "split": named_split or split, "rows": len(source)}


def training_data(arguments: FinetuneArguments, seed: int, check: Any = None) -> tuple[object, Mixture | None, dict]:
    """
    The training dataset, the mixture behind it if there is one, and what it is, as plain JSON.

    `check` raises for an item that a batch cannot hold, see [`Mixture`].
    """
    opened = [open_source(name, arguments) for name in arguments.train_data]
    record = {"data": [record for _, record in opened]}
    if arguments.train_data == [SCENES] and arguments.epoch_size is None:
        return opened[0][0], None, record
    mixture = Mixture(
        [source for source, _ in opened],
        arguments.train_weights,
        arguments.epoch_size,
        seed,
        arguments.on_bad_sample,
        check,
    )
    record |= {"train_weights": arguments.train_weights, "items per epoch": len(mixture)}
    return mixture.dataset(), mixture, record


def load_model(arguments: FinetuneArguments) -> Any:
    """
    Model, with an adapter if one is asked for, and processor.

    Raises:
        ValueError: no model is named, or the arguments do not go together.
    """
    if arguments.model is None:
        raise ValueError("no model to start from: pass --model or name one in the recipe")
    if arguments.quantization != "none" and not (arguments.lora_rank or arguments.adapter):
        raise ValueError("quantised weights cannot be trained themselves: pass --lora_rank or --adapter as well")
    if arguments.adapter and arguments.lora_rank:
        raise ValueError("pass --lora_rank for a new adapter or --adapter for a saved one, got both")
    dtype = arguments.dtype
    if dtype == "auto" and not (arguments.lora_rank or arguments.adapter):
        dtype = "float32"  # in bfloat16 most steps are too small to change a weight
    settings = {"dtype": dtype, "quantization_config": quantization_config(arguments.quantization)}
    if arguments.attn_implementation is not None:
        settings["attn_implementation"] = arguments.attn_implementation
    if is_adapter(arguments.model):
        base = base_of(arguments.model)
        raise ValueError(
            f"the folder {arguments.model!r} holds an adapter, not a model: to train it further pass --model {base} "
            f"--adapter {arguments.model}"
        )
    processor = load_processor(arguments.model)
    model = load_checkpoint(arguments.model, **settings)
    if arguments.adapter:
        model = with_saved_adapter(model, arguments.adapter)
    elif arguments.lora_rank:
        config = lora_config(
            model,
            processor,
            arguments.lora_rank,
            arguments.lora_alpha,
            arguments.lora_dropout,
            arguments.lora_targets,
            arguments.lora_frozen,
        )
        model = with_adapter(model, config)
    return model, processor


def precision_of(config: UGroundTrainingConfig) -> str:
    """Name of the dtype a run computes in."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(config.mixed_precision, "float32")


def finetune(arguments: FinetuneArguments, config: UGroundTrainingConfig) -> UGroundTrainer:
    """
    Train as told and save model, processor and recipe to `config.output_dir`, going on from a whole checkpoint there.

    A run that is finished already is left as it is, which is said; the trainer then holds its weights, unless they are
    sharded.

    Raises:
        ValueError: something that was passed does not make sense, or the run found there was told something else.
        OSError: something cannot be read.
    """
    model, processor = load_model(arguments)
    collator = GroundingCollator(processor, config.loss_size, max_length=config.max_length)
    dataset, mixture, record = training_data(arguments, config.seed, collator.check)
    eval_name = arguments.eval_data or (SCENES if arguments.eval_scene_count else None)
    eval_dataset = None
    if eval_name is not None:
        source, _ = open_source(eval_name, arguments, "validation")
        eval_dataset = source if eval_name == SCENES else Mixture([source], seed=config.seed).dataset()
    record |= {name: getattr(arguments, name) for name in MODEL_SETTINGS}
    trainer = UGroundTrainer(
        model=model,
        args=config,
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_record=record,
        mixture=mixture,
        callbacks=[MixtureEpochs(mixture)] if mixture is not None else None,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ReadableLog)
    checkpoint = trainer.resumable_checkpoint()
    done = finished_steps(config.output_dir, trainer.run_record)
    if done and done >= trainer.total_steps():
        trainer.load_finished(config.output_dir, done)
        if trainer.is_world_process_zero():
            print(f"the run in {config.output_dir} is finished at step {done}: nothing is trained or written")
        return trainer
    # Before anybody changes what others look for.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        mark_unfinished(config.output_dir)
        # First: saving may publish, with a card that tells the recipe.
        write_recipe(config.output_dir, arguments, config)
        print(f"fine-tuning on {trainer.accelerator.device.type} in {precision_of(config)}")
        if checkpoint is not None:
            step = Path(checkpoint).name.rpartition("-")[2]
            print(f"resuming from step {step} of {trainer.total_steps()}, {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        mark_finished(config.output_dir, trainer.run_record, trainer.state.global_step)
    return trainer


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command("finetune", lambda: _run(argv), RESUMABLE)


def _run(argv: list[str] | None) -> None:
    parser = SettingsParser(FinetuneArguments, __doc__.splitlines()[0])
    arguments, config = parser.parse(sys.argv[1:] if argv is None else argv)
    finetune(arguments, config)


if __name__ == "__main__":
    sys.exit(main())
