"""LoRA on a tiny model: what is trained, saving, continuing and merging; quantised loading as far as it goes here."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import REJECT_TOKEN, SEGMENT_TOKEN, tiny_inputs, tiny_model
from tiny_processor import tiny_processor
from tiny_training import tiny_trainer

from uground.training.adapters import (
    lora_config,
    quantization_config,
    trained_in_full,
    with_adapter,
    with_saved_adapter,
)
from uground.training.sam_cache import SamEmbeddingCache


def adapted(rank: int = 4, **settings):
    """A tiny model with a new adapter."""
    model = tiny_model(**settings).train()
    return with_adapter(model, lora_config(model, tiny_processor(), rank, dropout=0.0))


def outputs_of(model) -> dict:
    """What a model makes of two rows with three segments."""
    inputs = tiny_inputs([[5, 6, SEGMENT_TOKEN, 7], [8, SEGMENT_TOKEN, 9, SEGMENT_TOKEN]])
    with torch.no_grad():
        found = model.eval()(**inputs, layer_selection="argmax")
    return {name: found[name] for name in ("logits", "layer_logits", "similarity_map", "mask_logits")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has trained an adapter for three steps, and the folder it saved it to."""
    folder = tmp_path_factory.mktemp("adapter")
    trainer = tiny_trainer(
        folder, model=adapted(), max_steps=3, learning_rate=1e-2, iou_weight=0.5, gradient_checkpointing=True
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    return trainer, folder, before


def test_only_the_language_model_is_adapted_and_only_new_rows_are_trained(trained):
    trainer, _, before = trained
    named = dict(trainer.model.named_parameters())
    lora = [name for name in named if "lora_" in name]
    assert lora and all("language_model" in name and ("q_proj" in name or "v_proj" in name) for name in lora)
    rows = [named[name] for name in named if "trainable_tokens_delta" in name]
    assert [tuple(row.shape) for row in rows] == [(2, 16), (2, 16)]
    trained_names = {name for name, parameter in named.items() if parameter.requires_grad}
    kinds = ("lora_", "trainable_tokens_delta", "modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in trained_names)
    parts = trained_in_full(tiny_model())
    assert {"mask_decoder.sam.mask_decoder", "segment_projection", "layer_policy", "similarity_scaling"} <= {*parts}
    for part in parts:
        assert any(part in name for name in trained_names), part
    # lora_A moves from the second step on: lora_B begins at zero.
    unchanged = {name for name in trained_names if torch.equal(named[name], before[name])}
    assert not unchanged
    assert all(torch.equal(parameter, before[name]) for name, parameter in named.items() if name not in trained_names)
    assert {SEGMENT_TOKEN, REJECT_TOKEN} == set(
        trainer.model.peft_config["default"].trainable_token_indices["lm_head"]
    )


def test_frozen_encoders_run_without_a_graph_under_gradient_checkpointing(trained):
    bare = trained[0].bare_model
    frames = torch.randn(1, 3, 64, 64)
    trained[0].model.train()
    assert not bare.mask_decoder.encode(frames).requires_grad
    assert not bare.lmm.model.vision_tower(torch.randn(1, 3, 32, 32)).last_hidden_state.requires_grad


def test_an_adapter_is_saved_reloaded_and_merged(trained):
    trainer, folder, _ = trained
    expected = outputs_of(trainer.model)
    assert not (folder / "model.safetensors").exists()
    reloaded = PeftModel.from_pretrained(tiny_model(), folder)
    for name, value in outputs_of(reloaded).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4, msg=name)
    gates = trainer.bare_model.layer_policy.gates
    assert torch.equal(reloaded.get_base_model().layer_policy.gates, gates) and gates.abs().sum() > 0
    merged = reloaded.merge_and_unload()
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
    for name, value in outputs_of(merged).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4, msg=name)
    plain = outputs_of(tiny_model())
    assert (plain["mask_logits"] - expected["mask_logits"]).abs().max() > 1e-2


def test_an_adapter_is_trained_further(trained, tmp_path):
    _, folder, _ = trained
    model = with_saved_adapter(tiny_model().train(), str(folder))
    saved = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    tiny_trainer(tmp_path, model=model, max_steps=1).train()
    now = get_peft_model_state_dict(model)
    assert set(now) == set(saved)
    assert any(not torch.equal(now[name], value) for name, value in saved.items() if "lora_" in name)


