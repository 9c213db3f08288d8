"""Lightning Fabric: setup, mixed precision, checkpoints. See `test_installed.py`, which installs it and runs this."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import llcompile
from tests.helpers import small
from tests.trainers.adapted import EAGER, IDS, compiled, converted, output

fabrics = pytest.importorskip("lightning_fabric", reason="Lightning Fabric is not installed; see test_installed.py")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]


def fabric_of(precision: str = "32-true") -> Any:
    return fabrics.Fabric(accelerator="cpu", devices=1, precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("order", ["compiled and set up", "set up and compiled"])
def test_trains(precision: str, order: str) -> None:
    """The losses and the level weights are those of a plain loop."""
    losses, levels = [], []
    for plainly in (True, False):
        torch._dynamo.reset()
        model, fabric = converted(), fabric_of(precision)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
        net: Any = model
        if plainly or order.startswith("compiled"):
            net = torch.compile(model, backend="loglinear", options=EAGER)
        if not plainly:
            net, optimizer = fabric.setup(net, optimizer)
            if not order.startswith("compiled"):
                net = torch.compile(net, backend="loglinear", options=EAGER)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=plainly and precision == "bf16-mixed"):
                loss = small.loss(net(IDS), IDS)
            loss.backward() if plainly else fabric.backward(loss)
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in llcompile.level_parameters(model))
            optimizer.step()
        losses.append(float(loss.detach()))
        levels.append([p.detach().clone() for p in llcompile.level_parameters(model)])
    assert abs(losses[0] - losses[1]) < 1e-6
    for one, other, start in zip(*levels, llcompile.level_parameters(converted()), strict=True):
        assert not torch.equal(one, start)
        assert small.difference(other - start, one - start) < 1e-6


def test_saves_and_loads(tmp_path: Path) -> None:
    fabric = fabric_of()
    model = converted()
    net, optimizer = fabric.setup(compiled(model), torch.optim.AdamW(model.parameters(), lr=0.05))
    for _ in range(2):
        fabric.backward(small.loss(net(IDS), IDS))
        optimizer.step()
        optimizer.zero_grad()
    expected = output(net)
    fabric.save(tmp_path / "state.ckpt", {"model": net, "optimizer": optimizer})
    again = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error", llcompile.errors.LLCompileWarning)
        other, second = fabric.setup(compiled(again), torch.optim.AdamW(again.parameters(), lr=0.05))
        assert small.difference(output(other), expected) > 1e-3
        fabric.load(tmp_path / "state.ckpt", {"model": other, "optimizer": second})
        assert small.difference(output(other), expected) < 1e-6
    for run, steps in ((net, optimizer), (other, second)):
        fabric.backward(small.loss(run(IDS), IDS))
        steps.step()
    assert small.difference(output(other), output(net)) < 1e-6
    with torch.no_grad():
        for p in llcompile.level_parameters(again):
            p.add_(1.0)
    assert small.difference(output(other), output(net)) > 1e-3
