"""Taking off a model's modules again what training put on them.

transformers, accelerate and TRL leave their marks on the instances: a `forward` that rounds to bfloat16 or hands on to
the model it was made for, flags of gradient checkpointing, the mode. Whoever gets the model back expects none of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How accelerate has a model compute in mixed precision, and that it does.
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
# Whether bitsandbytes packs 4-bit weights anew at the first evaluation on some CPUs: that rounds their scales, so that
# training would go on with other weights, and fails for layers whose width is no multiple of 64.
CPU_PACKING = "support_avx512bf16_for_cpu"
MARKS = (
    *PREPARED,
    "training",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "neftune_noise_alpha",
    CPU_PACKING,
)


@contextmanager
def left_as_found(model: torch.nn.Module, preparation: dict | None = None) -> Iterator[None]:
    """
    Undo what happens inside to the marks on a model's modules, also where it ends in an exception.

    Weights stay as they were trained, and on the device where they are; so does `requires_grad`, which says what was.

    Args:
        model: the model, or the peft model of it.
        preparation: marks of an earlier time that hold inside; those found at the end are kept in it.
    """
    found = {module: marks_of(module, MARKS) for module in model.modules()}
    vars(model).update(preparation or {})
    try:
        yield
    finally:
        if preparation is not None:
            preparation.clear()
            preparation.update(marks_of(model, PREPARED))
        for module, marks in found.items():
            for name in MARKS:
                vars(module).pop(name, None)
            vars(module).update(marks)


def marks_of(module: torch.nn.Module, names: tuple[str, ...]) -> dict:
    """Those of the named attributes that are set on this very module, not on its class."""
    return {name: value for name, value in vars(module).items() if name in names}
