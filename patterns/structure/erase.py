"""Erase: ways to read live-ins as a mixer whose state is erased along a key of its own.

S_t = (diag(a_t) - x_t y_t^T) S_{t-1} + k_t v_t^T, where x and y are products of live-ins. Most readings are ruled out
by one run each: twice one factor of x y^T and half of another one leave the result as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llcompile.patterns.agreement import difference
from llcompile.patterns.boundary import NOT_SHOWN
from llcompile.patterns.structure.classify import Roles
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.probe import Probe

_SAME = 1e-6
_DECAY, _BETA, _WRITE, _READ, _TAKEN, _BOTH = "decay", "beta", "write", "read", "taken", "both"


@dataclass(frozen=True)
class Assignment:
    """Which live-in is a part of what.

    Args:
        key: what is written with.
        read, taken: what y and x are products of.
        decay: the decay, or None.
        beta: what both what is erased and what is written are multiplied with, or None.
        factors: what only what is written is multiplied with.
    """

    key: LiveIn
    read: tuple[LiveIn, ...]
    taken: tuple[LiveIn, ...]
    decay: LiveIn | None
    beta: LiveIn | None
    factors: tuple[LiveIn, ...]


def assignments(probe: Probe, roles: Roles, base: Tensor) -> Iterator[Assignment]:
    """Every way to read the live-ins that the size of what is erased allows."""
    if not roles.linear_query or roles.value is None:
        return
    scaling = _Scaling(probe, roles.value, base)
    for key in roles.keyed:
        linear = roles.degree[key] == 1
        others = [s for s in (*roles.keyed, *roles.scalars, *roles.timeless) if s is not key]
        for picked in itertools.product(*(_choices(roles, s) for s in others)):
            if picked.count(_DECAY) > 1 or picked.count(_BETA) > 1:
                continue
            named = dict(zip(others, picked, strict=True))
            for own in (None,) if linear else (_READ, _TAKEN, _BOTH):
                found = _assigned(key, own, named)
                if _is_possible(found, roles) and scaling.fits(found, roles.keyed):
                    yield found


def _choices(roles: Roles, live_in: LiveIn) -> list[str]:
    if live_in in roles.keyed:
        return [_DECAY, _READ, _TAKEN, _BOTH]
    if roles.degree[live_in] == 1:
        return [_WRITE] if live_in not in roles.timeless else []
    found = [_READ] if live_in in roles.strict else [_BETA, _READ]
    return [*found, _DECAY]


def _assigned(key: LiveIn, own: str | None, named: dict[LiveIn, str]) -> Assignment:
    whole = {**({} if own is None else {key: own}), **named}
    of = lambda *roles: tuple(s for s, role in whole.items() if role in roles)  # noqa: E731
    one = lambda role: next(iter(of(role)), None)  # noqa: E731
    return Assignment(key, of(_READ, _BOTH), of(_TAKEN, _BOTH), one(_DECAY), one(_BETA), of(_WRITE))


def _is_possible(found: Assignment, roles: Roles) -> bool:
    """Whether something with the key's axis is read, and taken, and it is not the delta rule."""
    keyed = lambda live_ins: [s for s in live_ins if s in roles.keyed or s in roles.bonus]  # noqa: E731
    plain = found.read == found.taken == (found.key,)
    return bool(keyed(found.read) and keyed(found.taken)) and not plain


class _Scaling:
    """Whether a result stays as it is where one factor of what is erased is doubled, and another one makes up for it.

    Args:
        probe: the subgraph.
        value: its value, which makes up for what becomes of the key.
        base: its result.
    """

    def __init__(self, probe: Probe, value: LiveIn, base: Tensor) -> None:
        self.probe, self.value, self.base = probe, value, base
        self._known: dict[frozenset[tuple[LiveIn, float]], bool] = {}

    def fits(self, found: Assignment, keyed: list[LiveIn]) -> bool:
        """Whether it does for each two factors that have the key's axis."""
        erased = [*found.read, *found.taken]
        parts = [s for s in dict.fromkeys(erased) if s in keyed]
        first, *rest = sorted(parts, key=lambda s: s is found.key)
        return all(self._stays(self._changes(found, erased, first, other)) for other in rest)

    @staticmethod
    def _changes(found: Assignment, erased: list[LiveIn], one: LiveIn, two: LiveIn) -> dict[LiveIn, float]:
        """Two live-ins -> factors that leave what is erased as it is."""
        return {one: 2.0, two: 2.0 ** (-erased.count(one) / erased.count(two))}

    def _stays(self, changes: dict[LiveIn, float]) -> bool:
        known = frozenset(changes.items())
        if known not in self._known:
            self._known[known] = self._measured(changes)
        return self._known[known]

    def _measured(self, changes: dict[LiveIn, float]) -> bool:
        changed = {s: self.probe.values[s] * factor for s, factor in changes.items()}
        try:
            other = self.probe.outputs(changed)
        except NOT_SHOWN:
            return False
        if difference(self.base, other) < _SAME:
            return True
        # One of them is the key: what it writes has another size.
        size = float((other * self.base).sum() / (other * other).sum().clamp_min(1e-300))
        return any(abs(size * f - 1) < _SAME for f in changes.values()) and difference(self.base, other * size) < _SAME


def erase_scale(ours: tuple[Tensor, Tensor], theirs: Tensor) -> float | None:
    """The factor on what is erased, from what the second token leaves of the first.

    Up to a factor that is what no erasing leaves, and this factor times what erasing takes away.

    Args:
        ours: what is left without erasing, and with a factor of one.
        theirs: what the subgraph leaves.
    """
    none, whole = ours
    basis = torch.stack([none, whole - none], 1).double()
    found = torch.linalg.lstsq(basis, theirs.double()[:, None], driver="gelsd").solution[:, 0]
    if not float(found[0].abs()) > 0 or difference(theirs[None].double(), (basis @ found)[None]) > _SAME:
        return None
    factor = float(found[1] / found[0])
    near = round(factor)
    return float(near) if near and abs(factor - near) < 1e-9 else factor
