"""Merging an adapter gives the outputs of base and adapter, with everything that was trained beside it."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import REJECT_TOKEN, SEGMENT_TOKEN, tiny_inputs, tiny_model
from tiny_processor import tiny_processor
from transformers import AutoModel, AutoProcessor

from uground.hub.merge_lora import build_parser, main
from uground.hub.weights import checkpoint_writer
from uground.modeling_uground import UGroundForReferringSegmentation

ROWS = [[5, 6, SEGMENT_TOKEN, 9], [7, SEGMENT_TOKEN, 8, SEGMENT_TOKEN]]
LORA = {
    "r": 4,
    "lora_alpha": 16,
    "target_modules": r".*language_model.*\.(q_proj|v_proj)",
    "modules_to_save": ["segment_projection", "layer_policy", "similarity_scaling", "mask_decoder.sam.mask_decoder"],
    "trainable_token_indices": {"embed_tokens": [SEGMENT_TOKEN, REJECT_TOKEN], "lm_head": [SEGMENT_TOKEN]},
}


def write_adapter(folder, model, **changes):
    """An adapter whose every weight was drawn anew; returns the adapted model."""
    adapted = get_peft_model(model, LoraConfig(**(LORA | changes)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of base and adapter, and what the two together compute."""
    folder = tmp_path_factory.mktemp("lora")
    model = tiny_model()
    model.save_pretrained(folder / "base")
    tiny_processor().save_pretrained(folder / "base")
    adapted = write_adapter(folder / "adapter", model)
    with torch.no_grad():
        outputs = adapted(**tiny_inputs(ROWS), layer_index=torch.tensor([1, 4, 2]))
    return folder, outputs


def merge(adapter, base, output, *flags) -> int:
    return main([*map(str, (adapter, "--base", base, "--output", output, *flags))])


def test_outputs_are_those_of_base_and_adapter(trained, tmp_path):
    folder, expected = trained
    assert merge(folder / "adapter", folder / "base", tmp_path / "out") == 0
    merged = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    base = UGroundForReferringSegmentation.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        found = merged(**tiny_inputs(ROWS), layer_index=torch.tensor([1, 4, 2]))
        before = base(**tiny_inputs(ROWS), layer_index=torch.tensor([1, 4, 2]))
    for name in ("logits", "layer_logits", "similarity_map", "mask_logits", "iou_scores"):
        assert (found[name] - expected[name]).abs().max() <= 1e-4, name
        assert (before[name] - expected[name]).abs().max() > 1e-2, name


def test_the_output_is_a_whole_checkpoint_of_the_same_tensors(trained, tmp_path):
    folder, _ = trained
    assert merge(folder / "adapter", folder / "base", tmp_path / "out") == 0
    base, merged = (load_file(path / "model.safetensors") for path in (folder / "base", tmp_path / "out"))
    assert len(base) == len(merged) and not any("lora" in name or "modules_to_save" in name for name in merged)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "base", tmp_path / "out")]
    for key in ("segment_token_id", "similarity_scaling", "layer_selection", "prompts", "architectures", "dtype"):
        assert configs[1][key] == configs[0][key]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.segment_token_id == SEGMENT_TOKEN


def test_dtype_and_a_base_without_a_processor(trained, tmp_path):
    folder, _ = trained
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert merge(folder / "adapter", tmp_path / "base", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "out/processor_config.json").exists()
    assert merge(folder / "adapter", tmp_path / "base", tmp_path / "other", "--dtype", "float32") == 0
    assert load_file(tmp_path / "other/model.safetensors")["layer_policy.gates"].dtype == torch.float32


def test_the_processor_of_the_adapter_comes_first(trained, tmp_path):
    folder, _ = trained
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    tiny_processor(chat_template="{{ 'another ' }}").save_pretrained(adapter)
    assert merge(adapter, folder / "base", tmp_path / "out") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.chat_template == "{{ 'another ' }}"


# --------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, message: str, *arguments) -> None:
    assert merge(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("merge_lora: error: ") and message in error, error
    assert not list(arguments[2].parent.glob(f"{arguments[2].name}*"))


def test_adapter_and_base_are_what_they_should_be(trained, tmp_path, capsys):
    folder, _ = trained
    adapter, base, out = folder / "adapter", folder / "base", tmp_path / "out"
    refused(capsys, "holds no adapter_config.json", base, base, out)
    refused(capsys, "holds no config.json", adapter, adapter, out)
    refused(capsys, "neither a folder nor a Hub id", tmp_path / "no where", base, out)
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "adapter_model.safetensors").unlink()
    refused(capsys, "holds no adapter_model.safetensors", copy, base, out)


def test_an_adapter_of_another_model(trained, tmp_path, capsys):
    folder, _ = trained
    base, out = folder / "base", tmp_path / "out"
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    weights = load_file(copy / "adapter_model.safetensors")
    name = "base_model.model.lmm.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file(weights | {name: torch.ones(4, 8)}, copy / "adapter_model.safetensors")
    refused(capsys, "does not fit the base (size mismatch for", copy, base, out)
    lost = {key: tensor for key, tensor in weights.items() if key != name}
    save_file(lost, copy / "adapter_model.safetensors")
    refused(capsys, f"does not fit the base: missing {name}", copy, base, out)
    more = name.replace("layers.1", "layers.9")
    save_file(weights | {more: torch.ones(4, 16)}, copy / "adapter_model.safetensors")
    refused(capsys, f"does not fit the base: unexpected {more}", copy, base, out)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["no_such_proj"]}))
    refused(capsys, "No modules were targeted for adaptation", copy, base, out)


def test_a_full_disk(trained, tmp_path, capsys, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half of a file")
        raise OSError(28, "No space left on device")

    folder, _ = trained
    monkeypatch.setattr(checkpoint_writer, "save_file", fail)
    refused(capsys, "No space left on device", folder / "adapter", folder / "base", tmp_path / "out")


def test_the_adapter_itself_loads_by_peft(trained):
    """What is merged is what peft would load beside the base."""
    folder, expected = trained
    base = UGroundForReferringSegmentation.from_pretrained(folder / "base")
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        found = adapted(**tiny_inputs(ROWS), layer_index=torch.tensor([1, 4, 2]))
    assert (found.mask_logits - expected.mask_logits).abs().max() <= 1e-5


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("ADAPTER", "--base", "--output", "--dtype"))