def test_an_adapter_on_a_base_in_bfloat16_comes_back_as_it_was_saved(trained):
    _, folder, _ = trained
    model = with_saved_adapter(tiny_model().to(torch.bfloat16).train(), str(folder))
    stored, read = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert set(stored) == set(read)
    for name, value in stored.items():
        assert torch.equal(read[name], value), name


def test_what_is_trained_is_held_in_float32():
    model = tiny_model().to(torch.bfloat16)
    model = with_adapter(model, lora_config(model, tiny_processor(), 4))
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_adapters_for_causal_language_models_run(tmp_path):
    """They pass every forward the names of transformers, wanted or not, and generate through the model."""
    inputs = tiny_inputs([[5, 6, SEGMENT_TOKEN, 7], [8, SEGMENT_TOKEN, 9, SEGMENT_TOKEN]])
    prompts = tiny_inputs([[5, 6], [7]])
    plain = outputs_of(tiny_model())
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    output = model(**inputs, labels=inputs["input_ids"], layer_selection="argmax", output_hidden_states=True)
    assert len(output.hidden_states) == 5 and output.mask_logits.shape == (3, 16, 16)
    (output.loss + output.mask_logits.square().mean()).backward()
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name and "vision" not in name]
    assert lora and all(parameter.grad.any() for parameter in lora)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    model.eval()
    written = model.generate(**prompts, max_new_tokens=4)
    assert torch.equal(model.segment(**prompts, max_new_tokens=4).sequences, written)
    adapted_outputs = outputs_of(model)
    assert (adapted_outputs["logits"] - plain["logits"]).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    for name, value in outputs_of(again).items():
        torch.testing.assert_close(value, adapted_outputs[name], atol=1e-5, rtol=1e-4, msg=name)
    with model.disable_adapter():
        assert torch.equal(outputs_of(model)["logits"], plain["logits"])


def test_layers_that_are_not_there_cannot_be_adapted():
    with pytest.raises(ValueError, match="no layer of the language model is called fc9: nothing to adapt"):
        lora_config(tiny_model(), tiny_processor(), 4, targets=["fc9"])


def test_quantisations_that_cannot_be_had(monkeypatch):
    assert quantization_config("none") is None
    with pytest.raises(ValueError, match="quantization must be one of"):
        quantization_config("2bit")
    monkeypatch.setattr("uground.training.adapters.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="4bit needs bitsandbytes, which is not installed"):
        quantization_config("4bit")


def test_embeddings_are_cached_once_and_read_by_later_runs(tmp_path):
    folder = tmp_path / "cache"

    def run(name: str, **settings):
        trainer = tiny_trainer(tmp_path / name, max_steps=4, per_device_train_batch_size=4, **settings)
        trainer.train()
        return trainer

    plain = run("plain")
    first = run("first", cache_sam_embeddings=str(folder))
    again = run("again", cache_sam_embeddings=str(folder))
    assert first._sam_cache.encoded == 8 and again._sam_cache.encoded == 0
    assert len(list(folder.rglob("*.safetensors"))) == 8
    for trainer in (first, again):
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value, plain.model.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_the_cache_has_a_limit_distrusts_broken_files_and_knows_its_encoder(tmp_path):
    encoder = tiny_model().mask_decoder.sam.vision_encoder.requires_grad_(False)
    embedding = torch.randn(16, 4, 4)
    cache = SamEmbeddingCache(tmp_path, encoder, 2.5 * embedding.nbytes / 2**30)
    for key in ("aa1", "bb2", "cc3"):
        cache.put(key, {"embedding": embedding})
    assert torch.equal(cache.get("aa1")["embedding"], embedding) and cache.get("cc3") is None
    path = next(tmp_path.rglob("bb2.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    assert cache.get("bb2") is None
    other = tiny_model(seed=1).mask_decoder.sam.vision_encoder.requires_grad_(False)
    assert SamEmbeddingCache(tmp_path, other, 1.0).get("aa1") is None
    assert torch.equal(SamEmbeddingCache(tmp_path, encoder, 1.0).get("aa1")["embedding"], embedding)
    with pytest.raises(ValueError, match="is trained, so its embeddings cannot be cached"):
        SamEmbeddingCache(tmp_path, encoder.requires_grad_(True), 1.0)
