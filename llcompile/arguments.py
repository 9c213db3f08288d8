"""What several commands take: numbers, for argparse's `type`, and devices."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from llcompile.errors import SpecError

# The largest size that torch takes. Python itself reads no integers of thousands of digits.
_LARGEST = 2**63 - 1


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`, or to the largest that torch takes."""

    def read(text: str) -> int:
        number = _integer(text)
        limit = _LARGEST if most is None else most
        if number is None or not least <= number <= limit:
            bounds = f"of at least {least}" if most is None and (number or 0) <= limit else f"from {least} to {limit}"
            raise argparse.ArgumentTypeError(f"expected an integer {bounds}, got {_shortened(text)!r}")
        return number

    return read


def positive(text: str) -> float:
    """A finite number above 0."""
    number = _number(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {_shortened(text)!r}")
    return number


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    number = _number(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {_shortened(text)!r}")
    return number


def _integer(text: str) -> int | None:
    """The whole number that a text is, cut at one digit more than the largest has; None if it is none."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        return None
    return int(text[: len(str(_LARGEST)) + 2])


def _number(text: str) -> float:
    """The finite number that a text is, or nan."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def check_device(name: str) -> None:
    """Raise SpecError where torch cannot make a tensor on the device that --device names."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        said = in_a_line(error).partition(": ")[0]
        raise SpecError(f"--device {name}: torch has no such device here ({said}); use cpu or meta") from error


def in_a_line(error: BaseException) -> str:
    """What an error says, without the breaks of its lines; with its type where it says no more than a key."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if isinstance(error, KeyError) or not said else said
