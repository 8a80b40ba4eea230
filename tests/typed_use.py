"""Code such as users write, for the type checker alone; see `check_types.py`. Nothing here is run."""

from pathlib import Path

from uground import (
    ReferringSegmentationPipeline,
    UGroundConfig,
    UGroundForReferringSegmentation,
    UGroundOutput,
    UGroundProcessor,
    UGroundSegmentation,
    tiny_checkpoint,
)
from uground.processing import draw_result, masks_to_boxes, post_process_masks, read_image
from uground.training.scenes import example_scene, scenes
from uground.training.training_config import UGroundTrainingConfig

folder: str = tiny_checkpoint()
number: int = tiny_checkpoint()  # wrong

config = UGroundConfig.for_system("uground")
layers: int = config.num_layers
config = UGroundConfig.for_system(7)  # wrong

outputs = UGroundSegmentation()
if outputs.mask_logits is not None:
    boxes = masks_to_boxes(outputs.mask_logits > 0)
    height: str = boxes.shape[0]  # wrong
length: str = outputs.prompt_length  # wrong
forced = UGroundOutput(mask_logits=outputs.mask_logits)
forced = UGroundOutput(masks=outputs.mask_logits)  # wrong


def ask(pipe: ReferringSegmentationPipeline, path: Path) -> None:
    image = read_image(path)
    draw_result(image, pipe(image, "the cup")).save("overlay.png")
    draw_result(image, "the cup")  # wrong
    pipe(image, "the cup", batch_size=2, threshold=0.5)
    pipe(image, 3)  # wrong


def parts(model: UGroundForReferringSegmentation, processor: UGroundProcessor, path: Path) -> None:
    inputs = processor(read_image(path), "the cup")
    found = processor.post_process_instance_segmentation(model.segment(**inputs), threshold=0.5)
    answer = found[0]["answer"]
    processor.post_process_instance_segmentation(model.segment(**inputs), threshold="0.5")  # wrong
    print(answer, post_process_masks(model(**inputs).mask_logits, [(4, 4)], [(8, 8)])[0].shape)


def drawn() -> None:
    for example in scenes(split="test", count=2):
        print(example["query"])
    print(scenes(split=3), example_scene())  # wrong


settings = UGroundTrainingConfig(output_dir="runs", text_weight=2.0)
settings = UGroundTrainingConfig(output_dir="runs", text_weight="2")  # wrong
