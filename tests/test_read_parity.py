"""A converted READ computes what the official code computed: points, masks, losses and gradients, in float32."""

import pytest
import torch
from read_case import CASES, ReadCase

from uground.modeling_uground.image_frames import apply_matrices, grid_to_image
from uground.modeling_uground.prompt_points import (
    cell_centres,
    continuous_points,
    minmax,
    select_cells,
    selection_grid,
)
from uground.processing import post_process_masks
from uground.training.objectives.official_read import read_losses

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
# What flows through the points is small, and lies further from the loss.
POINT_GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=CASES, ids=lambda folder: folder.name)
def case(request, tmp_path_factory):
    return ReadCase(request.param, tmp_path_factory.mktemp("read") / "converted")


@pytest.fixture(scope="module")
def outputs(case):
    """With gradients; those of what lies between the parts are kept."""
    found = case.model(**case.inputs)
    found.similarity.retain_grad()
    found.points.retain_grad()
    return found


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def is_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    assert found.shape == expected.shape
    return (found - expected).norm().item() <= tolerance * expected.norm().item()


def test_inputs_are_the_same_to_the_last_bit(case):
    for prefix, name in (("", "clip"), ("sam_", "sam")):
        pixels = case.pixels[f"{prefix}pixel_values"].double()
        assert torch.equal(pixels.sum((1, 2, 3)), case.tensors[f"in.{name}_checksum"])
        assert torch.equal(pixels.abs().sum((1, 2, 3)), case.tensors[f"in.{name}_abs_checksum"])
    assert case.pixels["sam_valid_sizes"].tolist() == case.facts["sam_resize"]
    assert case.pixels["valid_sizes"].eq(336).all()


def test_logits(case, outputs):
    """At every text token and at every 48th image token; the column of `<image>` is ours alone."""
    logits = outputs.logits.detach()[..., :-1]
    start, count = case.facts["image_start"], 576
    text = torch.cat([logits[:, :start], logits[:, start + count :]], 1)
    assert difference(text, case.tensors["logits"]) <= TOLERANCE
    assert difference(logits[:, start : start + count : 48], case.tensors["logits_image"]) <= TOLERANCE


def test_similarity(case, outputs):
    expected = case.tensors["similarity"]
    assert difference(outputs.similarity.detach().flatten(1), expected) <= TOLERANCE
    assert outputs.segment_row.tolist() == [segment["row"] for segment in case.facts["segments"]]


