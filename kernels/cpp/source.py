"""From a description to the text of a C++ file: all that its family needs, whatever the sizes of a call are."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch

from llcompile.kernels import header
from llcompile.kernels.description import CHUNK, Correction, Decay, Description
from llcompile.kernels.state import state_dtype

_REAL = {torch.float32: "float", torch.float64: "double"}


class Family(NamedTuple):
    """What a file is made for. Sizes, levels, states and the dtypes of operands are arguments of its functions."""

    decay: Decay
    correction: Correction
    sums: torch.dtype  # float32 or float64

    @property
    def name(self) -> str:
        """A word for file names."""
        return f"{self.decay}_{self.correction}_{_REAL[self.sums]}"


def family_of(d: Description) -> Family:
    """The family that runs a description."""
    return Family(d.decay, d.correction, state_dtype(d.dtype))


@lru_cache(maxsize=16)
def generate(family: Family) -> str:
    """The source of a family."""
    return (
        _templates()
        .get_template("file.jinja")
        .render(
            decay=family.decay,
            correction=family.correction,
            real=_REAL[family.sums],
            wide=family.sums == torch.float64,
            decayed=family.decay != "none",
            scalar=family.decay == "scalar",
            channel=family.decay == "channel",
            rate=family.decay == "rate",
            delta=family.correction == "delta",
            erase=family.correction == "erase",
            corrected=family.correction != "none",
            chunk=CHUNK,
            digits=header.DIGITS,
            digit_bits=header.BITS,
        )
    )


def generate_readouts(sums: torch.dtype) -> tuple[str, str]:
    """The source of per-level readouts with sums in float32 or float64, and a word for the names of its files."""
    numbers = {"chunk": CHUNK, "digits": header.DIGITS, "digit_bits": header.BITS}
    template = _templates().get_template("readouts.jinja")
    return template.render(real=_REAL[sums], wide=sums == torch.float64, **numbers), f"readouts_{_REAL[sums]}"


@cache
def _templates() -> jinja2.Environment:
    """The folder `templates`: a line that begins with `#%` is a statement of Jinja."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        line_statement_prefix="#%",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        auto_reload=False,
    )
