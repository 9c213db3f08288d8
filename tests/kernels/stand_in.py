"""In place of the Triton kernels: what computes as ATen does, or as a wrong kernel would. No GPU is needed."""

from __future__ import annotations

import torch

from llcompile.kernels import choice
from llcompile.kernels.implementations import ATEN, Triton
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.replay import without_queries
from llcompile.kernels.state import empty_state, is_level_state
from tests.kernels.kernel_cases import operands


class StandIn(Triton):
    """In place of the kernels: ATen's results with `change` applied to the ones of one pass; counts its calls."""

    def __init__(self, sweep: str = "", change=None) -> None:
        self.sweep, self.change, self.calls = sweep, change, 0

    def reason(self, d, device):
        return None

    def refusal(self, error, d, device):
        return None

    def _changed(self, sweep, found):
        self.calls += 1
        return found if sweep != self.sweep else self.change([t if t is None else t.clone() for t in found])

    def forward(self, x, scale, return_final_state):
        return tuple(self._changed("forward", ATEN.forward(x, scale, return_final_state)))

    def backward(self, x, scale, grad_o, grad_state):
        return self._changed("backward", ATEN.backward(x, scale, grad_o, grad_state))

    def step(self, token, routing=None):
        return tuple(self._changed("step", ATEN.step(token, routing)))

    def step_in_place(self, token, routing=None):
        o, state = self._changed("step in place", [ATEN.step_in_place(token, routing), token.state])
        token.state.copy_(state)
        return o

    def replay(self, x, occupied, scale):
        (found,) = self._changed("replay", [ATEN.replay(x, occupied, scale)])
        return found

    def fold(self, x, occupied, merged):
        state = ATEN.fold(x, occupied, merged)
        levels = state[:, :, 1:] if is_level_state(state) else state
        (found,) = self._changed("fold", [levels.contiguous()])
        levels.copy_(found)
        return state

    def readouts(self):
        plain, changed = ATEN.readouts(), self._changed

        class Form:
            forward = staticmethod(lambda *x: changed("forward", plain.forward(*x)))
            backward = staticmethod(lambda *x: changed("backward", plain.backward(*x)))
            step = staticmethod(lambda *x: changed("step", plain.step(*x)))

        return Form


def one_number(found):
    """One number of the first result is wrong by half of the largest."""
    found[0].view(-1)[3] += 0.5 * found[0].abs().max()
    return found


def calls():
    """A pass of each kind."""
    x = Operands(*operands(20, dtype=torch.float32, delta=True, levels=6, key_dim=8, value_dim=8).values(), None)
    state = empty_state(2, 4, 8, 8, 6)
    last = x._replace(q=x.q[:, -1:], level_weights=x.level_weights[:, -1:], initial_state=state)
    token = (*(t[:, 0] for t in x[:4]), state, x.log_decay[:, 0], None, x.beta[:, 0])
    return {
        "forward": lambda: choice.forward(x, 1.0, False)[0],
        "backward": lambda: choice.backward(x, 1.0, x.v, None)[2],
        "step": lambda: choice.step(Token(*token))[0],
        "step in place": lambda: choice.step_in_place(Token(*token)._replace(state=state.clone())),
        "replay": lambda: choice.replay(last, None, 1.0),
        "fold": lambda: choice.fold(without_queries(last), None, True),
    }
