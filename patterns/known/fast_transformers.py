"""Known functions of pytorch-fast-transformers (read from 0.4.0): its causal product, kernels in C++ and CUDA.

User code calls it as `causal_dot_product` or as `CausalDotProduct.apply`: causal linear attention without the
denominator. Performers, Based, LoLCATs and attention by Taylor series divide by a sum of their own, which stays in the
graph. Its kernels take float32 only.
"""

from __future__ import annotations

from typing import Any

from llcompile.patterns.known.entry import Arguments, KnownFunction, Tensor
from llcompile.patterns.mixer import Mixer


def _causal_product(a: Arguments) -> Mixer:
    query, key, value = (a[name].transpose(1, 2) for name in "QKV")
    return Mixer("none", "none", query, key, value)


def _result(a: Arguments, output: Any, state: Any) -> Any:
    return output.transpose(1, 2)


ENTRIES: tuple[KnownFunction, ...] = (
    KnownFunction(
        library="fast_transformers",
        function="CausalDotProduct",
        family="linear attention",
        tensors=(Tensor("Q", "B H T K"), Tensor("K", "B H T K"), Tensor("V", "B H T V")),
        bind=_causal_product,
        result=_result,
        opaque=True,
    ),
)
