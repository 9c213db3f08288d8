"""Training a converted model: its level weights alone, or beside its own weights at another learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from llcompile.errors import LevelWeightsError, ModelError
from llcompile.weights.held import active, held


@dataclass(frozen=True)
class Trained:
    """How much of a model is trained. `print` shows it: "trains 0.4 % of the parameters (12,288 of 3,145,728)".

    Args:
        trained: number of parameters that require a gradient.
        total: number of parameters.
    """

    trained: int
    total: int

    @property
    def share(self) -> float:
        """Share of the parameters that is trained, from 0 to 1."""
        return self.trained / max(1, self.total)

    def __str__(self) -> str:
        return f"trains {100 * self.share:.2g} % of the parameters ({self.trained:,} of {self.total:,})"


def level_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of all level weights, for an optimizer or to freeze them; each comes once.

    Args:
        model: any nn.Module, also one wrapped by PEFT or `torch.compile`. One without level weights has none.

    Raises:
        ModelError: `model` is not an nn.Module.
    """
    _expect_module(model, "level_parameters")
    found = [active(owner, name) for owner in model.modules() for name, _ in held(owner)]
    return iter({id(p): p for weights in found for p in weights.parameters()}.values())


def freeze_except_levels(model: nn.Module) -> Trained:
    """Set `requires_grad` to True for the level weights and to False for all other parameters.

    Args:
        model: a converted model; changed in place. `model.requires_grad_(True)` takes it back.

    Returns:
        How much is trained now; print it.

    Raises:
        ModelError: `model` is not an nn.Module.
        LevelWeightsError: the model has no level weights; it is unchanged.
    """
    levels = {id(p) for p in _expect_levels(model, "freeze_except_levels")}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in levels)
    return trained_of(model)


def trained_of(model: nn.Module) -> Trained:
    """How much of a model is trained as it is."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Trained(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def parameter_groups(
    model: nn.Module,
    lr: float,
    level_lr: float | None = None,
    weight_decay: float = 0.0,
    level_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: level weights at a learning rate of their own and without weight decay.

    Decay pulls level weights back to 1, that is, to the linear model. Parameters with fewer than two dimensions
    (biases, norms) and those that are marked with `_no_weight_decay` (as Mamba's `A_log` is) are not decayed either.
    Parameters that do not require a gradient are left out, and so are empty groups.

    Args:
        model: a converted model.
        lr: learning rate of the model's own parameters.
        level_lr: learning rate of the level weights; ten times `lr` by default.
        weight_decay: of the model's own parameters.
        level_weight_decay: of the level weights.

    Returns:
        Groups with the keys "name" ("decayed", "not decayed", "level weights"), "params", "lr" and "weight_decay".

    Raises:
        ModelError: `model` is not an nn.Module.
        LevelWeightsError: the model has no level weights, so that an optimizer made now would never train any.
    """
    levels = {id(p): p for p in _expect_levels(model, "parameter_groups")}
    others = [p for p in model.parameters() if id(p) not in levels]
    rows = (
        ("decayed", [p for p in others if _decays(p)], lr, weight_decay),
        ("not decayed", [p for p in others if not _decays(p)], lr, 0.0),
        # Last: states of optimizers and schedulers from before the conversion count groups in order.
        ("level weights", list(levels.values()), 10 * lr if level_lr is None else level_lr, level_weight_decay),
    )
    groups = [
        {"name": name, "params": [p for p in found if p.requires_grad], "lr": rate, "weight_decay": decay}
        for name, found, rate, decay in rows
    ]
    return [group for group in groups if group["params"]]


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False)


def _expect_levels(model: nn.Module, call: str) -> list[nn.Parameter]:
    _expect_module(model, call)
    found = list(level_parameters(model))
    if not found:
        raise LevelWeightsError(
            f"llcompile.{call}: {type(model).__name__} has no level weights. "
            "Call llcompile.convert(model, *inputs) first."
        )
    return found


def _expect_module(model: Any, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"llcompile.{call} takes an nn.Module, got {type(model).__name__}.")
