"""The model: six Mamba-1 layers that scan forwards and backwards with the same weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from typeseg_torch import weights

EPSILON = 1e-6  # of the layer norms
LEAST_STEP = 1e-4
UNKNOWN = 0xA4  # for every byte that is neither printable ASCII, tab nor line end
_PRINTABLE = frozenset((*range(0x20, 0x7F), 0x09, 0x0A, 0x0D))
_TOKENS = 130  # ASCII, all others, padding


class Scan(nn.Module):
    """Mamba-1's selective scan over time, from the first position to the last, with the projections that it needs."""

    def __init__(self, channels: int, states: int, rank: int) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.project = nn.Linear(channels, sum(self.sizes))
        self.step = nn.Linear(rank, channels)
        self.log_rate = nn.Parameter(torch.zeros(channels, states))
        self.skip = nn.Parameter(torch.ones(channels))

    def forward(self, u: Tensor) -> Tensor:
        """The scan of u [B, T, C]."""
        step, key, query = self.project(u).split(self.sizes, dim=-1)
        step = F.softplus(self.step(step)) + LEAST_STEP
        u, step, key, query = (x.transpose(1, 2) for x in (u, step, key, query))  # [B, C, T], [B, N, T]
        output: Tensor = mamba_selective_scan(u, step, -self.log_rate.exp(), key, query, self.skip)
        return output.transpose(1, 2)


class Layer(nn.Module):
    """A gated layer: a convolution centred on each position, then the scans, on a residual stream [B, T, D]."""

    def __init__(self, width: int, channels: int, states: int, rank: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.inputs = nn.Linear(width, 2 * channels)
        self.margins = (kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2
        self.convolution = nn.Conv1d(channels, channels, kernel, groups=channels)
        # Two modules with the same weights, so that each direction has level weights of its own.
        self.scan, self.backwards = Scan(channels, states, rank), Scan(channels, states, rank)
        self.backwards.project, self.backwards.step = self.scan.project, self.scan.step
        self.backwards.log_rate, self.backwards.skip = self.scan.log_rate, self.scan.skip
        self.outputs = nn.Linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """x and what the layer adds to it."""
        u, gate = self.inputs(self.norm(x)).chunk(2, dim=-1)
        u = F.silu(self.convolution(F.pad(u.transpose(1, 2), self.margins))).transpose(1, 2)
        y = self.scan(u) + self.backwards(u.flip(1)).flip(1)
        return x + self.outputs(y * F.silu(gate))


class Segmenter(nn.Module):
    """A label's logits for each byte."""

    def __init__(self, layers: int, labels: int, width: int = 256, **sizes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_TOKENS, width)
        self.layers = nn.ModuleList(Layer(width, **sizes) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, labels] of tokens [B, T] as `encode` makes them."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def encode(text: str) -> Tensor:
    """The tokens [T] of a text, one for each of its UTF-8 bytes."""
    known = [byte if byte in _PRINTABLE else UNKNOWN for byte in text.encode("utf-8", "ignore")]
    return torch.tensor([min(byte, 128) for byte in known], dtype=torch.long)


def pretrained() -> tuple[Segmenter, list[str]]:
    """typeseg's model with its weights, in evaluation mode, and the names of its labels.

    Raises SpecError where typeseg is not installed and no wheel is named.
    """
    labels, arrays = weights.read()
    model = Segmenter(
        layers=sum(name.endswith("__A_log") for name in arrays),
        labels=len(labels),
        channels=arrays["CheckpointMambaBlock1D_0__A_log"].shape[0],
        states=arrays["CheckpointMambaBlock1D_0__A_log"].shape[1],
        rank=arrays["CheckpointMambaBlock1D_0__Dense_2__kernel"].shape[0],
        kernel=arrays["CheckpointMambaBlock1D_0__Conv_0__kernel"].shape[0],
    )
    tensors = {name: tensor(arrays) for name, tensor in _sources(len(model.layers)).items()}
    shared = {name.replace(".scan.", ".backwards."): tensor for name, tensor in tensors.items() if ".scan." in name}
    model.load_state_dict(tensors | shared)
    return model.eval(), labels


# Our names of a layer's modules, and flax's.
_LAYER = {
    "norm": "LayerNorm_0",
    "inputs": "Dense_0",
    "convolution": "Conv_0",
    "scan.project": "Dense_1",
    "scan.step": "Dense_2",
    "outputs": "Dense_3",
}


def _sources(layers: int) -> dict[str, Any]:
    """For each of our tensors a function of typeseg's arrays; flax keeps matrices as [in, out]."""
    modules = {"norm": "LayerNorm_0", "head": "Dense_0"}
    found: dict[str, Any] = {"embedding.weight": _taken("Embed_0__embedding")}
    for layer in range(layers):
        theirs = f"CheckpointMambaBlock1D_{layer}__"
        modules |= {f"layers.{layer}.{our}": theirs + name for our, name in _LAYER.items()}
        found[f"layers.{layer}.scan.log_rate"] = _taken(theirs + "A_log")
        found[f"layers.{layer}.scan.skip"] = _taken(theirs + "D")
    for our, name in modules.items():
        found[f"{our}.weight"] = _taken(f"{name}__scale" if "LayerNorm" in name else f"{name}__kernel")
        found[f"{our}.bias"] = _taken(f"{name}__bias")
    return found


def _taken(name: str) -> Any:
    def tensor(arrays: dict[str, Any]) -> Tensor:
        found = torch.from_numpy(arrays[name])
        if not name.endswith("__kernel"):
            return found
        return found.permute(2, 1, 0) if found.dim() == 3 else found.t()

    return tensor
