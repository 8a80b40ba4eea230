"""What computes: configuration, LMM access, layer policy, prompts, mask decoder, the model and its generation."""

from .configuration_uground import UGroundConfig
from .modeling_uground import (
    UGroundForReferringSegmentation,
    UGroundImageEmbeddings,
    UGroundOutput,
    UGroundSegmentation,
)

__all__ = [
    "UGroundConfig",
    "UGroundForReferringSegmentation",
    "UGroundImageEmbeddings",
    "UGroundOutput",
    "UGroundSegmentation",
]
