"""Which adapter stands for an LMM."""

from typing import Any

from .lmm_access import LmmAdapter
from .lmm_llava import LlavaAdapter

LMM_ADAPTERS: dict[str, type[LmmAdapter]] = {"llava": LlavaAdapter}


def lmm_adapter(lmm_config: Any, image_frame: str) -> LmmAdapter:
    """
    The adapter of an LMM.

    Args:
        lmm_config: of the LMM.
        image_frame: what it sees of an image; see [`UGroundConfig`].

    Raises:
        ValueError: the family is not known here, or does not see images that way.
    """
    adapter = LMM_ADAPTERS.get(lmm_config.model_type)
    if adapter is None:
        raise ValueError(f"the LMM must be of type {', '.join(LMM_ADAPTERS)}, got {lmm_config.model_type!r}")
    return adapter(lmm_config, image_frame)
