"""Softmax attention by its usual name, in the spellings that people use; and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.identified import UNNAMED, kinds, watched

B, T, D = 2, 12, 32


def mask_of(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def repeated(k: Tensor, heads: int) -> Tensor:
    batch, groups, length, size = k.shape
    return k[:, :, None].expand(batch, groups, heads // groups, length, size).reshape(batch, heads, length, size)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask_of(q.shape[2]), float("-inf")).softmax(-1) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    scores = scores + torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bhsd->bhtd", weights, v)


def divided_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    weights = torch.exp(q @ k.mT) * mask_of(q.shape[2])
    return (weights @ v) / weights.sum(-1, keepdim=True)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Groups by an axis of their own; nothing is copied."""
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bghtd,bgsd->bghts", q, k)
    weights = torch.softmax(torch.where(mask_of(q.shape[3]), scores, -1e9), dim=-1)
    return torch.einsum("bghts,bgsd->bghtd", weights, v).flatten(1, 2)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads as one axis."""
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) + torch.full((q.shape[2],) * 2, -1e9).triu(1)
    return torch.bmm(F.softmax(scores, -1), flat[2]).view(q.shape)


class Attention(nn.Module):
    """Projections around an attention in some spelling, then a feed-forward layer and a residual."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 4, groups: int = 4, size: int = 8) -> None:
        super().__init__()
        self.attend, self.heads, self.groups = attend, heads, groups
        self.q = nn.Linear(D, heads * size)
        self.kv = nn.Linear(D, 2 * groups * size)
        self.out = nn.Linear(heads * size, D)
        self.mlp = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.groups, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


SPELLINGS = (fused, explicit, by_hand, divided_last, grouped, batched)


@pytest.mark.parametrize("attend", SPELLINGS)
@pytest.mark.parametrize(
    ("heads", "groups", "said"),
    [(4, 4, "MHA, 4 heads"), (4, 2, "GQA, 4 heads over 2 groups"), (4, 1, "MQA, 4 heads"), (1, 1, "1 head")],
)
def test_heads_and_groups(attend: Callable[..., Tensor], heads: int, groups: int, said: str) -> None:
    (record,) = watched(Attention(attend, heads, groups), torch.randn(B, T, D)).records
    assert record.kind == f"softmax attention ({said})"
    assert (record.heads, record.groups) == (heads, groups)
    assert "test_identify_attention.py:" in record.where


def test_one_row_for_each_module() -> None:
    model = nn.Sequential(Attention(fused), Attention(explicit, 4, 2))
    records = watched(model, torch.randn(B, T, D)).records
    assert [(r.module, r.heads, r.groups) for r in records] == [("0", 4, 4), ("1", 4, 2)]


def test_batch_of_one_and_dynamic_shapes() -> None:
    expected = ["softmax attention (GQA, 4 heads over 2 groups)"]
    for attend in (fused, explicit, batched):
        assert kinds(Attention(attend, 4, 2), torch.randn(1, T, D)) == expected
        assert kinds(Attention(attend, 4, 2), torch.randn(B, T, D), dynamic=True) == expected


# -- masks


def window_mask(length: int, window: int) -> Tensor:
    i = torch.arange(length)
    far = i[:, None] - i[None, :]
    return (far >= 0) & (far < window)


def both_sides(length: int, window: int) -> Tensor:
    i = torch.arange(length)
    return (i[:, None] - i[None, :]).abs() <= window


