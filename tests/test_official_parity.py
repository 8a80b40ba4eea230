"""A converted checkpoint computes what the official code computed: outputs, losses and gradients, in float32."""

import pytest
import torch
from official_case import CASES, OfficialCase

from uground.modeling_uground.image_frames import apply_matrices, grid_to_image
from uground.processing import post_process_masks
from uground.training.objectives.official import official_losses

KINDS = ("last", "policy")
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=CASES, ids=lambda folder: folder.name)
def case(request, tmp_path_factory):
    return OfficialCase(request.param, tmp_path_factory.mktemp("official") / "converted")


@pytest.fixture(scope="module")
def outputs(case):
    with torch.no_grad():
        return {kind: case.run(kind) for kind in KINDS}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def test_inputs_are_the_same_to_the_last_bit(case):
    for prefix, name in (("", "clip"), ("sam_", "sam")):
        sums = case.pixels[f"{prefix}pixel_values"].double().sum((1, 2, 3))
        assert torch.equal(sums, case.tensors[f"in.{name}_checksum"])
        assert case.pixels[f"{prefix}valid_sizes"].tolist() == case.facts[f"{name}_resize"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_token(case, outputs, kind):
    """Text padding included; the column of `<image>` is ours alone."""
    expected = case.tensors[f"{kind}.logits"]
    assert outputs[kind].logits.shape[-1] == expected.shape[-1] + 1
    assert difference(outputs[kind].logits[..., :-1], expected) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_and_its_map(case, outputs, kind):
    expected = case.tensors[f"{kind}.similarity"]
    assert difference(outputs[kind].similarity.flatten(1), expected) <= TOLERANCE * expected.abs().max()
    for group in case.target_groups():
        image, config = group["images"][0], case.model.config
        image_hw = tuple(case.pixels["original_sizes"][image].tolist())
        matrices = grid_to_image(config.token_grid_hw, config.adapter.frame, image_hw)
        maps = apply_matrices(outputs[kind].similarity_map[group["segments"]], *matrices)
        assert difference(maps[:, ::2, ::2], case.tensors[f"{kind}.similarity_map.{image}"]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_masks(case, outputs, kind):
    for group in case.target_groups():
        image = group["images"][:1]
        (masks,) = post_process_masks(
            [outputs[kind].mask_logits[group["segments"]]],
            case.pixels["sam_valid_sizes"][image],
            case.pixels["original_sizes"][image],
        )
        expected = case.tensors[f"{kind}.mask_logits.{image.item()}"]
        # Logits of a toy are small, so the tolerance is a share of them.
        assert difference(masks[:, ::2, ::2], expected) <= TOLERANCE * min(1.0, expected.abs().max().item())


def test_layer_policy(case, outputs):
    found = outputs["policy"]
    assert difference(found.layer_logits, case.tensors["policy.layer_logits"]) <= TOLERANCE
    assert found.layer_index.tolist() == case.facts["results"]["policy"]["actions"]
    assert outputs["last"].layer_index.tolist() == [found.layer_logits.shape[1] - 1] * len(found.layer_logits)


@pytest.fixture(scope="module")
def baseline(case):
    return case.baseline()


@pytest.fixture(scope="module")
def losses(case, baseline):
    """Of both runs; the second one with its gradients, from a policy whose running reward begins at 0."""
    found = {}
    for kind in KINDS:
        used = baseline if kind == "policy" else None
        found[kind] = official_losses(
            case.run(kind), case.target_groups(), case.geometry(), used, case.config.get("baseline_beta", 1.0)
        )
    case.model.zero_grad()
    found["policy"].loss.backward()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss(case, losses, kind):
    expected = {name: value for name, value in case.facts["results"][kind].items() if name != "actions"}
    assert {"loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "policy_loss", "reward"} <= set(expected)
    for name, value in expected.items():
        assert getattr(losses[kind], name).item() == pytest.approx(value, rel=TOLERANCE), name


def test_gradients_of_the_total_loss(case, losses):
    model = case.model
    parameters = {
        "gate": model.layer_policy.gates,
        "text_fc0": model.segment_projection.linear_1.weight,
        "q0": model.lmm.model.language_model.layers[0].self_attn.q_proj.weight,
    }
    for name, parameter in parameters.items():
        expected = case.tensors[f"policy.grad.{name}"]
        assert (parameter.grad - expected).norm() <= GRADIENT_TOLERANCE * expected.norm(), name


def test_the_running_reward_takes_the_batch_in_before_it_is_used(baseline, losses):
    found = losses["policy"]
    if baseline.critic is None:
        assert baseline.reward_ema.item() == pytest.approx(0.1 * found.reward.item(), rel=1e-6)
        assert baseline.reward_updates.item() == 1
    else:
        assert baseline.reward_updates.item() == 0
