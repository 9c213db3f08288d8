"""Running: a model as an arm trains it, compiled once for all seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llcompile.conversion import convert
from llcompile.errors import TrialError
from llcompile.report import Report
from llcompile.trials.arms import LEVELS, PASSING, Arm
from llcompile.trials.batches import Batch
from llcompile.trials.outputs import inputs, logits_of
from llcompile.trials.passing import Protocol, detached, protocol_of
from llcompile.trials.plan import Plan
from llcompile.weights.level_weights import LevelWeights

ModelFn = Callable[[], nn.Module]
State = Mapping[str, Tensor]
OwnLoss = Callable[[Callable[..., Any], Batch], Tensor]
_WIDTH = 32  # features for which `level_rate` holds


class Runner:
    """A model and what runs it.

    Args:
        arm: which arm it is.
        model: its parameters are those that are trained.
        run: what torch.compile made of it, or the model itself.
        protocol: how it passes a state, for the arm that does.
        report: of the conversion, if there was one.
    """

    def __init__(
        self, arm: Arm, model: nn.Module, run: Callable[..., Any], protocol: Protocol | None, report: Report | None
    ) -> None:
        self.arm, self.model, self.run, self.protocol, self.report = arm, model, run, protocol, report
        self.levels = [module for module in model.modules() if isinstance(module, LevelWeights)]
        self.state: Any = None  # passed from batch to batch
        self._of_levels = {id(p) for weights in self.levels for p in weights.parameters()}

    def start(self, checkpoint: State, seed: int) -> None:
        """Load the checkpoint, and draw new level weights; each is 1."""
        torch.manual_seed(seed)
        for weights in self.levels:
            weights.reset_parameters()
        own = {name: x for name, x in self.model.state_dict().items() if is_level_weight(name)}
        self.model.load_state_dict({**checkpoint, **own})
        self.state = None

    def __call__(self, batch: Batch) -> Any:
        """The model's output for a batch, without a state."""
        return self.run(batch.tokens, **inputs(self.model, batch))

    def logits(self, batch: Batch) -> Tensor:
        """The logits [B, T, vocabulary] for a batch, without a state."""
        return logits_of(self(batch))

    def training_logits(self, batch: Batch) -> Tensor:
        """As `logits`, from the state that the batch before has left, in the arm that passes it."""
        if self.protocol is None or self.arm.what != PASSING:
            return self.logits(batch)
        output, state = self.protocol.call(self.model, batch.tokens, self.state, batch.inputs)
        self.state = detached(state)
        return logits_of(output)

    def groups(self, plan: Plan) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; what is not in them is not trained."""
        groups = [
            # Adam moves each weight by about its rate, and a sum over D features by D times that.
            {
                "params": list(weights.parameters()),
                "lr": plan.level_rate * min(1.0, _WIDTH / (weights.in_features or 1)),
                "weight_decay": 0.0,
            }
            for weights in self.levels
        ]
        if self.arm.what != LEVELS:
            own = [p for p in self.model.parameters() if id(p) not in self._of_levels and p.requires_grad]
            groups.append({"params": own, "lr": self.arm.rate, "weight_decay": plan.weight_decay})
        return [group for group in groups if group["params"]]

    @contextmanager
    def without_levels(self) -> Iterator[None]:
        """Every level weight is 1 inside."""
        trained = [{name: x.clone() for name, x in weights.state_dict().items()} for weights in self.levels]
        for weights in self.levels:
            weights.set_to_one()
        try:
            yield
        finally:
            for weights, values in zip(self.levels, trained, strict=True):
                weights.load_state_dict(values)


def build(arm: Arm, model_fn: ModelFn, example: Batch, plan: Plan, levels: int, verify: bool = False) -> Runner:
    """The arm's model, converted and compiled as the plan says."""
    model = made(model_fn).to(plan.place).train()
    example = example.to(plan.place)
    if not arm.converted:
        protocol = protocol_of(model) if arm.what == PASSING else None
        plain = plan.inner == "eager" or protocol is not None
        run = model if plain else torch.compile(model, backend=plan.inner, dynamic=False)
        return Runner(arm, model, run, protocol, None)
    options: dict[str, Any] = {"level_weights": arm.kind, "levels": levels}
    report = convert(model, example.tokens, options=options, verify=verify, **inputs(model, example))
    run = torch.compile(model, backend="loglinear", dynamic=False, options={**options, "inner": plan.inner})
    return Runner(arm, model, run, None, report)


def made(model_fn: ModelFn) -> nn.Module:
    """The user's model.

    Raises:
        TrialError: the function gives something else, or a converted model.
    """
    model = model_fn()
    if not isinstance(model, nn.Module):
        raise TrialError(f"model_fn() gave a {type(model).__name__}; expected an nn.Module")
    found = next((name for name in model.state_dict() if is_level_weight(name)), None)
    if found is not None:
        raise TrialError(
            f"model_fn() gave a model that is converted (it has {found}); give the unconverted one (llcompile.revert)"
        )
    return model


def is_level_weight(name: str) -> bool:
    """Whether a parameter or buffer of this name came with a conversion."""
    return "loglinear" in name.split(".")
