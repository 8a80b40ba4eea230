"""SAM as UGround asks it: the batch contract, and `segment_anything` fed the same weights and prompts."""

from functools import partial

import pytest
import torch
from test_sam_weights import original_package
from tiny import tiny_config, tiny_model

from uground.hub.weights.sam_weights import sam_config_from_state_dict, sam_from_original
from uground.modeling_uground.head_sam import SamHead
from uground.modeling_uground.image_frames import ImageFrame

# Of float32 sums in another order; 3e-7 is measured on logits of order 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tiny_decoder() -> SamHead:
    """64-pixel frames, 16 prompt channels, every parameter random."""
    return tiny_model().mask_decoder


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch():
    """Two images, with one and three segments."""
    return {
        "image_embeddings": random(2, 16, 4, 4),
        "segment_image": torch.tensor([0, 1, 1, 1]),
        "embedding_prompts": random(4, 16, seed=1),
        "mask_prompts": random(4, 16, 16, seed=2) * 3,
    }


def without(batch, *names):
    return {name: None if name in names else value for name, value in batch.items()}


PROMPTS = {"both": (), "embedding only": ("mask_prompts",), "mask only": ("embedding_prompts",)}


@pytest.mark.parametrize("absent", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_one_call_over_two_images_equals_the_loop(batch, absent):
    decoder, batch = tiny_decoder(), without(batch, *absent)
    masks, iou_scores = decoder(**batch)
    assert masks.shape == (4, 16, 16)
    assert iou_scores.shape == (4,)
    for segment, image in enumerate([0, 1, 1, 1]):
        alone = {
            name: value if value is None else value[segment : segment + 1]
            for name, value in batch.items()
            if name.endswith("prompts")
        }
        mask, iou_score = decoder(batch["image_embeddings"][image : image + 1], torch.tensor([0]), **alone)
        torch.testing.assert_close(mask[0], masks[segment], **TOLERANCE)
        torch.testing.assert_close(iou_score[0], iou_scores[segment], **TOLERANCE)


@torch.no_grad()
def test_every_input_matters(batch):
    decoder = tiny_decoder()
    masks, iou_scores = decoder(**batch)
    changes = {
        "image_embeddings": batch["image_embeddings"].flip(0),
        "segment_image": torch.tensor([1, 0, 0, 0]),
        "embedding_prompts": -batch["embedding_prompts"],
        "mask_prompts": -batch["mask_prompts"],
    }
    for name, value in changes.items():
        changed, changed_scores = decoder(**{**batch, name: value})
        assert ((changed - masks).abs().amax((1, 2)) > 1e-3).all(), name
        assert ((changed_scores - iou_scores).abs() > 1e-4).all(), name


@torch.no_grad()
def test_the_order_of_segments_is_free(batch):
    decoder, order = tiny_decoder(), torch.tensor([2, 0, 3, 1])
    masks, _ = decoder(**batch)
    shuffled, _ = decoder(
        batch["image_embeddings"], *(batch[name][order] for name in list(batch) if name != "image_embeddings")
    )
    torch.testing.assert_close(shuffled, masks[order], **TOLERANCE)


def test_no_segments_are_an_ordinary_case(batch):
    nothing = {name: value[:0] for name, value in batch.items() if name != "image_embeddings"}
    masks, iou_scores = tiny_decoder()(batch["image_embeddings"], **nothing)
    assert masks.shape == (0, 16, 16)
    assert iou_scores.shape == (0,)


@torch.no_grad()
def test_an_exported_decoder_takes_any_number_of_segments(batch):
    decoder, segments = tiny_decoder(), torch.export.Dim("segments", max=64)
    order = ("image_embeddings", "segment_image", "embedding_prompts", "mask_prompts")
    shapes = ({}, *[{0: segments}] * 3)
    program = torch.export.export(decoder, tuple(batch[name] for name in order), dynamic_shapes=shapes).module()
    for count in (1, 3, 7):
        image = torch.tensor([0, 1, 1, 0, 1, 0, 0])[:count]
        tensors = (batch["image_embeddings"], image, random(count, 16, seed=3), random(count, 16, 16, seed=4))
        for found, expected in zip(program(*tensors), decoder(*tensors), strict=True):
            torch.testing.assert_close(found, expected, **TOLERANCE)


def test_half_precision_gives_float32_logits(batch):
    decoder = tiny_decoder().to(torch.bfloat16)
    frames = random(2, 3, 64, 64)
    embeddings = decoder.encode(frames)
    assert embeddings.dtype == torch.bfloat16
    masks, iou_scores = decoder(**{**batch, "image_embeddings": embeddings})
    assert masks.dtype == iou_scores.dtype == torch.float32
    assert masks.isfinite().all()


def test_gradients_reach_prompts_and_decoder(batch):
    decoder = tiny_decoder()
    for name in ("image_embeddings", "embedding_prompts", "mask_prompts"):
        batch[name].requires_grad_()
    masks, iou_scores = decoder(**batch)
    (masks.square().sum() + iou_scores.sum()).backward()
    for name in ("image_embeddings", "embedding_prompts", "mask_prompts"):
        assert (batch[name].grad.flatten(1).abs().sum(1) > 1e-4).all(), name
    assert decoder.sam.prompt_encoder.mask_embed.conv1.weight.grad.abs().sum() > 1e-4
    assert decoder.sam.mask_decoder.mask_tokens.weight.grad.abs().sum() > 1e-4


def test_masks_live_at_a_quarter_of_the_frame():
    head = SamHead(tiny_config().sam_config)
    assert head.side == 16
    assert head.frame == ImageFrame("letterbox", 64)


def test_patches_of_another_size_are_refused():
    config = tiny_config().sam_config
    config.vision_config.patch_size = 8
    with pytest.raises(ValueError, match="the SAM of UGround has patches of 16 pixels, got 8"):
        SamHead.frame_of(config)


POINTS = torch.tensor([[10.0, 20.0], [50.5, 3.25], [0.0, 63.0], [31.0, 40.0], [12.0, 12.0]])
LABELS = torch.tensor([1, 0, -1, 1, -10])


@pytest.fixture
def points():
    """Five points for each of the four segments, no two alike: inside, outside, somewhere and none at all."""
    shifts = torch.tensor([0.0, 1.5, 3.0, -2.0])[:, None, None]
    labels = torch.stack([LABELS, LABELS.roll(1), LABELS.flip(0), LABELS.roll(2)])
    return (POINTS + shifts).clamp(0, 63), labels


@torch.no_grad()
def test_points_are_those_of_the_sam_of_transformers(batch, points):
    """The same points and labels, one image with its segments at a time, as `SamModel` takes them."""
    head = tiny_decoder()
    masks, scores = head(batch["image_embeddings"], batch["segment_image"], point_prompts=points)
    for image in (0, 1):
        mine = batch["segment_image"] == image
        expected = head.sam(
            image_embeddings=batch["image_embeddings"][image : image + 1],
            input_points=points[0][mine][None],
            input_labels=points[1][mine][None],
            multimask_output=False,
        )
        torch.testing.assert_close(masks[mine], expected.pred_masks[0, :, 0], **TOLERANCE)
        torch.testing.assert_close(scores[mine], expected.iou_scores[0, :, 0], **TOLERANCE)


@torch.no_grad()
def test_embedding_points_and_mask_together_are_what_each_says(batch, points):
    """Points come first among the sparse prompts, then the embedding; the mask is the dense one."""
    head = tiny_decoder()
    masks, scores = head(**batch, point_prompts=points)
    for segment, image in enumerate(batch["segment_image"].tolist()):
        dense = batch["mask_prompts"][segment, None, None]
        sparse, dense = head.sam.prompt_encoder(
            points[0][segment, None, None], points[1][segment, None, None], None, dense
        )
        sparse = torch.cat([sparse, batch["embedding_prompts"][segment].view(1, 1, 1, -1)], 2)
        assert sparse.shape == (1, 1, 5 + 1 + 1, 16)  # transformers adds a point that is none
        expected, expected_scores = head.sam.mask_decoder(
            image_embeddings=batch["image_embeddings"][image : image + 1],
            image_positional_embeddings=head.sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(masks[segment], expected[0, 0, 0], **TOLERANCE)
        torch.testing.assert_close(scores[segment], expected_scores[0, 0, 0], **TOLERANCE)
    for changed in ({"point_prompts": None}, {"embedding_prompts": None}, {"mask_prompts": None}):
        other, _ = head(**{**batch, "point_prompts": points, **changed})
        assert ((other - masks).abs().amax((1, 2)) > 1e-3).all(), changed


@torch.no_grad()
def test_where_a_neutral_or_absent_point_lies_is_no_matter(batch, points):
    head, moved = tiny_decoder(), points[0].clone()
    moved[points[1] < 0] = 5.0
    args = batch["image_embeddings"], batch["segment_image"]
    masks, _ = head(*args, point_prompts=points)
    torch.testing.assert_close(head(*args, point_prompts=(moved, points[1]))[0], masks, **TOLERANCE)
    # But of a neutral point SAM learns that it is there.
    absent = points[1].masked_fill(points[1] == -1, -10)
    assert ((head(*args, point_prompts=(points[0], absent))[0] - masks).abs().amax((1, 2)) > 1e-4).all()
    # And where the others lie matters.
    moved = points[0].clone()
    moved[points[1] >= 0] = 5.0
    assert ((head(*args, point_prompts=(moved, points[1]))[0] - masks).abs().amax((1, 2)) > 1e-3).all()


def test_gradients_reach_points(batch, points):
    places = points[0].requires_grad_()
    masks, _ = tiny_decoder()(batch["image_embeddings"], batch["segment_image"], point_prompts=(places, points[1]))
    masks.square().sum().backward()
    assert (places.grad[points[1] >= 0].abs().sum(-1) > 0).all()
    assert (places.grad[points[1] < 0] == 0).all()


@pytest.mark.parametrize("prompts", [("embedding",), ("mask",), ("points",), ("embedding", "points", "mask")])
def test_what_it_says_is_unused_gets_no_gradient_and_the_rest_does(batch, points, prompts):
    head = tiny_decoder()
    given = {"embedding": batch["embedding_prompts"], "mask": batch["mask_prompts"], "points": points}
    arguments = {"embedding": "embedding_prompts", "mask": "mask_prompts", "points": "point_prompts"}
    embeddings = head.encode(random(2, 3, 64, 64))
    masks, scores = head(embeddings, batch["segment_image"], **{arguments[name]: given[name] for name in prompts})
    (masks.square().sum() + scores.sum()).backward()
    silent = {name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()}
    unused = tuple(f"{part}." for part in head.unused(prompts))
    assert silent == {name for name, _ in head.named_parameters() if name.startswith(unused)}


@pytest.fixture(scope="module")
def original():
    """A tiny random `segment_anything` SAM with patches of 16 pixels, four to a side."""
    modeling = original_package("modeling")
    torch.manual_seed(0)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=64,
            patch_size=16,
            embed_dim=32,
            depth=2,
            num_heads=4,
            mlp_ratio=2,
            out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=8
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=32,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=48),
            iou_head_depth=3,
            iou_head_hidden_dim=24,
        ),
    )
    with torch.no_grad():
        for parameter in sam.parameters():
            # Zero tables and unit norms would hide a wrong name.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return sam.eval()


