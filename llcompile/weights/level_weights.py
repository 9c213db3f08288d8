"""LevelWeights: the module that computes a weight for each position, head and level of a mixer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from llcompile.errors import CheckpointError, LevelWeightsError
from llcompile.kernels.operands import COMPUTE_DTYPES
from llcompile.patterns.mixer import FEATURES
from llcompile.torch_internals.dtensors import like, sharded_ways
from llcompile.weights.descriptors import description, in_words
from llcompile.weights.level_kinds import (
    HIDDEN,
    KINDS,
    Sizes,
    compute_dtype,
    find_kind,
    level_weights_function,
    paper_gain,
)
from llcompile.weights.other_kind import take_kind

if TYPE_CHECKING:
    from llcompile.passes.names import CodePlace
    from llcompile.passes.one_token import Remembered
    from llcompile.passes.weight_input import Role

__all__ = ["KINDS", "LevelWeights", "compute_dtype", "level_weights_function", "paper_gain"]

_OPTIONAL_SIZES = ("in_features", "hidden", "features")

_alive: weakref.WeakSet[LevelWeights] = weakref.WeakSet()


def alive() -> list[LevelWeights]:
    """All level weights of this process, copies and unpickled ones included."""
    return list(_alive)


class LevelWeights(nn.Module):
    """Map a mixer's input x to the weights w of its levels; w is exactly 1.0 at the start.

    Kinds, with their parameters (H heads, L levels, D in_features):

    * `linear` (the default of `convert` up to a million parameters): w = 1 + elu(x W^T + b), `weight` [H*L, D] and
      `bias` [H*L], both 0 at the start.
    * `static`: w = 1 + elu(`logits` [H, L]), the same at all positions; only the first two sizes of x matter.
    * `mlp`: w = 1 + elu(W silu(W_in x + b_in) + b), `weight_in` [hidden, D], `bias_in`, `weight`, `bias`;
      the last layer is 0 at the start.
    * `paper`: w = `gain` * softplus(`level_scale` * (x W^T + b)) / ln 2, `level_scale` [H, L] = 1, W = b = 0
      and a buffer `gain` = 1, so that w is 1 at the start. `from_paper` loads published weights.
    * `routed`: w = 1 + elu(x W^T + b + `gain` [H, L] * `damping` [L] * c), where c[t, l] is the product of token t's
      relu(x_t `query`^T) [R] with the sum of relu(x_s `key`^T) over the tokens s of bucket l. `query` and `key`
      [H*R, D] start with the same random numbers, `gain` with 0; the buffer `damping` is 1 / sqrt(R).

    The rows of `weight` and `bias` are ordered head by head: row h * L + l is level l of head h.

    Args:
        kind: one of the kinds above.
        heads: H, at least 1.
        levels: L, at least 1.
        in_features: D; required by every kind except static, which does not take it.
        hidden: width of the hidden layer; kind mlp only (default 64).
        features: R, the width of a routing query; kind routed only (default 16).
        device: device of the parameters.
        dtype: dtype of the parameters (default float32); w is always computed in float32 or float64.

    Raises:
        LevelWeightsError: unknown kind, or sizes that the kind does not accept.
    """

    descriptor: Tensor

    def __init__(
        self,
        kind: str,
        heads: int,
        levels: int,
        in_features: int | None = None,
        *,
        hidden: int | None = None,
        features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.by_default = False  # whether the kind was chosen (default_kind.py) and not asked for
        self._make(kind, _checked_sizes(kind, heads, levels, in_features, hidden, features), device, dtype)
        # A tensor and not an "extra state": safetensors holds tensors only.
        self.register_buffer("descriptor", self._descriptor(device))
        self._not_one: _Seen | None = None
        # Where its mixer stands in the user's code (passes/names.py), which tensor it reads there
        # (passes/weight_input.py), and that tensor while a call of the owner is under way
        # (torch_internals/owner_input.py).
        self.place: CodePlace | None = None
        self.role: Role | None = None
        self.token: Remembered | None = None  # where it is found in a graph of one token (passes/one_token.py)
        self.owner_input: Tensor | None = None
        _alive.add(self)
        self.reset_parameters()

    def _make(self, kind: str, sizes: Sizes, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.kind, self.sizes = kind, sizes
        # Raw parameters and not nn.Linear, so that nothing which walks a model and re-initialises, quantises or
        # adapts its Linear modules finds these.
        for entry in find_kind(kind).tensors:
            tensor = torch.empty(entry.shape(self.sizes), device=device, dtype=dtype)
            if entry.learned:
                self.register_parameter(entry.name, nn.Parameter(tensor))
            else:
                self.register_buffer(entry.name, tensor)

    def become(self, kind: str, sizes: Sizes) -> None:
        """Change to another kind, at its start; the parameters are new objects, as trainable as the old ones were."""
        old = self._values()
        trained = any(tensor.requires_grad for tensor in old)
        for name, _ in self.tensors():
            delattr(self, name)
        self._make(kind, sizes, old[0].device, old[0].dtype)
        self._not_one = None
        self.requires_grad_(trained)
        self.reset_parameters()

    @staticmethod
    def sizes_of(kind: str, heads: int, levels: int, in_features: int | None) -> Sizes:
        """The sizes of a kind with its own defaults for all others."""
        return _checked_sizes(kind, heads, levels, in_features, None, None)

    @staticmethod
    def description(kind: str, sizes: Sizes) -> Tensor:
        """What a checkpoint says of level weights of this kind and these sizes."""
        return torch.tensor(description(find_kind(kind).code, sizes))

    @property
    def heads(self) -> int:
        """H, the number of heads of w."""
        return self.sizes.heads

    @property
    def own_heads(self) -> int:
        """The heads that this process has weights for: all, unless tensor parallel has split them."""
        by_heads = next(entry.name for entry in find_kind(self.kind).tensors if entry.by_heads)
        return self.heads // sharded_ways(getattr(self, by_heads))

    @property
    def levels(self) -> int:
        """L, the number of levels of w."""
        return self.sizes.levels

    @property
    def in_features(self) -> int | None:
        """D, the last size of x; None for kind static."""
        return self.sizes.in_features or None

    @property
    def features(self) -> int | None:
        """R, the width of a routing query; None for other kinds than routed."""
        return self.sizes.features or None

    def reset_parameters(self) -> None:
        """Reset the parameters so that w is exactly 1. Call it after `to_empty`, as for torch's own modules."""
        with torch.no_grad():
            for entry, tensor in zip(find_kind(self.kind).tensors, self._values(), strict=True):
                if entry.start is None:
                    _fill_uniform(tensor)
        self.set_to_one()
        self._renew_descriptor()

    @torch.no_grad()
    def set_to_one(self) -> None:
        """Set w to exactly 1, without drawing random numbers."""
        for entry, tensor in zip(find_kind(self.kind).tensors, self._values(), strict=True):
            if callable(entry.start):
                tensor.copy_(like(torch.tensor(entry.start(self.sizes)), tensor))
            elif entry.start is not None:
                tensor.fill_(entry.start)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) pairs, in the order of the arguments of `level_weights_function(kind, ...)` after x."""
        return [(entry.name, getattr(self, entry.name)) for entry in find_kind(self.kind).tensors]

    def forward(self, x: Tensor | None) -> Any:
        """Return w [B, T, H, L] in float32 (float64 if x or a parameter is) for x [B, T, D], or [B, T, ...] if static.

        For None, return the list of its tensors in the order of `tensors()`, for a wrapper around the module.

        Raises:
            LevelWeightsError: x has another last size than `in_features`, or fewer than two dimensions.
        """
        if x is None:
            return self._values()
        if x.dim() < 2 or (self.in_features is not None and x.shape[-1] != self.in_features):
            raise LevelWeightsError(
                f"level weights of kind {self.kind!r} take [B, T, {self.in_features or '...'}], got {list(x.shape)}"
            )
        values = self._values()
        dtype = compute_dtype(x.dtype, *(value.dtype for value in values))
        return level_weights_function(self.kind, self.heads, self.levels, dtype)(x, *values)

    @torch.no_grad()
    def is_identity(self) -> bool:
        """True only if w is exactly 1 for every finite input. Not for use inside compiled code: it reads values.

        False also where the values cannot be read (meta and fake tensors, tensors below torch.vmap, a CUDA graph being
        captured), and where only a cancellation inside kind mlp would make w 1.

        A False is remembered until a tensor changes. A True is looked up again at each call, because some optimisers
        (bitsandbytes, anything that writes to `.data`) change values without counting a version, and a stale True
        would let a caller skip trained weights without a word.
        """
        values = self._values()
        if self._not_one is not None and self._not_one.still(values):
            return False
        if any(value.is_meta or isinstance(value, FakeTensor) for value in values) or _capturing(values):
            return False
        try:
            one = bool(find_kind(self.kind).is_one(*map(_comparable, values), sizes=self.sizes))
        except RuntimeError:  # below torch.vmap there is not one value to read
            return False
        self._not_one = None if one else _seen(values)
        return one

    @classmethod
    def from_paper(
        cls, projection: Tensor, level_scale: Tensor, bias: Tensor | None = None, *, key_dim: int | None = None
    ) -> LevelWeights:
        """Kind "paper" with the published function softplus(L * (W x)), exactly, from a published checkpoint.

        | here | gated delta (official code) | Mamba-2 (official code, FLA's LogLinearMamba2) |
        |---|---|---|
        | `projection` [H*L, D] | `l_proj.weight` | the last H*L rows of `in_proj.weight` |
        | `bias` [H*L] or None | none | the last H*L entries of `in_proj.bias`, if any |
        | `level_scale` [H, L] | `L` | `L` |
        | `key_dim` | the size of a key head | None |

        `key_dim` divides by the mixer's scale, see `paper_gain`. Both codes use level 0 for the diagonal and level
        l for buckets of 2^(l-1) tokens, as we do, and 15 levels; longer sequences reuse the last one.

        Raises:
            LevelWeightsError: sizes that do not fit together.
        """
        if level_scale.dim() != 2 or projection.dim() != 2 or projection.shape[0] != level_scale.numel():
            raise LevelWeightsError(
                f"expected a projection [H*L, D] and a level scale [H, L], got {list(projection.shape)} and "
                f"{list(level_scale.shape)}"
            )
        heads, levels = level_scale.shape
        made = cls("paper", heads, levels, projection.shape[1], device=projection.device, dtype=projection.dtype)
        own = dict(made.tensors())
        with torch.no_grad():
            own["weight"].copy_(projection)
            own["level_scale"].copy_(level_scale)
            own["gain"].fill_(paper_gain(key_dim))
            if bias is not None:
                own["bias"].copy_(bias)
        return made

    def extra_repr(self) -> str:
        """Kind and sizes, for print(model)."""
        parts = [f"kind={self.kind!r}", f"heads={self.heads}", f"levels={self.levels}"]
        parts += [f"{name}={size}" for name in _OPTIONAL_SIZES if (size := getattr(self.sizes, name))]
        return ", ".join(parts)

    def _values(self) -> list[Tensor]:
        return [tensor for _, tensor in self.tensors()]

    def _descriptor(self, device: torch.device | str | None) -> Tensor:
        return torch.tensor(description(find_kind(self.kind).code, self.sizes), device=device)

    def _renew_descriptor(self) -> None:
        # A new tensor and not a copy into the old one, which may be an inference tensor.
        self.descriptor = self._descriptor(self.descriptor.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LevelWeights:
        super()._apply(fn, recurse)
        # to_empty leaves uninitialised memory, and the descriptor is no parameter that a checkpoint must restore.
        self._renew_descriptor()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        checked = dict(state_dict)
        key = prefix + "descriptor"
        if key in checked:
            take_kind(self, checked[key])
            self._check_descriptor(checked[key], prefix)
            checked[key] = self._descriptor(checked[key].device)  # undoes a cast of the whole checkpoint
        for name, value in self.tensors():
            if prefix + name in checked and checked[prefix + name].shape != value.shape:
                found = list(checked[prefix + name].shape)
                raise CheckpointError(self._mismatch(prefix, f"{name} {found}", f"{name} {list(value.shape)}"))
        before = len(missing_keys)
        super()._load_from_state_dict(checked, prefix, local_metadata, strict, missing_keys, *rest)
        if not any(isinstance(key, _MissingKey) for key in missing_keys):
            missing_keys[before : before + 1] = map(_MissingKey, missing_keys[before : before + 1])

    def _check_descriptor(self, found: Tensor, prefix: str) -> None:
        if found.is_meta:
            return
        ours = self._descriptor("cpu")
        # Compared in the dtype found: who casts a checkpoint to bfloat16 rounds these numbers, too.
        if found.shape != ours.shape or not torch.equal(found.cpu(), ours.to(found.dtype)):
            raise CheckpointError(self._mismatch(prefix, in_words(found), self.extra_repr()))

    @staticmethod
    def _mismatch(prefix: str, found: str, ours: str) -> str:
        name = prefix.rstrip(".") or "LevelWeights"
        return (
            f"{name}: the checkpoint's level weights are {found}, this model's are {ours}. "
            "Convert the model with the kind and levels of the checkpoint, llcompile.convert(..., "
            f"options={{'level_weights': KIND, 'levels': L}}), before loading it, or leave its {prefix}* entries out."
        )

    def __getstate__(self) -> dict[str, Any]:
        # Weak references neither pickle nor copy, and what a call is about goes with it.
        return {**self.__dict__, "_not_one": None, "owner_input": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(
            {"by_default": False, "place": None, "role": None, "token": None, "owner_input": None, **state}
        )
        _alive.add(self)


class _MissingKey(str):
    """A key that a checkpoint lacks; in torch's message about it, which is for strict loading alone, it says why."""

    def __format__(self, spec: str) -> str:
        return (
            f"{super().__format__(spec)} (level weights, which llcompile.convert has attached: if the checkpoint was "
            "made before, load it before you convert the model, or with strict=False, which leaves the level weights "
            "as they are)"
        )


class _Seen:
    """Which values of which tensors were looked at.

    Weak references, so that an id used again is no match; aliases of the data, so that an address used again is none
    (`p.data = ...` keeps the tensor object and its version).
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), _version(tensor), tensor.detach()) for tensor in tensors]

    def still(self, tensors: list[Tensor]) -> bool:
        return all(
            ref() is tensor and version is not None and version == _version(tensor) and _same_memory(alias, tensor)
            for tensor, (ref, version, alias) in zip(tensors, self._seen, strict=True)
        )


def _seen(tensors: list[Tensor]) -> _Seen | None:
    """None where there is no memory to know them by: torch.func's transforms wrap tensors, and the wrappers die."""
    seen = _Seen(tensors)
    try:
        seen.still(tensors)
    except RuntimeError:
        return None
    return seen


def _comparable(tensor: Tensor) -> Tensor:
    """In a dtype that can be compared; values of float8 are for storage."""
    return tensor if tensor.dtype in COMPUTE_DTYPES else tensor.float()


def _same_memory(alias: Tensor, tensor: Tensor) -> bool:
    return alias.device == tensor.device and alias.dtype == tensor.dtype and alias.data_ptr() == tensor.data_ptr()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _capturing(tensors: list[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()


def _checked_sizes(
    kind: str, heads: int, levels: int, in_features: int | None, hidden: int | None, features: int | None
) -> Sizes:
    entry = find_kind(kind)
    if heads < 1 or levels < 1:
        raise LevelWeightsError(f"level weights need at least one head and one level, got {heads=} and {levels=}")
    if entry.needs_input and (in_features is None or in_features < 1):
        raise LevelWeightsError(f"level weights of kind {kind!r} need in_features, the last size of the mixer's input")
    if not entry.needs_input and in_features is not None:
        raise LevelWeightsError(f"level weights of kind {kind!r} do not use the input: leave in_features out")
    if hidden is not None and (not entry.needs_hidden or hidden < 1):
        raise LevelWeightsError(f"hidden={hidden} is not an argument of level weights of kind {kind!r}")
    if features is not None and (not entry.reads_buckets or features < 1):
        raise LevelWeightsError(f"features={features} is not an argument of level weights of kind {kind!r}")
    return Sizes(
        heads,
        levels,
        in_features or 0,
        (hidden or HIDDEN) if entry.needs_hidden else 0,
        (features or FEATURES) if entry.reads_buckets else 0,
    )


def _fill_uniform(tensor: Tensor) -> None:
    """Uniform as in nn.Linear, from a stream of its own: converting a model must not shift the user's random numbers,
    and every rank of a distributed run must draw the same."""
    if tensor.is_meta:
        return
    bound = 1.0 / math.sqrt(tensor.shape[-1])
    drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
    tensor.copy_(like(drawn * (2.0 * bound) - bound, tensor))
