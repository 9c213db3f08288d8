"""What is known of one call of the operator beside its operands: where its sequences are, and what its states are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llcompile.patterns.known.state_layout import OPERATOR


@dataclass(frozen=True)
class Sequences:
    """What says where the sequences are in their rows; one of the three, by the operator's own names."""

    cu_seqlens: Any = None
    attention_mask: Any = None
    seq_idx: Any = None


@dataclass(frozen=True)
class OperatorCall:
    """What decides which operator is called.

    Args:
        own_state: a state that comes in has levels.
        single: it is one token.
        wants_state: a state goes out.
        state_axes: the axes of the code's own linear states (see state_layout.py).
        routing_state: what routed level weights leave in the state that goes out (see routing.py), or None.
    """

    own_state: bool = False
    single: bool = False
    wants_state: bool = False
    state_axes: tuple[str, ...] = OPERATOR
    routing_state: Any = None
