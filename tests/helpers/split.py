"""Models whose heads are split over processes by the projections: a mixer, a plan, and level weights off 1."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from llcompile.distributed import LevelWeightsParallel

OPTIONS = {"inner": "eager", "strict": True}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Split(nn.Module):
    """A gated delta rule, by a known function, that takes as many heads as its projections give it."""

    def __init__(self, width: int = 16, heads: int = 4, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.a, self.b = nn.Linear(width, heads), nn.Linear(width, heads)
        self.out = nn.Linear(heads * size, width)

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)) for f in (self.q, self.k, self.v))
        decay, beta = -0.2 * F.softplus(self.a(x)), self.b(x).sigmoid()
        return torch_chunk_gated_delta_rule(q, k, v, decay, beta, use_qk_l2norm_in_kernel=True)[0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mixed(x).flatten(-2).to(x.dtype))


PLAN = {**{f"layers.*.{n}": ColwiseParallel() for n in "qkvab"}, "layers.*.out": RowwiseParallel()}
LEVELS = {"layers.*.loglinear": LevelWeightsParallel()}


def perturb(model: nn.Module) -> None:
    """Level weights off 1, the same ones wherever they are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "loglinear" in name:
                values = 0.3 * torch.randn(p.shape, generator=generator)
                p.copy_(distribute_tensor(values, p.device_mesh, p.placements) if isinstance(p, DTensor) else values)
