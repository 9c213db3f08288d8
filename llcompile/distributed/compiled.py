"""Compiled graphs under context parallel: made ready where they are compiled, refused where they were not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from llcompile.errors import DistributedError
from llcompile.kernels import spread


def prepare(module: fx.GraphModule) -> bool:
    """Make a rewritten graph ready for shards, where it is compiled inside of a context; returns whether it is."""
    if spread.current() is None:
        return False
    from llcompile.distributed import halo, local  # loads torch.distributed

    halo.add_halos(module)
    local.check(module)
    return True


def guarded(compiled: Callable[..., Any], ready: bool) -> Callable[..., Any]:
    """The compiled graph, which runs inside of a context only if it is ready for one.

    Raises:
        DistributedError: inside of a context, by a graph that was compiled outside of it.
    """

    def run(*args: Any) -> Any:
        over = spread.current()
        if over is None:
            return compiled(*args)
        if not ready:
            raise DistributedError(
                "this graph was compiled outside of llcompile.distributed.context_parallel, so it is not known which "
                "of its parts read tokens of other processes; make the first call of the compiled model inside, after "
                "torch._dynamo.reset() if it has run before"
            )
        results = compiled(*args)
        _remember(over, results)
        return results

    if hasattr(compiled, "_boxed_call"):
        run._boxed_call = compiled._boxed_call  # type: ignore[attr-defined]
    return run


def _remember(over: spread.Spread, results: Any) -> None:
    """Have the backward pass of what made `results` run by `over`, in whatever context it is called."""
    given = results if isinstance(results, (tuple, list)) else (results,)
    nodes = {x.grad_fn for x in given if isinstance(x, Tensor) and x.grad_fn is not None}
    for node in nodes:
        _around(node, over)


def _around(node: Any, over: spread.Spread) -> None:
    entered: list[Any] = []

    def enter(_: Any) -> None:
        entered.append(spread.run_by(over))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    node.register_prehook(enter)
    node.register_hook(leave)
