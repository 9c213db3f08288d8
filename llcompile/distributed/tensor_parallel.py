"""Tensor parallel: level weights in the plans of `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from llcompile.errors import DistributedError
from llcompile.weights import head_shards
from llcompile.weights.level_weights import LevelWeights


class LevelWeightsParallel(ParallelStyle):
    """Split level weights by heads, for a mixer whose projections are split by heads.

    For models that are converted before `parallelize_module`; later, `convert` does it by itself. Each tensor
    `[H * L, ...]` is sharded over its rows, head by head, as `ColwiseParallel` shards the projections `[H * K, D]`;
    what has no heads is replicated. One set of level weights that serves all heads is kept by all processes.

        plan = {"layers.*.q": ColwiseParallel(), ..., "layers.*.loglinear": LevelWeightsParallel()}
        parallelize_module(model, mesh, plan)

    Raises:
        DistributedError: the plan names another module.
        LevelWeightsError: the number of heads is no multiple of the processes, or they are split already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LevelWeights):
            raise DistributedError(
                f"LevelWeightsParallel is for level weights, the modules `loglinear` that llcompile.convert attaches, "
                f"and the plan gives it to a {type(module).__name__}; name them in the plan: 'layers.*.loglinear'"
            )
        head_shards.shard(module, device_mesh, range(device_mesh.ndim), self.src_data_rank)
        return module
