"""What a number in a call may be: refused with got and expected before anything is computed."""

import math
from numbers import Integral, Real


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise a `ValueError` unless a value is a finite number in low..high."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        reach = f" within {low:g}..{high:g}" if math.isfinite(high - low) else ""
        raise ValueError(f"{name} must be a number{reach}, got {value!r}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise a `ValueError` unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_one_of(name: str, value: object, allowed: tuple) -> None:
    """Raise a `ValueError` unless a value is one of some; 1 is no `True`."""
    if not any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


__all__ = ["check_number", "check_one_of", "check_whole"]
