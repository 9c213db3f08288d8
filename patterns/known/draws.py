"""Random inputs for the proofs: small sizes, generic values, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.known import Arguments, KnownFunction
from llcompile.patterns.known.arguments import axis_size
from llcompile.patterns.known.entry import Draw

# Values as real models have them: log decays whose sum over a chunk is a few units, gates inside (0, 1).
DRAWS: dict[Draw, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda z: z,
    "positive": F.softplus,
    # Norms of 1/2 to 1: with longer keys a delta rule diverges, with norms of 1 a missing l2norm goes unseen.
    "key": lambda z: z / z.norm(dim=-1, keepdim=True) * (0.5 + 0.5 * torch.sigmoid(z[..., :1])),
    "state": lambda z: z,
    "log_decay": lambda z: -0.2 * F.softplus(z),
    "unit": torch.sigmoid,
    "negative": lambda z: -0.2 - F.softplus(z),
    # Step sizes from 0.001 to 10: whatever limits the call clamps them to, some lie inside. The bias lies below them.
    "step": lambda z: torch.exp(1.5 * z - 2.0),
    "step_before_softplus": lambda z: torch.log(torch.expm1(torch.exp(1.5 * z - 2.0))),
    "step_bias": lambda z: 0.05 * torch.sigmoid(z),
}


def small_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Sizes for a proof: as in the call where they are small, else cut down, with the ratio of heads to groups kept."""
    small = {"B": 2}
    groups = min(int(sizes.get("G", sizes["H"])), 2)
    ratio = int(sizes["H"]) // int(sizes.get("G", sizes["H"]))
    small["G"], small["H"] = groups, groups * min(ratio, 3)
    small["K"], small["V"] = min(int(sizes["K"]), 16), min(int(sizes.get("V", 1)), 12)
    return small


def draw_call(entry: KnownFunction, call: Arguments, seed: int, length: int) -> dict[str, Any]:
    """Fresh float64 values for every tensor of the call; constants and absent operands stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {**small_sizes(call.sizes), "T": length}
    values = {name: None if name in entry.packing else value for name, value in call.values.items()}
    for tensor in entry.tensors:
        given = call[tensor.name]
        if isinstance(given, torch.Tensor):
            # A state of ours is drawn as the linear one that it stands for.
            axes = entry.state_axes(call.values) if tensor.is_state else entry.axes(tensor, given.dim(), call.values)
            assert axes is not None
            kind = "step_before_softplus" if tensor.draw == "step" and call[entry.softplus] else tensor.draw
            values[tensor.name] = _draw(kind, axes, sizes, generator)
    return values


def _draw(kind: Draw, axes: tuple[str, ...], sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    full = [axis_size(axis.lstrip("*"), sizes) for axis in axes]
    drawn = [1 if axis.startswith("*") else size for axis, size in zip(axes, full, strict=True)]
    return DRAWS[kind](torch.randn(drawn, generator=generator, dtype=torch.float64)).expand(full)