def in_blocks(length: int, block: int) -> Tensor:
    i = torch.arange(length)
    return mask_of(length) & (i[:, None] // block == i[None, :] // block)


def banded(length: int, window: int) -> Tensor:
    ones = torch.ones(length, length)
    return (torch.tril(ones) - torch.tril(ones, -window)).bool()


def masked(mask: Callable[[int], Tensor], how: str) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed = mask(q.shape[2])
        if how == "fused":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        scores = q @ k.mT
        if how == "fill":
            return scores.masked_fill(allowed.logical_not(), float("-inf")).softmax(-1) @ v
        if how == "added":
            bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(~allowed, torch.finfo(torch.float32).min)
            return F.softmax(scores + bias, -1) @ v
        weights = scores.exp() * allowed
        return weights @ v / weights.sum(-1, keepdim=True)

    return attend


WAYS = ("fused", "fill", "added", "multiplied")
MASKS: list[tuple[Callable[[int], Tensor], str]] = [
    (mask_of, "MHA, 4 heads"),
    (lambda n: window_mask(n, 4), "MHA, 4 heads, sliding window 4"),
    # Longer than the example: the graph has it all the same.
    (lambda n: window_mask(n, 64), "MHA, 4 heads, sliding window 64"),
    (lambda n: both_sides(n, 3), "MHA, 4 heads, bidirectional, sliding window of 3 to each side"),
    (lambda n: torch.ones(n, n, dtype=torch.bool), "MHA, 4 heads, bidirectional"),
    # Causal in blocks: that is no window, and nothing is said.
    (lambda n: in_blocks(n, 4), "MHA, 4 heads"),
]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("mask", "said"), MASKS)
def test_masks(mask: Callable[[int], Tensor], said: str, how: str) -> None:
    assert kinds(Attention(masked(mask, how)), torch.randn(B, T, D)) == [f"softmax attention ({said})"]


@pytest.mark.parametrize("how", WAYS)
def test_window_of_a_long_example(how: str) -> None:
    model = Attention(masked(lambda n: window_mask(n, 100), how))
    assert kinds(model, torch.randn(1, 300, D)) == ["softmax attention (MHA, 4 heads, sliding window 100)"]


def test_window_as_a_band_of_a_matrix() -> None:
    """No position is in the graph, so that only what the example shows can be said."""
    model = Attention(masked(lambda n: banded(n, 4), "fill"))
    assert kinds(model, torch.randn(B, T, D)) == ["softmax attention (MHA, 4 heads, sliding window 4)"]


def test_no_mask_at_all() -> None:
    plain = [lambda q, k, v: F.scaled_dot_product_attention(q, k, v), lambda q, k, v: (q @ k.mT).softmax(-1) @ v]
    for attend in plain:
        assert kinds(Attention(attend), torch.randn(B, T, D)) == ["softmax attention (MHA, 4 heads, bidirectional)"]


