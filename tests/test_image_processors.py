"""What the LMM sees of an image: letterbox, centre crop, stretch, and what follows from it for all that use it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor, write
from transformers import AutoProcessor, CLIPImageProcessorPil

from uground.checkpoint_loading import check_pair, load_processor
from uground.modeling_uground import UGroundConfig
from uground.processing import (
    ReferringSegmentationPipeline,
    UGroundProcessor,
    crop_image_processor,
    draw_result,
    draw_similarity,
    make_image_processor,
    stretch_image_processor,
)
from uground.processing.image_processors import frame_of, read_frames, seen_box

READ = {
    "image_frame": "centre_crop",
    "prompts": ("embedding", "points"),
    "num_points": 6,
    "point_downsample": 1,
    "layer_policy": False,
    "layer_selection": "last",
    "similarity_scaling": "minmax",
}


def test_the_crop_by_hand():
    """4 x 8 pixels: the central 4 x 4 as they are, in CLIP's scale."""
    image = gradient_image(4, 8)
    pixels, valid = read_frames(crop_image_processor(4), [Image.fromarray(image)], {})
    settings = CLIPImageProcessorPil()
    expected = (image[:, 2:6] / 255.0 - np.array(settings.image_mean)) / np.array(settings.image_std)
    np.testing.assert_allclose(pixels[0], expected.transpose(2, 0, 1), atol=1e-6)
    assert valid.tolist() == [[4, 4]]


def test_the_stretch_shows_everything():
    image = Image.new("RGB", (60, 20), (10, 20, 30))
    image.paste((200, 100, 0), (50, 0, 60, 20))
    pixels, valid = read_frames(stretch_image_processor(12), [image], {})
    assert pixels.shape == (1, 3, 12, 12) and valid.tolist() == [[12, 12]]
    assert pixels[0, 0, :, -1].min() > pixels[0, 0, :, :8].max()


@pytest.mark.parametrize("frame", ["letterbox", "centre_crop", "stretch"])
def test_a_frame_is_saved_with_the_processor(tmp_path, frame):
    processor = tiny_processor(frame=frame)
    assert processor.image_frame == frame
    processor.save_pretrained(tmp_path)
    images = [gradient_image(30, 50), gradient_image(70, 40)]
    made = processor(images, ["the cup", "the tree"])
    for loaded in (UGroundProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert loaded.image_frame == frame
        again = loaded(images, ["the cup", "the tree"])
        assert torch.equal(again["pixel_values"], made["pixel_values"])
        assert torch.equal(again["sam_pixel_values"], made["sam_pixel_values"])
    if frame != "letterbox":
        assert made["valid_sizes"].tolist() == [[32, 32]] * 2
    assert made["sam_valid_sizes"].tolist() == [[38, 64], [64, 37]]


def test_options_change_both_frames_of_a_crop(tmp_path):
    processor = tiny_processor(frame="centre_crop")
    processor.save_pretrained(tmp_path)
    plain = UGroundProcessor.from_pretrained(tmp_path, do_normalize=False)(gradient_image(30, 50), "the cup")
    asked = processor(gradient_image(30, 50), "the cup", do_normalize=False)
    assert torch.equal(plain["pixel_values"], asked["pixel_values"]) and asked["pixel_values"].min() >= 0
    with pytest.raises(ValueError, match="crop_size may not be changed"):
        processor(gradient_image(30, 50), "the cup", crop_size={"height": 8, "width": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "must be SamImageProcessor or CLIPImageProcessor"),
        ({"size": {"shortest_edge": 28}}, "shortest_edge of size and as height and width of crop_size"),
        ({"crop_size": None}, "shortest_edge of size and as height and width of crop_size"),
        ({"do_center_crop": "yes"}, "do_center_crop of image_processor must be true or false"),
        ({"do_center_crop": False}, "must have the same side in 1.. as height and width of size"),
        ({"image_mean": [1.0]}, "image_mean of image_processor must be three numbers"),
    ],
)
def test_settings_that_make_no_frame(tmp_path, changes, message):
    tiny_processor(frame="centre_crop").save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= changes
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message.replace("1..", r"1\.\.\d+")):
        UGroundProcessor.from_pretrained(tmp_path)


def test_there_is_no_other_frame():
    with pytest.raises(ValueError, match="image_frame must be one of letterbox, centre_crop, stretch, got 'tiles'"):
        make_image_processor("tiles", 32)
    assert frame_of(make_image_processor("stretch", 20)) == ("stretch", 20)


