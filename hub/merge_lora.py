"""Merge a LoRA adapter of a UGround into the weights it was trained on.

python -m uground.hub.merge_lora runs/lora --base uground-7b --output uground-7b-tuned

What was trained as a whole beside the adapter, such as the mask decoder or the rows of new tokens, goes along.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from tqdm import tqdm

from uground.checkpoint_loading import load_model
from uground.command_line import DTYPES, run_command
from uground.hub.publish.recipe_file import RECIPE_FILE
from uground.hub.weights.checkpoint_folder import ADAPTER_WEIGHTS, check_adapter, read_config
from uground.hub.weights.checkpoint_writer import ShardWriter, check_output, new_folder, save_all_but_weights
from uground.hub.weights.weight_files import TensorFile, name_some, resolve_folder
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.processing import UGroundProcessor

PROCESSOR_CONFIG = "processor_config.json"


def merge_lora(adapter: str, base: str, output: str, dtype: torch.dtype | None = None) -> None:
    """
    Write a checkpoint whose outputs are those of base and adapter.

    Args:
        adapter: folder or Hub id that peft or `UGroundTrainer` saved.
        base: folder or Hub id of the UGround that the adapter was trained on.
        output: folder to write, new or empty. The processor is the adapter's if there is one, else that of the base.
        dtype: in which is merged and written; by default that of the base.

    Raises:
        OSError: something cannot be read or written, or the output is not empty.
        ValueError: the adapter does not belong to the base, or the base is no UGround.
    """
    output = Path(output)
    check_output(output)
    adapter_folder = resolve_folder(adapter, "adapter")
    check_adapter(adapter_folder)
    base_folder = resolve_folder(base, "base")
    read_config(base_folder)
    processor = _processor(adapter_folder, base_folder)
    model = apply_adapter(load_model(base_folder, dtype=dtype or "auto"), adapter_folder)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with new_folder(output, num_bytes) as folder:
        save_all_but_weights(folder, model, processor)
        _write_weights(folder, model)
        if (adapter_folder / RECIPE_FILE).is_file():
            shutil.copy(adapter_folder / RECIPE_FILE, folder / RECIPE_FILE)
    print(f"wrote {output}: {base} with {adapter} merged into it")


def apply_adapter(model: UGroundForReferringSegmentation, adapter: Path) -> UGroundForReferringSegmentation:
    """
    The model with an adapter merged into its weights, and no trace of peft left.

    Args:
        model: the base; it is changed.
        adapter: folder of the adapter.

    Raises:
        ValueError: the adapter does not fit the model, or holds weights that the model has no place for.
    """
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # what torch and peft raise for shapes and names that differ
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = next((line for line in lines if "mismatch" in line), lines[0])
        raise ValueError(f"the adapter {adapter} does not fit the base ({reason})") from error
    _check_names(adapted, adapter)
    return adapted.merge_and_unload(progressbar=sys.stderr.isatty(), safe_merge=True)


def _check_names(adapted: PeftModel, adapter: Path) -> None:
    """Every tensor of the adapter has been taken, and none was left as it begins: peft itself says nothing of it."""
    with TensorFile(adapter / ADAPTER_WEIGHTS, "adapter file") as stored:
        names = set(stored)
    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    problems = []
    if missing := needed - names:
        problems.append(f"missing {name_some(missing)}")
    # Whole matrices may be stored under their plain names, as after a change of the vocabulary.
    if unexpected := names - needed - set(adapted.state_dict()):
        problems.append(f"unexpected {name_some(unexpected)}")
    if problems:
        raise ValueError(f"the adapter {adapter} does not fit the base: {'; '.join(problems)}")


def _write_weights(folder: Path, model: UGroundForReferringSegmentation) -> None:
    """All weights, tied ones once."""
    writer = ShardWriter(folder)
    written = set()
    for name, tensor in tqdm(model.state_dict().items(), desc="Writing", disable=None):
        if tensor.data_ptr() not in written:
            writer.add(name, tensor)
            written.add(tensor.data_ptr())
    writer.finish()


def _processor(adapter_folder: Path, base_folder: Path) -> UGroundProcessor | None:
    """The processor saved with the adapter, or else with the base, or `None`."""
    for folder in (adapter_folder, base_folder):
        if (folder / PROCESSOR_CONFIG).is_file():
            return UGroundProcessor.from_pretrained(folder)
    return None


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m uground.hub.merge_lora`."""
    usage, example, more = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "python -m uground.hub.merge_lora",
        description=f"{usage}\n\n{more}",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of the adapter")
    parser.add_argument("--base", required=True, metavar="PATH", help="folder or Hub id of what it was trained on")
    parser.add_argument("--output", required=True, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of merging and writing (default: as in the base)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return run_command(
        "merge_lora",
        lambda: merge_lora(
            options.adapter,
            options.base,
            options.output,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
