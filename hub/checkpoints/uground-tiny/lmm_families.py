"""Which adapter stands for an LMM."""

from typing import Any

from .lmm_access import LmmAdapter
from .lmm_llava import LlavaAdapter
from .lmm_qwen_vl import Qwen3VLAdapter, QwenVLAdapter

LMM_ADAPTERS: dict[str, type[LmmAdapter]] = {
    "llava": LlavaAdapter,
    "qwen2_5_vl": QwenVLAdapter,
    "qwen3_vl": Qwen3VLAdapter,
}


def lmm_adapter(lmm_config: Any, image_frame: str | None) -> LmmAdapter:
    """
    The adapter of an LMM.

    Args:
        lmm_config: of the LMM.
        image_frame: what it sees of an image; see [`UGroundConfig`].

    Raises:
        ValueError: the family is not known here, or does not see images that way.
    """
    return _family(lmm_config)(lmm_config, image_frame)


def usual_frame(lmm_config: Any) -> str:
    """What an LMM of this family usually sees of an image; raises as [`lmm_adapter`]."""
    return _family(lmm_config).frames[0]


def _family(lmm_config: Any) -> type[LmmAdapter]:
    family = LMM_ADAPTERS.get(lmm_config.model_type)
    if family is None:
        raise ValueError(f"the LMM must be of type {', '.join(LMM_ADAPTERS)}, got {lmm_config.model_type!r}")
    return family
