"""Which parts of the model compute attention how: flash attention is for the language model alone."""

PARTS = ("lmm_config", "sam_config")
LMM_PARTS = ("text_config", "vision_config")


def is_flash(implementation: str | None) -> bool:
    """Whether a name is that of flash attention, of whatever version or kernel."""
    return isinstance(implementation, str) and "flash" in implementation


def attention_of_parts(requested: str | dict | None) -> str | dict | None:
    """
    What is asked of the whole model, as what is asked of each of its parts.

    Flash attention takes no mask, and drops hidden keys together with the queries at their places. The vision tower
    hides padded patches as keys only, and SAM adds relative positions to its attention. So both stay as they are where
    flash attention is asked of the model or its LMM by one name, and may not be named themselves.

    Args:
        requested (`str`, `dict` or `None`): an `attn_implementation` as transformers takes it; a dictionary says it
            of `lmm_config` and `sam_config`, and may be nested.

    Returns:
        The same, with flash attention at the language model only.

    Raises:
        ValueError: flash attention is asked of a part that cannot use it, or there is no such part.
    """
    if is_flash(requested):
        return {"lmm_config": {"text_config": requested}}
    if not isinstance(requested, dict):
        return requested
    lmm = requested.get("lmm_config")
    lmm_parts = {"text_config": lmm} if is_flash(lmm) else lmm
    inside = lmm_parts if isinstance(lmm_parts, dict) else {}
    for asked, parts in ((requested, PARTS), (inside, LMM_PARTS)):
        if unknown := sorted(set(asked) - {"", *parts}):
            raise ValueError(f"attn_implementation is for {' and '.join(parts)}, got one for {unknown[0]}")
    refused = {
        "the model without its parts": requested.get(""),
        "lmm_config without its parts": inside.get(""),
        "vision_config": inside.get("vision_config"),
        "sam_config": requested.get("sam_config"),
    }
    for part, asked in refused.items():
        names = asked.values() if isinstance(asked, dict) else [asked]
        for name in filter(is_flash, names):
            raise ValueError(f"only text_config of lmm_config can use flash attention, got {name!r} for {part}")
    return requested if lmm_parts is lmm else {**requested, "lmm_config": lmm_parts}


__all__ = ["attention_of_parts", "is_flash"]
