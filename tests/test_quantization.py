"""Loading, asking and training with weights that bitsandbytes really quantised, on the CPU."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import SEGMENT_TOKEN, tiny_config, tiny_inputs
from tiny_processor import tiny_processor
from tiny_training import example, tiny_trainer
from transformers import AutoModel, BitsAndBytesConfig

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.training.adapters import lora_config, quantization_config, with_adapter

KINDS = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}
ROWS = [[5, SEGMENT_TOKEN, 6], [7, 8, SEGMENT_TOKEN, 9, SEGMENT_TOKEN]]
MASK_PATH = ("mask_decoder", "segment_projection", "layer_policy", "similarity_scaling", "lm_head")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model whose layers are multiples of 64 wide, as bitsandbytes wants them on the CPU."""
    config = tiny_config().to_dict()
    lmm = config["lmm_config"]
    for part in ("text_config", "vision_config"):
        lmm[part] = {**lmm[part], "hidden_size": 128, "intermediate_size": 256}
    lmm["text_config"].pop("head_dim", None)
    torch.manual_seed(0)
    model = UGroundForReferringSegmentation(
        UGroundConfig(
            lmm_config=lmm,
            sam_config=config["sam_config"],
            segment_token_id=config["segment_token_id"],
            reject_token_id=config["reject_token_id"],
        )
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    folder = tmp_path_factory.mktemp("wide")
    model.eval().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def quantised(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_models_answer_and_keep_the_mask_path(checkpoint, kind):
    plain = AutoModel.from_pretrained(checkpoint).eval()
    model = AutoModel.from_pretrained(checkpoint, quantization_config=KINDS[kind]).eval()
    names = quantised(model)
    assert any("language_model.layers" in name for name in names)
    assert not any(part in name.split(".") for name in names for part in MASK_PATH)
    kept = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.split(".")[0] in MASK_PATH or "lm_head" in name:
            assert torch.equal(kept[name], parameter) and kept[name].dtype == torch.float32, name
    inputs = tiny_inputs(ROWS)
    with torch.no_grad():
        wanted = plain(**inputs, layer_selection="last")
        found = model(**inputs, layer_selection="last")
    assert found.mask_logits.shape == wanted.mask_logits.shape and found.mask_logits.isfinite().all()
    # Near the plain model's, and not the same: the weights are rounded.
    error = (found.logits - wanted.logits).norm() / wanted.logits.norm()
    assert 1e-4 < error < (0.35 if kind == "4bit" else 0.1)
    asked = {name: value for name, value in tiny_inputs([[5, 6]]).items() if name != "labels"}
    assert model.segment(**asked, max_new_tokens=3).sequences.shape[0] == 1


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_an_adapter_is_trained_on_quantised_weights(checkpoint, tmp_path, kind):
    processor = tiny_processor()
    load = {"quantization_config": quantization_config(kind)}
    model = UGroundForReferringSegmentation.from_pretrained(checkpoint, **load)
    assert all("language_model.layers" in name for name in quantised(model))
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    adapted = with_adapter(model, lora_config(model, processor, 4, dropout=0.0))
    trainer = tiny_trainer(
        tmp_path, [example(number) for number in range(4)], adapted, max_steps=2, learning_rate=0.01
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    after = trainer.model.get_base_model().state_dict()
    frozen = [name for name in before if "language_model.layers" in name and name in after]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    moved = [name for name, value in trainer.model.named_parameters() if "lora_B" in name and value.abs().sum() > 0]
    assert moved
    inputs = tiny_inputs(ROWS)
    trained = trainer.model.eval()
    again = UGroundForReferringSegmentation.from_pretrained(checkpoint, **load)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted, found = (one(**inputs, layer_selection="last").mask_logits for one in (trained, again))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_quantised_weights_load_again_and_their_mask_path_is_looked_at(checkpoint, tmp_path, kind):
    """Packed weights are bytes by design; what was left as it is must still hold numbers with a fraction."""
    model = UGroundForReferringSegmentation.from_pretrained(checkpoint, quantization_config=KINDS[kind]).eval()
    model.save_pretrained(tmp_path)
    again = UGroundForReferringSegmentation.from_pretrained(tmp_path).eval()
    assert quantised(again) == quantised(model)
    inputs = tiny_inputs(ROWS)
    with torch.no_grad():
        wanted, found = (one(**inputs, layer_selection="last").logits for one in (model, again))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(value.dtype in (torch.uint8, torch.int8) for value in tensors.values())
    name = "segment_projection.linear_1.weight"
    save_file({**tensors, name: tensors[name].int()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"of the wrong type: {name} \(got I32, expected float\)$"):
        UGroundForReferringSegmentation.from_pretrained(tmp_path)
