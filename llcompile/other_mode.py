"""The other mode: what was found in eval is looked at in training, too, and the other way about.

Code that asks for `training` may be another program there: dropout on the scores is no mixer. Level weights that act
in eval alone would never learn, so such a mixer is declined at the conversion; what acts in training alone keeps its
level weights, with a note. The look is made only where code of a converted module has read a `training` flag.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from llcompile import missed
from llcompile import driver as compile_run
from llcompile.options import Options
from llcompile.passes import pipeline
from llcompile.torch_internals import reach, recompile_room
from llcompile.torch_internals.trace import traced_once
from llcompile.transaction import transaction
from llcompile.verify import Mixer, Verdict


def judge(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    mixers: Sequence[Mixer],
    read: Collection[int],
) -> Verdict:
    """The mixers that must not be rewritten for what they are in the other mode, and notes on others.

    Args:
        model, args, kwargs, options: as for the conversion that has just been made.
        mixers: what it has converted.
        read: ids of the modules whose `training` the traced code has read.
    """
    asking = [m for m in mixers if m.weights is not None and any(id(part) in read for part in m.owner.modules())]
    if not asking:
        return Verdict()
    mode = not next(iter(asking)).owner.training
    look = Look(options, {id(module): name for name, module in model.named_modules()})
    try:
        _run(model, args, kwargs, look, mode)
    except Exception:  # it does not run in the other mode on these inputs: nothing is known, and a call will tell
        return Verdict()
    verdict = Verdict()
    for mixer in asking:
        reason = look.missed.get(mixer.key) if mixer.key not in look.read else None
        if reason is not None and mode and mixer.fresh:
            verdict.blamed[mixer] = (
                f"in training it is another program, so that level weights would not learn: {reason}"
            )
        elif reason is not None:
            verdict.notes[mixer] = f"in {missed.mode_name(mode)} it is no mixer, and a compiled call says so: {reason}"
    return verdict


class Look:
    """A backend that looks at each graph, keeps which level weights it reads, and runs the model's own code."""

    _llcompile = True
    __name__ = "loglinear_other_mode"

    def __init__(self, options: Options, names: dict[int, str]) -> None:
        self.options, self.names = options, names
        self.read: set[tuple[int, str]] = set()
        self.missed: dict[tuple[int, str], str] = {}
        self.kwargs = {"options": {"level_weights": options.level_weights}}

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Looks as `inspect` does: nothing is attached."""
        recompile_room.make_room(reach.root_module())
        reach.guard_modules()
        session = compile_run.new_session(module, self.options, self.names, dry_run=True)
        pipeline.look(session)
        self.read.update((id(s.owner), s.attribute) for s in session.sites if s.open)
        for owner, unread in missed.misses(session):
            self.missed.update(((id(owner), name), missed.why(session, owner)) for name in unread)
        return compile_run.original_code(session)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], look: Look, mode: bool) -> None:
    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    before = [(module, module.training) for module in model.modules()]
    try:
        static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
        with transaction(model, args, kwargs), static, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.train(mode)
            traced_once(run, look)(*args, **kwargs)
    finally:
        for module, training in before:
            module.training = training