@pytest.mark.parametrize("absent", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_masks_are_those_of_segment_anything(original, absent):
    """The projected segment state stands where points would, the similarity map is the mask prompt; one mask each."""
    weights = original.state_dict()
    decoder = SamHead(sam_config_from_state_dict(weights)).eval()
    decoder.sam.load_state_dict(sam_from_original(weights))
    frames, embedding_prompts, mask_prompts = (
        random(2, 3, 64, 64),
        random(4, 32, seed=1),
        random(4, 16, 16, seed=2) * 3,
    )
    image_embeddings, segment_image = decoder.encode(frames), torch.tensor([0, 1, 1, 1])
    torch.testing.assert_close(image_embeddings, original.image_encoder(frames), **TOLERANCE)
    given = without({"embedding_prompts": embedding_prompts, "mask_prompts": mask_prompts}, *absent)
    masks, iou_scores = decoder(image_embeddings, segment_image, **given)
    assert masks.std() > 0.05
    for segment, image in enumerate(segment_image.tolist()):
        mask_prompt = given["mask_prompts"]
        sparse, dense = original.prompt_encoder(
            None, None, None if mask_prompt is None else mask_prompt[segment : segment + 1, None]
        )
        if given["embedding_prompts"] is not None:
            sparse = torch.cat([sparse.expand(1, -1, -1), embedding_prompts[segment][None, None]], dim=1)
        expected, expected_score = original.mask_decoder(
            image_embeddings=image_embeddings[image : image + 1],
            image_pe=original.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(masks[segment], expected[0, 0], **TOLERANCE)
        torch.testing.assert_close(iou_scores[segment], expected_score[0, 0], **TOLERANCE)
