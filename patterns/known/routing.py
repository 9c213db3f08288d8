"""Routing: what routed level weights read in the buckets of one call of a mixer, and what they leave for the next call.

Plain torch calls, as in lower.py: they run on tensors and write themselves on proxies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import llcompile.kernels.readout_operators  # noqa: F401  (registers torch.ops.llcompile)
from llcompile.kernels import routing_state
from llcompile.kernels.header import DIGITS
from llcompile.patterns.known import early
from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.mixer import Mixer, MixerShape


@dataclass
class Routing:
    """One call.

    Args:
        mixer: as it is called.
        call, sequences: how it is called.
        shape: its sizes.
        sets: W, how many sets of level weights it has.
        features: R, the width of a query.
        final: the routing state after the last token, once `readouts` has run and where a state goes out.
    """

    mixer: Mixer
    call: OperatorCall
    sequences: Sequences | None
    shape: MixerShape
    sets: int
    features: int
    final: Any = None

    def readouts(self, query: Any, key: Any, levels: int) -> Any:
        """What queries [B, T, W, R] read in each bucket of keys [B, T, W, R]: [B, T, W, L]."""
        if not self.mixer.early:
            return self._read(query, key, levels, None if self._one_token else self._came_in(levels))
        state = self._came_in(levels)
        # A mixer that reads early reads the buckets as the token before has left them, and so do its level weights.
        first = None if state is None else lambda rows: self._before(rows(query), state, levels)
        if self.call.single:
            found = self._read(query, key, levels, state)
            return torch.zeros_like(found) if first is None else first(lambda x: x[:, 0]).unsqueeze(1)
        return early.moved_back(self._read(query.roll(-1, 1), key, levels, state), self.sequences, first)

    def _read(self, query: Any, key: Any, levels: int, state: Any) -> Any:
        """As `readouts`; and keeps what goes out."""
        if self._one_token:
            # A step reads the headers of the mixer's state where they are.
            token = query.squeeze(1), key.squeeze(1), self.mixer.initial_state
            found = torch.ops.llcompile.level_readouts_step(*token, levels)
            self.final = found[1]
            return found[0].unsqueeze(1)
        s = self.sequences
        where = (None, None, None) if s is None else (s.cu_seqlens, s.attention_mask, s.seq_idx)
        goes_out = self.call.wants_state
        found = torch.ops.llcompile.level_readouts(query, key, levels, state, *where, goes_out)
        self.final = found[1] if goes_out else None
        return found[0]

    @property
    def _one_token(self) -> bool:
        return self.call.single and self.call.own_state

    def _before(self, query: Any, state: Any, levels: int) -> Any:
        """What queries [N, W, R] read in a routing state [N, W, 8 + L * R]: [N, W, L]."""
        sums = state[:, :, DIGITS:].unflatten(2, (levels, self.features)).type_as(query)
        return (query.unsqueeze(2) * sums).sum(-1)

    def _came_in(self, levels: int) -> Any:
        """The routing state in the header of a level state; None for a linear one, of which the keys are not known."""
        if not self.call.own_state:
            return None
        s = self.shape
        sizes = s.heads, s.key_dim, s.value_dim
        return routing_state.read_as(self.mixer.initial_state, sizes, self.sets, levels, self.features)
