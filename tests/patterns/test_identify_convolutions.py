"""Convolutions and learned weights over time, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.identified import kinds, watched

B, T, D = 2, 40, 16


class Short(nn.Module):
    """A gated short convolution, as LFM2 has."""

    def __init__(self, kernel: int = 4, groups: int = D) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.conv = nn.Conv1d(D, D, kernel, padding=kernel - 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        b, c, u = self.into(x).mT.chunk(3, 1)
        return x + self.out((c * self.conv(b * u)[..., : x.shape[1]]).mT)


class Padded(Short):
    """By function, with zeros put before the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        u = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        return self.out(F.conv1d(u, self.conv.weight, self.conv.bias, groups=self.conv.groups).transpose(1, 2))


class Fourier(nn.Module):
    """A filter as long as the sequence, through the Fourier transform: Hyena, S4 (`of` says what the filter is)."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.out = of, nn.Linear(D, D)
        self.filter = nn.Parameter(torch.randn(D, T if of == "time" else T + 1, 2 if of == "spectrum" else 1))
        self.positions = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, D))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.of == "spectrum":
            spectrum = torch.view_as_complex(self.filter.contiguous())
        else:
            taps = self.filter[..., 0] if self.of == "time" else self.positions(torch.linspace(0, 1, length)[:, None]).T
            spectrum = torch.fft.rfft(taps, n=2 * length)
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * length) * spectrum, n=2 * length)[..., :length]
        return self.out(y.mT)


@pytest.mark.parametrize("of", ["time", "position", "spectrum"])
def test_fft_convolution(of: str) -> None:
    assert kinds(Fourier(of), torch.randn(B, T, D)) == ["FFT convolution"]


@pytest.mark.parametrize("make", [Short, Padded])
def test_short_convolution(make: Callable[..., nn.Module]) -> None:
    for given in ({}, {"kernel": 3}, {"groups": 1}):
        (record,) = watched(make(**given), torch.randn(B, T, D)).records
        assert record.kind == f"short convolution (kernel {given.get('kernel', 4)})"
        assert record.heads is None


def test_long_convolution() -> None:
    assert kinds(Padded(kernel=T), torch.randn(B, T, D)) == [f"long convolution (kernel {T})"]
    assert kinds(Short(kernel=128), torch.randn(B, 256, D)) == ["long convolution (kernel 128)"]


def test_fourier_mixing() -> None:
    class FNet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real

    assert kinds(FNet(), torch.randn(B, T, D)) == ["Fourier mixing (FNet)"]


class Before(nn.Module):
    """Short convolutions over queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.conv = nn.Conv1d(3 * D, 3 * D, 4, padding=3, groups=3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.silu(self.conv(self.qkv(x).mT)[..., : x.shape[1]]).mT.chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])


def test_a_convolution_before_another_mechanism_is_a_part_of_it() -> None:
    assert kinds(Before(), torch.randn(B, T, D)) == ["softmax attention (1 head)"]
    records = watched(nn.Sequential(Before(), Short()), torch.randn(B, T, D)).records
    assert [(r.module, r.kind.split(" (")[0]) for r in records] == [
        ("0", "softmax attention"),
        ("1.conv", "short convolution"),
    ]


# -- weights over positions


class Mixer(nn.Module):
    """MLP-Mixer's block."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tokens = nn.Sequential(nn.Linear(T, 24), nn.GELU(), nn.Linear(24, T))
        self.point = nn.Conv1d(T, T, 1)
        self.weight = nn.Parameter(torch.randn(T, T))
        self.norm, self.channels = nn.LayerNorm(D), nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.how == "linear":
            y = self.tokens(y.transpose(1, 2)).transpose(1, 2)
        elif self.how == "conv":
            y = self.point(y)
        elif self.how == "matmul":
            y = self.weight.tril() @ y
        else:
            y = torch.einsum("ts,bsd->btd", self.weight, y)
        return x + self.channels(x + y)


@pytest.mark.parametrize("how", ["linear", "conv", "matmul", "einsum"])
def test_time_mixing_by_a_weight(how: str) -> None:
    said = kinds(Mixer(how), torch.randn(B, T, D))
    assert said == ["time mixing by a weight (MLP-Mixer)"]


class Linformer(nn.Module):
    """Attention to a few learned mixtures of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.narrow = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Parameter(torch.randn(8, T))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = self.narrow @ k, self.narrow @ v
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_low_rank_attention() -> None:
    assert kinds(Linformer(), torch.randn(B, T, D)) == ["low-rank attention (Linformer, MHA, 2 heads)"]


# -- nothing to name


class Pointwise(nn.Module):
    """A feed-forward layer written with convolutions of one tap, in either layout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, 32, 1), nn.Conv1d(32, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Positions(nn.Module):
    """Rotary angles, a normalised head, a matrix of ones below the diagonal: no weight that is learned over time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.rand(D // 2))
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None].float() @ self.rates[None, :]
        x = x * torch.cat((angles.cos(), angles.sin()), -1)
        mean = torch.ones(x.shape[1], x.shape[1]).tril() @ x
        return self.out(x + mean).mean(1)


class Heads(nn.Module):
    """A linear map for each head, and one over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.over = nn.Parameter(torch.randn(4, 4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthd,hde->bthe", x.unflatten(-1, (4, 4)), self.each)
        return self.over(y.transpose(1, 2).transpose(1, 3)).flatten(1).mean(-1)


@pytest.mark.parametrize("model", [Pointwise(), Positions(), Heads()])
def test_what_mixes_no_positions(model: nn.Module) -> None:
    assert kinds(model, torch.randn(B, T, D)) == []
