"""Where versions of the libraries differ, and what one of them says unasked."""

import inspect
import logging

from transformers import GenerationMixin

# Under which name forwards, their outputs and `generate` take and give keys and values: "past_key_values" until
# transformers 5.23, "cache" since then. One name holds for all models of a version, remote ones included.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
# Where bitsandbytes, on CPUs that know bfloat16, looks for a faster kernel whenever it is imported, as by peft, be
# anything quantised or not. The kernel would come from the Hub, as code that nobody asked for.
HUB_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"
HUB_KERNEL_MESSAGE = "Failed to load CPU gemm_4bit_forward"


def _is_other(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HUB_KERNEL_MESSAGE)


def hush_hub_kernel() -> None:
    """Keep bitsandbytes from asking for a kernel of the Hub; all else that it says is still said."""
    logging.getLogger(HUB_KERNEL_LOGGER).addFilter(_is_other)


__all__ = ["CACHE_NAME", "hush_hub_kernel"]