def selection(case, number: int, similarity: torch.Tensor):
    """Of one segment: the grid, the chosen cells, their labels, and the size of the image."""
    config = case.model.config
    image_hw = tuple(case.facts["sizes"][case.facts["segments"][number]["image"]][:2])
    frame = config.adapter.frame
    grid = selection_grid(similarity, frame.resized(24 // config.point_downsample), image_hw)
    cells, labels = select_cells(grid.flatten(1), config.point_settings)
    return grid, cells, labels, image_hw


def test_every_cell_chosen_is_the_same(case, outputs):
    for number, facts in enumerate(case.facts["segments"]):
        grid, cells, labels, _ = selection(case, number, outputs.similarity.detach()[number : number + 1])
        assert list(grid.shape[1:]) == facts["grid_hw"]
        assert difference(grid[0], case.tensors[f"grid.{number}"]) <= TOLERANCE
        assert torch.equal(cells[0], case.tensors["selected_cells"][number])
        assert torch.equal(labels[0], case.tensors["point_labels"][number].long())
    assert torch.equal(outputs.point_labels, case.tensors["point_labels"].long())


def test_points_in_the_image(case, outputs):
    frame = case.model.config.adapter.frame
    for number in range(len(case.facts["segments"])):
        raw = outputs.similarity.detach()[number : number + 1]
        grid, cells, _, image_hw = selection(case, number, raw)
        matrices = grid_to_image((24, 24), frame, image_hw)
        expected = case.tensors[f"similarity_map.{number}"]
        assert difference(apply_matrices(minmax(raw), *matrices)[0, ::2, ::2], expected) <= TOLERANCE
        points = continuous_points((minmax(raw), *matrices), cell_centres(cells, tuple(grid.shape[1:]), image_hw))
        assert difference(points[0], case.tensors["points_image"][number]) <= TOLERANCE


def test_points_in_the_frame(case, outputs):
    """The official code sums coordinates of up to 1024 in float32, which is as near as the image allows."""
    scale = 1024 / min(max(size[:2]) for size in case.facts["sizes"])
    assert difference(outputs.points.detach(), case.tensors["points_sam"]) <= TOLERANCE * scale


def test_masks(case, outputs):
    expected = case.tensors["low_res_mask_logits"]
    assert difference(outputs.mask_logits.detach()[:, ::2, ::2], expected) <= TOLERANCE * expected.abs().max().item()
    assert difference(outputs.iou_scores.detach(), case.tensors["iou_scores"]) <= TOLERANCE
    for image in range(case.count):
        (masks,) = post_process_masks(
            [outputs.mask_logits.detach()[case.segment_image == image]],
            case.pixels["sam_valid_sizes"][image : image + 1],
            case.pixels["original_sizes"][image : image + 1],
        )
        expected = case.tensors[f"mask_logits.{image}"]
        # Logits of a toy are small, so the tolerance is a share of them.
        assert difference(masks[:, ::2, ::2], expected) <= TOLERANCE * min(1.0, expected.abs().max().item())


@pytest.fixture(scope="module")
def losses(case, outputs):
    sizes = (case.pixels["sam_valid_sizes"], case.pixels["original_sizes"])
    weights = case.facts["loss_weights"]
    return read_losses(outputs, case.masks(), case.segment_image, *sizes, weights["bce"], weights["dice"])


def test_every_loss(case, losses):
    assert {"loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "mask_loss"} == set(case.facts["losses"])
    for name, value in case.facts["losses"].items():
        assert getattr(losses, name).item() == pytest.approx(value, rel=TOLERANCE), name


def test_gradients_of_the_mask_loss_through_the_points(case, outputs, losses):
    layer = case.model.lmm.model.language_model.layers[0].self_attn.q_proj.weight
    of = (layer, outputs.similarity, outputs.points)
    q0, similarity, points = torch.autograd.grad(losses.mask_loss, of, retain_graph=True)
    assert is_near(q0, case.tensors["grad_mask.q0"], GRADIENT_TOLERANCE)
    similarity = similarity.flatten(1)
    assert is_near(similarity, case.tensors["grad_mask.similarity"], POINT_GRADIENT_TOLERANCE)
    # From pixels of the frame to pixels of the image.
    sizes = [
        (case.facts["sizes"][image][1::-1], case.facts["sam_resize"][image][::-1]) for image in case.segment_image
    ]
    scale = torch.tensor([[new / old for old, new in zip(*pair, strict=True)] for pair in sizes])
    expected = case.tensors["grad_mask.points_image"]
    assert is_near(points * scale[:, None], expected, GRADIENT_TOLERANCE)


def test_gradients_of_the_total_loss(case, losses):
    model = case.model
    sam = model.mask_decoder.sam
    layers = model.lmm.model.language_model.layers
    parameters = {
        "q0": layers[0].self_attn.q_proj.weight,
        "v_last": layers[-1].self_attn.v_proj.weight,
        "text_fc0": model.segment_projection.linear_1.weight,
        "text_fc2": model.segment_projection.linear_2.weight,
        "projector0": model.lmm.model.multi_modal_projector.linear_1.weight,
        "not_a_point": sam.prompt_encoder.not_a_point_embed.weight,
        "negative_point": sam.prompt_encoder.point_embed[0].weight,
        "positive_point": sam.prompt_encoder.point_embed[1].weight,
        "mask_tokens": sam.mask_decoder.mask_tokens.weight,
    }
    assert {name.removeprefix("grad.") for name in case.tensors if name.startswith("grad.")} == set(parameters)
    gradients = torch.autograd.grad(losses.loss, list(parameters.values()), retain_graph=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert is_near(gradient, case.tensors[f"grad.{name}"], GRADIENT_TOLERANCE), name
