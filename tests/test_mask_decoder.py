"""SAM as UGround asks it: the batch contract, and `segment_anything` fed the same weights and prompts."""

from functools import partial

import pytest
import torch
from test_sam_weights import original_package
from tiny import tiny_config, tiny_model

from uground.hub.sam_weights import sam_config_from_state_dict, sam_from_original
from uground.modeling_uground.mask_decoder import MaskDecoder

# Of float32 sums in another order; 3e-7 is measured on logits of order 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tiny_decoder() -> MaskDecoder:
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


def test_low_resolution_is_a_quarter_of_the_frame():
    assert MaskDecoder(tiny_config().sam_config).low_resolution == 16


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
    decoder = MaskDecoder(sam_config_from_state_dict(weights)).eval()
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