def test_a_mask_that_is_given_is_not_judged() -> None:
    class Given(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return super().forward(x)

    allowed = mask_of(T)[None, None].expand(B, 1, T, T)
    assert kinds(Given(fused), torch.randn(B, T, D), allowed) == ["softmax attention (MHA, 4 heads)"]


def test_a_mask_of_padding_is_no_mask_over_time() -> None:
    class Padded(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            seen = mask[:, None, None, :].expand(x.shape[0], 1, x.shape[1], x.shape[1]).bool()
            self.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return super().forward(x)

    said = kinds(Padded(fused), torch.randn(B, T, D), torch.ones(B, T, dtype=torch.long))
    assert said == ["softmax attention (MHA, 4 heads, bidirectional)"]


def test_a_causal_mask_in_a_buffer() -> None:
    class Buffered(Attention):
        def __init__(self, window: int) -> None:
            super().__init__(self.attention)
            self.register_buffer("seen", window_mask(64, window))

        def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ k.mT).masked_fill(~self.seen[: q.shape[2], : q.shape[2]], -1e9)
            return scores.softmax(-1) @ v

    assert kinds(Buffered(64), torch.randn(B, T, D)) == ["softmax attention (MHA, 4 heads)"]
    assert kinds(Buffered(4), torch.randn(B, T, D)) == ["softmax attention (MHA, 4 heads, sliding window 4)"]


def test_slopes_are_no_window() -> None:
    """ALiBi: far keys weigh nothing, and none is out of sight."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)
        bias = -(i[:, None] - i[None, :]).abs() * slopes[:, None, None]
        return (q @ k.mT + bias).masked_fill(~mask_of(q.shape[2]), float("-inf")).softmax(-1) @ v

    assert kinds(Attention(attend), torch.randn(B, T, D)) == ["softmax attention (MHA, 4 heads)"]


def test_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 5), None, None, T, T, device="cpu")
    model = Attention(lambda q, k, v: flex_attention(q, k, v, block_mask=block))
    (said,) = kinds(model, torch.randn(B, T, D))
    assert said.startswith("softmax attention (MHA, 4 heads")


# -- kinds of their own


class Latent(nn.Module):
    """Keys and values out of a narrow latent, a part of the keys with positions and shared by all heads."""

    def __init__(self, heads: int = 4, size: int = 8, rank: int = 12) -> None:
        super().__init__()
        self.heads, self.size, self.rank = heads, size, rank
        self.q = nn.Linear(D, heads * (size + 4))
        self.down = nn.Linear(D, rank + 4)
        self.norm = nn.LayerNorm(rank)
        self.up = nn.Linear(rank, 2 * heads * size)
        self.out = nn.Linear(heads * size, D)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        narrow, shared = self.down(x).split([self.rank, 4], -1)
        k, v = self.up(self.norm(narrow)).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, -1)
        k = torch.cat((k, shared[:, None].expand(-1, self.heads, -1, -1)), -1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(o.transpose(1, 2).flatten(2))


def test_latent_attention() -> None:
    (record,) = watched(Latent(), torch.randn(B, T, D)).records
    assert record.kind == "multi-head latent attention (MLA)"
    assert record.heads == 4


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~mask_of(q.shape[2]), float("-inf")).softmax(-1)


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return (weights_of(q1, k1) - 0.3 * weights_of(q2, k2)) @ v


def differential_of_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As its authors write it: one softmax over twice the heads."""
    weights = weights_of(q, k).unflatten(1, (-1, 2))
    return (weights[:, :, 0] - 0.3 * weights[:, :, 1]).repeat_interleave(2, 1) @ v


def differential_of_outputs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    first, second = (F.scaled_dot_product_attention(a, b, v, is_causal=True) for a, b in ((q1, k1), (q2, k2)))
    return first - 0.3 * second


@pytest.mark.parametrize("attend", [differential, differential_of_pairs, differential_of_outputs])
def test_differential_attention(attend: Callable[..., Tensor]) -> None:
    said = kinds(Attention(attend), torch.randn(B, T, D))
    assert said == ["differential attention (MHA, 4 heads)"]


def largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~mask_of(q.shape[2]), float("-inf"))
    least = scores.topk(4, -1).values[..., -1:]
    return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v


class Indexed(Attention):
    """An indexer chooses the keys that the attention sees."""

    def __init__(self) -> None:
        super().__init__(fused)
        self.index = nn.Linear(D, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.index(x).chunk(2, -1)
        chosen = (a @ b.mT).masked_fill(~mask_of(x.shape[1]), float("-inf")).topk(4, -1).indices
        bias = torch.full((x.shape[0], x.shape[1], x.shape[1]), -1e9).scatter(-1, chosen, 0.0)
        self.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None])
        return super().forward(x)


def squashed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT - 2.0).tril() @ v


def test_sigmoid_attention() -> None:
    assert kinds(Attention(squashed, 4, 4), torch.randn(B, T, D)) == ["sigmoid attention (MHA, 4 heads)"]


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.avg_pool1d(t.flatten(0, 1).mT, 4).mT.unflatten(0, t.shape[:2]) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def test_keys_that_are_fewer_than_queries() -> None:
    assert kinds(Attention(pooled), torch.randn(B, T, D)) == ["softmax attention (MHA, 4 heads)"]


