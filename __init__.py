"""Visual grounding with large multimodal models: an image and a sentence in, words and pixel masks out.

Importing `uground` registers its classes with the Auto classes of transformers and the pipeline
`referring-segmentation`. Nothing of training is imported.
"""

from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from uground.modeling_uground import (
    UGroundConfig,
    UGroundForReferringSegmentation,
    UGroundImageEmbeddings,
    UGroundOutput,
    UGroundSegmentation,
)
from uground.modeling_uground.library_compat import hush_hub_kernel
from uground.processing import ReferringSegmentationPipeline, UGroundProcessor

__version__ = version("uground")

# Commands import bitsandbytes by way of peft.
hush_hub_kernel()
AutoConfig.register("uground", UGroundConfig)
AutoModel.register(UGroundConfig, UGroundForReferringSegmentation)
AutoModelForImageTextToText.register(UGroundConfig, UGroundForReferringSegmentation)
AutoProcessor.register(UGroundConfig, UGroundProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "referring-segmentation", pipeline_class=ReferringSegmentationPipeline, pt_model=AutoModel, type="multimodal"
)


def tiny_checkpoint() -> str:
    """Folder of the bundled checkpoint, which knows the drawn world of `uground.training.scenes` and works offline."""
    return str(Path(__file__).parent / "hub" / "checkpoints" / "uground-tiny")


__all__ = [
    "ReferringSegmentationPipeline",
    "UGroundConfig",
    "UGroundForReferringSegmentation",
    "UGroundImageEmbeddings",
    "UGroundOutput",
    "UGroundProcessor",
    "UGroundSegmentation",
    "tiny_checkpoint",
]
