"""Split the heads of a converted model over two processes, and compare with one process that has all of them.

torchrun --nproc-per-node 2 examples/distributed/tensor_parallel.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import llcompile
from llcompile.distributed import LevelWeightsParallel

HEADS, SIZE, WIDTH = 4, 8, 32


class Mixer(nn.Module):
    """Linear attention with a decay, written out; it takes as many heads as its projections give it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.decay = nn.Linear(WIDTH, HEADS)
        self.out = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.query, self.key, self.value))
        decay = F.logsigmoid(self.decay(x)).transpose(1, 2).cumsum(-1)  # [B, H, T]
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        factor = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(future, float("-inf")).exp()
        o = (q @ k.transpose(-1, -2) * factor) @ v
        return x + self.out(o.transpose(1, 2).flatten(2))


PLAN = {
    **{f"*.{name}": ColwiseParallel() for name in ("query", "key", "value", "decay")},
    "*.loglinear": LevelWeightsParallel(),
    "*.out": RowwiseParallel(),
}


def whole(x: Tensor) -> Tensor:
    """A tensor of all processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(model: nn.Module) -> None:
    """Level weights as after a training: no longer 1, the same on one process and on two."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loglinear" in name:
                values = 0.3 * torch.randn(parameter.shape, generator=generator)
                if isinstance(parameter, DTensor):
                    values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
                parameter.copy_(values)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients."""
    out: Tensor = torch.compile(model, backend="loglinear")(x)
    out.square().mean().backward()
    return out.detach(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    """Convert, split, and take one step."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # the same model and tokens on both
    model, x = nn.Sequential(Mixer()), torch.randn(2, 32, WIDTH)
    llcompile.convert(model, x)
    one = copy.deepcopy(model)
    linear = one(x).detach()
    trained(one)
    expected, gradients = step(one, x)

    torch._dynamo.reset()
    parallelize_module(model, mesh, PLAN)
    trained(model)
    out, found = step(model, x)

    moved = float((expected - linear).abs().max())
    off = float((out - expected).abs().max())
    off_gradient = max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in gradients.items())
    assert moved > 0.01, "the level weights do not act"
    assert off < 1e-4 * moved, f"the output differs from that of one process by {off:.1e}"
    assert off_gradient < 1e-4, f"gradients differ from those of one process by {off_gradient:.1e}"
    if dist.get_rank() == 0:
        weights = model[0].loglinear.weight
        print(f"level weights {list(weights.shape)}, of which each process has {list(weights.to_local().shape)}")
        print(f"largest difference {off:.1e} of an output that level weights moved by {moved:.1e}")
        print(f"largest difference of a gradient, relative to its largest value, {off_gradient:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
