"""What several commands take: numbers, for argparse's `type`, and devices."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from llcompile.errors import SpecError


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers that are not below `least`."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        return int(text)

    return read


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


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
