"""SAM 2 and the tracker of SAM 3 as UGround asks them, against the models of transformers with the same prompts."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_assemble import assemble, random_weights, write_llava
from tiny import SEGMENT_TOKEN, say_only, tiny_config, tiny_inputs, tiny_model, tiny_sam2_config, tiny_sam3_config
from tiny_processor import tiny_processor, tiny_tokenizer
from tiny_training import dataset, example, training_config
from transformers import AutoProcessor, Sam2Model, Sam2VideoConfig, Sam2VideoModel

from uground.checkpoint_loading import check_pair
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.modeling_uground.image_frames import ImageFrame
from uground.processing import UGroundProcessor, make_image_processor, sam2_image_processor
from uground.processing.pipeline_uground import ReferringSegmentationPipeline
from uground.training.objectives.grounding_terms import presence_loss
from uground.training.trainer import UGroundTrainer
from uground.training.training_config import freeze

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
S = SEGMENT_TOKEN
ROWS = [[5, 6, S, 9], [7, 8, 9, S, 11, S]]
CONFIGS = {"sam2": tiny_sam2_config, "sam3": tiny_sam3_config}


def frames(side: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def inputs_for(model, rows=ROWS) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(rows)
    side, count = model.config.frame_size, len(inputs["pixel_values"])
    return {
        **inputs,
        "sam_pixel_values": frames(side, count),
        "sam_valid_sizes": torch.full((count, 2), side),
    }


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(sam_config=CONFIGS[request.param]())


PROMPTS = {"points": (True, False), "mask": (False, True), "both": (True, True), "none": (False, False)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("has_points, has_mask", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_the_head_equals_the_model_of_transformers(model, has_points, has_mask, training):
    head = model.mask_decoder.train(training)
    side = head.frame.side
    pixels, masks = frames(side), torch.randn(2, 1, head.side, head.side) * 3
    points = torch.tensor([[[[10.0, 20.0], [50.5, 3.25]]], [[[0.0, 40.0], [31.0, 12.0]]]])
    labels = torch.tensor([[[1, 0]], [[1, -10]]])
    prompts = {"input_points": points, "input_labels": labels} if has_points else {}
    prompts |= {"input_masks": masks} if has_mask else {}
    expected = head.sam(pixels, multimask_output=False, **prompts)
    found = head(
        head.encode(pixels),
        torch.arange(2),
        mask_prompts=masks[:, 0] if has_mask else None,
        point_prompts=(points[:, 0], labels[:, 0]) if has_points else None,
    )
    for mine, theirs in zip(found, ("pred_masks", "iou_scores", "object_score_logits"), strict=True):
        torch.testing.assert_close(mine, expected[theirs][:, 0, 0], **TOLERANCE)


@torch.no_grad()
def test_evaluation_draws_the_mask_that_is_trained():
    config = tiny_sam2_config()
    head = tiny_model(sam_config=config).mask_decoder
    theirs = Sam2Model(copy.deepcopy(config)).eval()
    theirs.load_state_dict(head.sam.state_dict())
    # Their evaluation takes another mask wherever the first is not stable enough.
    theirs.mask_decoder.dynamic_multimask_stability_thresh = 2.0
    pixels, masks = frames(64), torch.randn(2, 16, 16)
    swapped = theirs(pixels, input_masks=masks[:, None], multimask_output=False).pred_masks[:, 0, 0]
    maps = head.encode(pixels)
    evaluated, trained = (head.train(mode)(maps, torch.arange(2), mask_prompts=masks)[0] for mode in (False, True))
    assert torch.equal(evaluated, trained)
    assert (evaluated - swapped).abs().max() > 1e-3


@torch.no_grad()
def test_one_call_over_two_images_equals_the_loop(model):
    head = model.mask_decoder
    maps, image = head.encode(frames(head.frame.side)), torch.tensor([0, 1, 1, 0])
    prompts = {"embedding_prompts": torch.randn(4, 16), "mask_prompts": torch.randn(4, head.side, head.side)}
    together = head(maps, image, **prompts)
    for number in range(4):
        own = {name: values[number : number + 1] for name, values in prompts.items()}
        one = {name: values[image[number]][None] for name, values in maps.items()}
        for values, alone in zip(together, head(one, torch.zeros(1, dtype=torch.long), **own), strict=True):
            torch.testing.assert_close(values[number], alone[0], **TOLERANCE)
    nothing = head(maps, image[:0], **{name: values[:0] for name, values in prompts.items()})
    assert [tuple(values.shape) for values in nothing] == [(0, head.side, head.side), (0,), (0,)]


def test_the_fourth_map_of_sam3_is_left_alone():
    """`Sam3TrackerModel` adds `no_memory_embedding` to its last map, the head to the one that masks are drawn of."""
    model = tiny_model(sam_config=tiny_sam3_config((4.0, 2.0, 1.0, 0.5)))
    head, pixels, masks = model.mask_decoder, frames(56), torch.randn(2, 16, 16)
    assert list(head.encode(pixels)) == ["fine", "middle", "embedding"]
    three = tiny_model(sam_config=tiny_sam3_config()).mask_decoder
    three.sam.load_state_dict({name: head.sam.state_dict()[name] for name in three.sam.state_dict()})
    with torch.no_grad():
        expected = three.sam(pixels, input_masks=masks[:, None], multimask_output=False).pred_masks[:, 0, 0]
        found = head(head.encode(pixels), torch.arange(2), mask_prompts=masks)[0]
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert "sam.vision_encoder.neck.fpn_layers.3" in head.unused(("mask",))


@pytest.mark.parametrize(
    "prompts", [("embedding", "mask"), ("embedding",), ("mask",), ("embedding", "points"), ("points",)]
)
def test_what_is_unused_and_nothing_else_gets_no_gradient(prompts):
    head = tiny_model(sam_config=tiny_sam3_config((4.0, 2.0, 1.0, 0.5))).mask_decoder.train()
    given = {
        "embedding": {"embedding_prompts": torch.randn(2, 16)},
        "mask": {"mask_prompts": torch.randn(2, 16, 16)},
        "points": {"point_prompts": (torch.rand(2, 3, 2) * 56, torch.tensor([[1, 0, -1], [0, 1, -10]]))},
    }
    decoded = head(head.encode(frames(56)), torch.arange(2), **{k: v for p in prompts for k, v in given[p].items()})
    sum(values.square().sum() for values in decoded).backward()
    silent = {name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()}
    unused = tuple(f"{part}." for part in head.unused(prompts))
    # A bias of keys moves all weights of an attention alike, so that its gradient is rounding or nothing.
    names = {name for name, _ in head.named_parameters() if not name.endswith("k_proj.bias")}
    assert silent & names == {name for name in names if name.startswith(unused)}
    assert "sam.mask_decoder.pred_obj_score_head" in head.unused(prompts, presence=False)


def test_decoder_weights_train_with_kept_maps():
    model = tiny_model(sam_config=tiny_sam2_config())
    head = model.mask_decoder
    with torch.no_grad():
        kept = head.encode(frames(64))
    masks, *_ = head(kept, torch.arange(2), mask_prompts=torch.randn(2, 16, 16))
    masks.square().sum().backward()
    for weight in (head.sam.mask_decoder.conv_s0.weight, head.sam.mask_decoder.conv_s1.weight):
        assert weight.grad.abs().sum() > 1e-4
    assert head.sam.no_memory_embedding.grad.abs().sum() > 1e-4


@torch.no_grad()
def test_the_whole_model_writes_draws_and_keeps(model):
    inputs = inputs_for(model)
    fresh = model(**inputs)
    assert fresh.presence_logits.shape == (3,) and fresh.mask_logits.shape == (3, 16, 16)
    images = model.get_image_embeddings(**inputs)
    kept = model(**inputs, sam_embeddings=images.sam_embeddings)
    torch.testing.assert_close(kept.mask_logits, fresh.mask_logits, **TOLERANCE)
    drawn = model(**inputs, layer_selection="mc", num_layer_samples=4)
    assert drawn.presence_logits.shape == (3,)
    single = model(**{**inputs_for(model, ROWS[:1]), "sam_pixel_values": inputs["sam_pixel_values"][:1]})
    torch.testing.assert_close(single.presence_logits, fresh.presence_logits[:1], atol=1e-4, rtol=1e-4)
    assert model.segment(**inputs, max_new_tokens=3).presence_logits is not None


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UGroundForReferringSegmentation.from_pretrained(tmp_path)
    assert loaded.config.mask_head == "sam2" and type(loaded.config.sam_config) is type(model.config.sam_config)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_configs_that_do_not_fit_are_told_in_a_sentence():
    config = UGroundConfig.for_system("uground", lmm_config=tiny_config().lmm_config, sam_config=tiny_sam2_config())
    assert config.mask_head == "sam2" and config.head_frame == ImageFrame("stretch", 64)
    with pytest.raises(ValueError, match="mask_head of a sam2 must be 'sam2', got 'sam'"):
        tiny_config(sam_config=tiny_sam2_config(), mask_head="sam")
    with pytest.raises(ValueError, match="mask_head of a sam must be 'sam', got 'sam2'"):
        tiny_config(mask_head="sam2")
    with pytest.raises(ValueError, match="got sam2_video, of which only the image part can be used"):
        tiny_config(sam_config=Sam2VideoConfig())
    with pytest.raises(ValueError, match="got edgetam, whose encoder needs the package timm"):
        tiny_config(sam_config={"model_type": "edgetam"})
    uneven = tiny_sam2_config()
    uneven.vision_config.backbone_feature_sizes = [[8, 8], [4, 4], [2, 2]]
    with pytest.raises(ValueError, match="backbone_feature_sizes of a SAM 2 with that frame must be"):
        tiny_config(sam_config=uneven)


def processor_for(config) -> UGroundProcessor:
    frame = sam2_image_processor(config.frame_size)
    return UGroundProcessor(make_image_processor("letterbox", 32), frame, tiny_tokenizer(), patch_size=8)


def test_a_frame_of_another_head_is_refused():
    """Of the same side, so that nothing else would tell, and every mask would lie elsewhere."""
    model, other = tiny_model(sam_config=tiny_sam2_config()), tiny_model()
    own, letterbox = processor_for(model.config), tiny_processor()
    for one, processor, said, made in (
        (model, letterbox, "stretch", "letterbox"),
        (other, own, "letterbox", "stretch"),
    ):
        sentence = f"for the mask head the config says '{said}', and the processor makes a '{made}'$"
        with pytest.raises(ValueError, match=sentence):
            ReferringSegmentationPipeline(model=one, processor=processor)
        with pytest.raises(ValueError, match=sentence):
            one.image_session(Image.new("RGB", (40, 90)), processor)
        with pytest.raises(ValueError, match=sentence):
            check_pair(one.config, processor, "here")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("width, height", [(40, 90), (121, 30), (64, 64)])
def test_a_cell_of_the_frame_lies_over_its_part_of_the_image(kind, width, height):
    """Four corners and the centre: where pixels are bright in the image, a mask of the same cells is in the image."""
    config = tiny_config(sam_config=CONFIGS[kind]())
    processor, picture = processor_for(config), np.zeros((height, width, 3), np.uint8)
    box = (width * 3 // 4, height // 4, width, height // 2)
    picture[box[1] : box[3], box[0] : box[2]] = 255
    inputs = processor(Image.fromarray(picture), "the red cup")
    side = config.frame_size
    assert inputs["sam_pixel_values"].shape == (1, 3, side, side)
    assert inputs["sam_valid_sizes"].tolist() == [[side, side]]
    cells = torch.nn.functional.adaptive_avg_pool2d(inputs["sam_pixel_values"], 16)[0].mean(0)
    (found,) = processor.post_process_masks(cells[None], inputs["sam_valid_sizes"], inputs["original_sizes"])
    wanted = torch.zeros(height, width, dtype=torch.bool)
    wanted[box[1] : box[3], box[0] : box[2]] = True
    overlap = ((found > 0) & wanted).sum() / ((found > 0) | wanted).sum()
    assert overlap > 0.85


def test_frames_are_those_of_transformers():
    """
    `Sam2ImageProcessor` needs torchvision, whose resizing of bytes is PyTorch's, with antialiasing; then it takes the
    mean and divides by the standard deviation, both times 255.
    """
    picture = np.random.default_rng(0).integers(0, 256, (37, 211, 3), dtype=np.uint8)
    mine = torch.as_tensor(np.stack(sam2_image_processor(64)([Image.fromarray(picture)])["pixel_values"]))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True).round()
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    # One grey level: each of the two rounds along both axes, in another order.
    assert ((mine - (resized - mean) / std).abs() <= 1.01 / std).all()


def test_presence_by_hand():
    masks = torch.zeros(3, 2, 2)
    masks[0, 0, 0] = 1
    valid = torch.ones(3, 2, 2, dtype=torch.bool)
    valid[2] = False
    losses = presence_loss(torch.tensor([2.0, 2.0, 2.0]), masks, valid)
    torch.testing.assert_close(losses, torch.tensor([0.126928, 2.126928, 0.0]))


def test_a_step_changes_all_that_is_trained_and_nothing_else(tmp_path):
    model = tiny_model(sam_config=tiny_sam2_config())
    processor = processor_for(model.config)
    settings = {"cache_sam_embeddings": str(tmp_path / "cache"), "iou_weight": 0.5, "learning_rate": 1e-2}
    # The same images in both steps: the second takes the kept maps.
    args = training_config(tmp_path, max_steps=2, per_device_train_batch_size=8, **settings)
    items = dataset([example(number) for number in range(8)])
    trainer = UGroundTrainer(model=model.train(), args=args, processing_class=processor, train_dataset=items)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = set(freeze(model, None, trainer.args.loss_weights()))
    trainer.train()
    assert trainer._sam_cache.encoded == len({path.name for path in (tmp_path / "cache").rglob("*.safetensors")}) > 0
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == trained
    assert "mask_decoder.sam.mask_decoder.conv_s0.weight" in trained
    assert "mask_decoder.sam.mask_decoder.pred_obj_score_head.proj_in.weight" in trained
    assert any(logs.get("loss/presence", 0) > 0 for logs in trainer.state.log_history)


def test_a_video_checkpoint_gives_its_image_model(tmp_path, capsys):
    torch.manual_seed(1)
    images = tiny_sam2_config().to_dict()
    config = Sam2VideoConfig(
        vision_config=images["vision_config"],
        **{
            part: {key: value for key, value in images[part].items() if key != "model_type"}
            for part in ("prompt_encoder_config", "mask_decoder_config")
        },
        image_size=64,
    )
    config.memory_attention_hidden_size = config.memory_encoder_hidden_size = 16
    video = random_weights(Sam2VideoModel(config))
    video.save_pretrained(tmp_path / "sam")
    settings = {
        "image_processor_type": "Sam2ImageProcessorFast",
        "size": {"height": 64, "width": 64},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
    }
    (tmp_path / "sam" / "preprocessor_config.json").write_text(json.dumps(settings))
    write_llava(tmp_path / "lmm")
    assert assemble(tmp_path / "lmm", tmp_path / "sam", tmp_path / "out") == 0, capsys.readouterr().err
    model = UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")
    sources = video.state_dict()
    for name, value in model.mask_decoder.sam.state_dict().items():
        assert torch.equal(value, sources[name]), name
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [*processor.sam_image_processor.image_mean] == [0.1, 0.2, 0.3]
    torch.save({"model": {"sam_mask_decoder.iou_token.weight": torch.zeros(1)}}, tmp_path / "sam2.pt")
    assert assemble(tmp_path / "lmm", tmp_path / "sam2.pt", tmp_path / "no") == 2
    assert "is one of Meta's SAM 2, expected its folder" in capsys.readouterr().err


def test_presence_is_in_the_result_and_rejects():
    model = tiny_model(sam_config=tiny_sam2_config())
    pipe = ReferringSegmentationPipeline(model=model, processor=processor_for(model.config))
    picture = Image.new("RGB", (40, 90), "white")
    say = {"max_new_tokens": 2, "generate_kwargs": {"suppress_tokens": say_only(SEGMENT_TOKEN)}}
    with torch.no_grad():
        bias = model.mask_decoder.sam.mask_decoder.pred_obj_score_head.proj_out.bias
        bias.fill_(30.0)
    present = pipe(picture, "the red cup", presence_threshold=0.5, **say)["segments"]
    assert len(present) == 2 and all(segment["presence"] > 0.99 for segment in present)
    with torch.no_grad():
        bias.fill_(-30.0)
    absent = pipe(picture, "the red cup", **say)["segments"]
    assert all(segment["presence"] < 0.01 for segment in absent)
    assert all(low["score"] < high["score"] for low, high in zip(absent, present, strict=True) if high["score"])
    assert pipe(picture, "the red cup", presence_threshold=0.5, **say)["segments"] == []
    other = ReferringSegmentationPipeline(model=tiny_model(), processor=tiny_processor())
    with pytest.raises(ValueError, match="presence_threshold needs a model with a SAM 2"):
        other(picture, "the red cup", presence_threshold=0.5, **say)