def test_model_and_processor_must_see_images_alike(tmp_path):
    """Wherever the two meet: at the ids, in a checkpoint, in a session and in the pipeline."""
    model, processor = tiny_model(**READ), tiny_processor()
    message = "for image_frame the config says 'centre_crop', and the processor makes a 'letterbox'"
    with pytest.raises(ValueError, match=message):
        processor.check_token_ids(model.config)
    unknown = UGroundConfig.from_dict(model.config.to_dict())
    unknown.segment_token_id = None
    with pytest.raises(ValueError, match=message):
        check_pair(unknown, processor, "somewhere")
    with pytest.raises(ValueError, match=message):
        model.image_session(gradient_image(20, 30), processor)
    with pytest.raises(ValueError, match=message):
        ReferringSegmentationPipeline(model=model, processor=processor, task="referring-segmentation", device=-1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_processor(tmp_path)


@pytest.fixture(scope="module")
def pipe():
    return ReferringSegmentationPipeline(
        model=tiny_model(**READ),
        processor=tiny_processor(frame="centre_crop"),
        task="referring-segmentation",
        device=-1,
    )


def test_maps_of_a_crop_say_what_they_cover(pipe):
    answer = write(pipe.processor, "it is [SEG] .")
    result = pipe(gradient_image(30, 50), "the cup", generate_kwargs=answer, return_similarity=True)
    (segment,) = result["segments"]
    assert segment["similarity_map"].shape == (4, 4) and segment["similarity_box"] == [10, 0, 40, 30]
    assert segment["mask"].size == (50, 30)
    square = pipe(gradient_image(30, 30), "the cup", generate_kwargs=answer, return_similarity=True)
    assert "similarity_box" not in square["segments"][0]
    drawn = draw_result(Image.fromarray(gradient_image(30, 50)), result)
    assert drawn.width > drawn.height


def test_a_map_is_drawn_over_its_box_alone():
    image = Image.new("RGB", (800, 400), (100, 100, 100))
    drawn = np.asarray(draw_similarity(image, np.array([[0.0, 1.0]]), box=(200, 0, 600, 400))).astype(int)
    panel = drawn[:400]  # below it lies the bar that explains the colours
    assert (panel[:, :200] == 100).all() and (panel[:, 600:] == 100).all()
    assert drawn[200, 500].sum() > drawn[200, 300].sum()


@pytest.mark.parametrize(
    ("frame", "image_hw", "box"),
    [
        ("centre_crop", (30, 50), (10, 0, 40, 30)),
        ("centre_crop", (50, 30), (0, 10, 30, 40)),
        ("centre_crop", (30, 30), None),
        ("letterbox", (30, 50), None),
        ("stretch", (30, 50), None),
    ],
)
def test_what_a_frame_shows(frame, image_hw, box):
    assert seen_box(frame, image_hw) == box


def test_points_come_with_the_outputs(pipe):
    model, processor = pipe.model, pipe.processor
    inputs = processor([gradient_image(30, 50)], [["the cup", "the tree"]], answers=[["it is [SEG] .", "a tree ."]])
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.points.shape == (1, 6, 2) and outputs.point_labels.shape == (1, 6)
    assert set(outputs.point_labels.flatten().tolist()) <= {1, 0, -1}
    assert outputs.points.min() >= 0 and outputs.points[..., 0].max() <= 64 and outputs.points[..., 1].max() <= 39
    # Nothing that the crop cut off is chosen: 50 pixels are 64 of the frame, the crop those from 10 to 40.
    assert outputs.points[..., 0].min() >= 10 * 1.28 - 1 and outputs.points[..., 0].max() <= 40 * 1.28 + 1
    plain = model.segment(**processor(gradient_image(30, 50), "the cup"), **write(processor, "it is [SEG] ."))
    assert plain.points.shape == (1, 6, 2) and plain.layer_logits is None
    without = tiny_model(**{**READ, "prompts": ("embedding",), "num_points": 30, "point_downsample": 2})
    assert without(**inputs).points is None


def test_a_session_with_a_crop(pipe):
    image = gradient_image(30, 50)
    answer = write(pipe.processor, "it is [SEG] .")
    with pipe.model.image_session(image, pipe.processor) as session:
        found = session("the cup", **answer)
    asked = pipe(image, "the cup", generate_kwargs=write(pipe.processor, "it is [SEG] ."))
    assert np.array_equal(found["masks"][0].numpy(), np.asarray(asked["segments"][0]["mask"]) > 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"point_thresholds": (0.2, 0.8)},
            "point_thresholds must be two numbers in 0..1, that of positive points above",
        ),
        ({"point_thresholds": (0.8,)}, "point_thresholds must be two numbers"),
        ({"num_points": 0}, "num_points must be at least 1, got 0"),
        ({"point_downsample": 3}, "point_downsample must divide the 4 x 4 token grid, got 3"),
        ({"image_frame": "tiles"}, "image_frame must be one of"),
    ],
)
def test_settings_that_no_model_has(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**{**READ, **settings})


@pytest.mark.parametrize("system", ["lisa", "sesame", "uground"])
def test_points_of_a_system_without_points(system):
    with pytest.raises(ValueError, match=f"num_points need the prompt 'points', but {system} has"):
        UGroundConfig.for_system(system, lmm_config=None, num_points=5)