def test_time_first() -> None:
    """No layout is taken for granted."""

    class First(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)
            k, v = (t.unflatten(-1, (self.groups, -1)).permute(1, 2, 0, 3) for t in self.kv(x).chunk(2, -1))
            return x + self.out(self.attend(q, k, v).permute(2, 0, 1, 3).flatten(2))

    for attend in SPELLINGS:
        said = kinds(First(attend, 4, 2), torch.randn(T, B, D))
        assert said == ["softmax attention (GQA, 4 heads over 2 groups)"]


@pytest.mark.parametrize("model", [Attention(largest), Indexed()])
def test_sparse_attention(model: nn.Module) -> None:
    assert kinds(model, torch.randn(B, T, D)) == ["sparse attention (top-k, MHA, 4 heads)"]


def test_the_modules_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(D, 4, 64, batch_first=True)
    for model in (layer, layer.train()):
        assert [k.split(" (")[0] for k in kinds(model, torch.randn(B, T, D))] == ["softmax attention"]


# -- nothing to name


class Head(nn.Module):
    """A classification head; an MLP whose gate is a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.up(x).softmax(-1) * self.up(x)
        return self.down(gated).mean(1).softmax(-1)


class Experts(nn.Module):
    """A router's softmax and top-k, and experts that are weighed in a product."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.router, self.dense = nn.Linear(D, 4, bias=False), dense
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.dense:
            return torch.einsum("bte,bted->btd", weights, torch.stack([e(x) for e in self.experts], 2))
        top, chosen = weights.topk(2, -1)
        weights = torch.zeros_like(weights).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + weights[..., i, None] * expert(x)
        return x + out


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril() @ v


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.softmax(-1), k.softmax(-1)
    scores = (q @ k.mT).tril()
    return (scores / scores.sum(-1, keepdim=True)) @ v


def exponential_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (q - q.amax(-1, keepdim=True)).exp(), k.exp()
    return torch.einsum("bhtk,bhtkv->bhtv", q, torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(2))


def decayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = F.logsigmoid(k.sum(-1)).cumsum(-1)
    return ((q @ k.mT) * (g[..., :, None] - g[..., None, :]).tril().exp().tril()) @ v


def over_the_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention: two softmaxes, none of them over scores."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


NOT_ATTENTION: list[Any] = [
    nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D)),
    Head(),
    Experts(dense=False),
    Experts(dense=True),
    *(Attention(f) for f in (linear_attention, normalised, exponential_features, decayed, over_the_sequence)),
]


@pytest.mark.parametrize("model", NOT_ATTENTION)
def test_what_is_no_softmax_attention(model: nn.Module) -> None:
    """Linear attention has no other name than a mixer's, and here nothing looks for mixers."""
    expected = [UNNAMED] if isinstance(model, Attention) else []
    assert kinds(model, torch.randn(B, T, D)) == expected


# -- calls that stay whole, and code that fails


@torch.library.custom_op("llcompile_tests::flash_attn_by_another_library", mutates_args=())
def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@whole.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def test_a_call_of_a_library_and_what_stands_beside_it() -> None:
    """Its inside is out of sight, and costs nothing else its name."""
    records = watched(nn.Sequential(Attention(whole), Attention(explicit, 4, 2)), torch.randn(B, T, D)).records
    assert [(r.module, r.kind) for r in records] == [
        ("0", "softmax attention"),
        ("1", "softmax attention (GQA, 4 heads over 2 groups)"),
    ]


@pytest.mark.parametrize("place", ["masks._describe", "times.Times._root"])
def test_a_typo_fails_a_test(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a user's program what could have been said, and no more."""

    def broken(*_: Any) -> Any:
        raise AttributeError("a typo")

    monkeypatch.setattr(f"llcompile.patterns.mechanisms.{place}", broken)
    with pytest.raises(Exception, match="a typo"):
        kinds(Attention(explicit), torch.randn(B, T, D))
    monkeypatch.setenv("LLCOMPILE_RAISE", "")
    said = kinds(Attention(explicit), torch.randn(B, T, D))
    assert said == (["softmax attention (MHA, 4 heads)"] if "masks" in place else [])
