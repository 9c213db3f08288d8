"""trial: train a model as it is and converted, from one checkpoint and on the same batches, and judge."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llcompile.errors import TrialError
from llcompile.kernels.levels import level_count
from llcompile.report import Report
from llcompile.trials import batches as data
from llcompile.trials import before
from llcompile.trials.arms import LEVELS, Arm, arms
from llcompile.trials.batches import Batch, Source
from llcompile.trials.costs import costs
from llcompile.trials.measures import bins_of, edges
from llcompile.trials.passing import refusal
from llcompile.trials.plan import Plan
from llcompile.trials.result import Trial
from llcompile.trials.running import ModelFn, OwnLoss, build, made
from llcompile.trials.sources import Cut, source
from llcompile.trials.store import Store, digest
from llcompile.trials.training import Record
from llcompile.trials.verdict import NOTHING, Verdict, judge
from llcompile.trials.workers import Count, Setup, room, run_all, say


def trial(
    model_fn: ModelFn,
    batches: Source | Tensor,
    *,
    loss: OwnLoss | None = None,
    out: str | Path | None = None,
    batch: int = 16,
    length: int = 128,
    held_length: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Trial:
    """Train the model in several ways and say whether converting it pays.

    All ways (arms) start from the state of `model_fn()` and see the same batches in the same order: the model as it is;
    the same with state passing, where the model can pass a state; level weights alone, of each kind; all weights. A
    seed determines the order of the batches and the start of new weights. The verdict is from paired 95 % intervals
    over seeds.

    Args:
        model_fn: gives the unconverted model, with its trained weights. With `workers` above 1, it is sent to other
            processes, so define it at the top of a module.
        batches: tokens, a tensor of whole numbers [N] or [N, T], whose last tenth is held out; or a function
            `batches(split, seed)`, with "train" or "held out" for the split, that yields batches: tokens [B, T], a pair
            (tokens, labels), or a mapping with `tokens`, `labels`, `distance` [B, T] (how far back each answer lies)
            and further keyword inputs of the model. `labels[b, t]` is the right token for the logits at t, -100 where
            none is asked for; by default it is the next token. Held-out sequences may be longer than those of training.
        loss: `loss(model, batch)`, a number to be minimised, in place of the cross-entropy of the logits. Gains are
            then not told by position.
        out: folder for finished runs and results. A second call with it goes on where an earlier one was stopped.
        batch: sequences in a batch, if `batches` are tokens.
        length: tokens of a training sequence, if `batches` are tokens.
        held_length: tokens of a held-out sequence (default: four times `length`), if `batches` are tokens.
        progress: whether to write a line about each finished run to standard error.
        settings: fields of `llcompile.trials.plan.Plan`: steps, seeds, rates, level_rate, weight_decay, warmup, clip,
            kinds, all_kinds, levels, inner, device, metric, part, worth, held_out, workers.

    Returns:
        The verdict and all numbers behind it. Where no mixer can be converted, the report's reasons, without training.

    Raises:
        TrialError: the settings, data or model do not serve, or `out` holds another trial.
        OutputError: `out` cannot be written.
    """
    plan = _plan(settings)
    cut = Cut(batch, length, held_length)
    with tempfile.TemporaryDirectory(prefix="llcompile-trial-") as scratch:
        store = Store(out if out is not None else scratch)
        return _Preparation(model_fn, source(batches, cut), loss, plan, store, progress).finish(out is not None)


def _plan(settings: dict[str, Any]) -> Plan:
    known = [field.name for field in fields(Plan)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TrialError(f"a trial has no setting {unknown[0]!r}; known: {', '.join(known)}")
    return Plan(**settings)


class _Preparation:
    """What is looked at before a trial trains anything."""

    def __init__(
        self, model_fn: ModelFn, source: Source, loss: OwnLoss | None, plan: Plan, store: Store, lines: bool
    ) -> None:
        self.model_fn, self.source, self.loss, self.plan, self.store = model_fn, source, loss, plan, store
        self.lines = lines
        self.example = before.first(source)
        self.held = held = data.held_out(source, plan.held_out)
        before.warn_of_splits(self.example, held[0])
        if loss is not None and len(held) < 2:
            raise TrialError(
                "with your own loss, 2 or more held-out batches are needed: half of them choose, half judge"
            )
        self.trained, self.longest = self.example.tokens.shape[1], held[0].tokens.shape[1]
        if loss is None:
            before.check_part(held, plan.part, self.trained)
        self.bounds = (0, self.longest) if loss is not None else edges(self.trained, self.longest)
        self.levels = plan.levels or level_count(max(self.trained, self.longest))
        say(lines, f"{plan.steps} steps on batches {list(self.example.tokens.shape)}, held out: {_held(held)}")

    def finish(self, kept: bool) -> Trial:
        """Look, train what is missing, and judge."""
        model = made(self.model_fn)
        state = {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
        before.check_runs(
            model.to(self.plan.place), self.example.to(self.plan.place), self.held[0].to(self.plan.place), self.loss
        )
        checkpoint = self.store.open(self._config(model, state), state)
        first = Arm(LEVELS, self.plan.kinds[0])
        say(self.lines, "converting the model")
        with room():
            report = build(first, self.model_fn, self.example, self.plan, self.levels, verify=True).report or Report()
        if not report.converted:
            return self._result((), {}, report, Verdict(NOTHING, _nothing(report)), {}, kept)
        every, left_out = self._arms(model, report)
        setup = Setup(
            self.model_fn, self.source, self.loss, self.plan, self.levels, self.bounds,
            self._bins()[self.plan.part], self.store.folder, checkpoint, self.lines,
        )  # fmt: skip
        jobs = [(arm, [s for s in self.plan.seeds if self.store.record(arm, s) is None]) for arm in every]
        jobs = [(arm, seeds) for arm, seeds in jobs if seeds]
        total = len(every) * len(self.plan.seeds)
        finished = total - sum(len(seeds) for _, seeds in jobs)
        say(self.lines, f"{total} runs: {len(every)} arms, {len(self.plan.seeds)} seeds; {finished} are finished")
        run_all(setup, jobs, Count(total, finished, self.store.finished(), time.time()))
        records = self._records(every)
        verdict = judge(every, records, self.plan, self._bins())
        return self._result(every, records, report, verdict, left_out, kept)

    def _config(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Any]:
        """What every run in a folder must agree on."""
        values = digest(state)
        if digest(made(self.model_fn).state_dict()) != values:
            values = "random"
            say(self.lines, "model_fn() gives other weights at each call: all runs start from those of the first one")
        return {
            "training batch": list(self.example.tokens.shape),
            "first training batch": before.known([self.example]),
            "held-out batches": before.known(self.held),
            **self.plan.of_runs(),
            "levels": self.levels,
            "bounds": list(self.bounds),
            "own loss": self.loss is not None,
            "model": type(model).__name__,
            "checkpoint": values,
        }

    def _arms(self, model: nn.Module, report: Report) -> tuple[tuple[Arm, ...], dict[str, str]]:
        left_out = {}
        plan = self.plan
        no_state = "its loss is your own" if self.loss is not None else _refused(model, self.example, plan)
        if no_state:
            left_out["stay, state passing"] = no_state
        kinds, all_kinds = plan.kinds, plan.all_kinds
        if all(mixer.level_weights == "static" for mixer in report.converted) and plan.kinds != ("static",):
            for kind in kinds:
                if kind != "static":
                    left_out[f"level weights ({kind})"] = "no mixer has an input that level weights could read"
            kinds = all_kinds = ("static",)
        return arms(plan, not no_state, kinds, all_kinds), left_out

    def _records(self, every: Sequence[Arm]) -> dict[str, dict[int, Record]]:
        found: dict[str, dict[int, Record]] = {}
        for arm in every:
            records = {seed: self.store.record(arm, seed) for seed in self.plan.seeds}
            found[arm.name] = {seed: record for seed, record in records.items() if record is not None}
        return found

    def _bins(self) -> dict[str, tuple[int, ...]]:
        if self.loss is not None:
            return {"inside": (0,), "beyond": (), "all": (0,)}
        return bins_of(self.bounds, self.trained)

    def _result(
        self,
        every: Sequence[Arm],
        records: dict[str, dict[int, Record]],
        report: Report,
        verdict: Verdict,
        left_out: dict[str, str],
        kept: bool,
    ) -> Trial:
        linear = loglinear = routed = None
        if report.converted:
            linear, loglinear, routed = costs(report, self.levels, self.longest, self.plan.place)
        return Trial(
            verdict, report, tuple(every), left_out, records, self.plan, self.bounds, self._bins(), self.trained,
            self.longest, linear, loglinear, routed, self.store.folder if kept else None,
        )  # fmt: skip


def _refused(model: nn.Module, example: Batch, plan: Plan) -> str:
    return refusal(model.train(), example.to(plan.place).tokens, example.inputs)


def _nothing(report: Report) -> str:
    reasons = dict.fromkeys(f"{record.module or 'the model'}: {record.reason}" for record in report.declined)
    return "no mixer of the model can be converted" + (f" ({'; '.join(reasons)})" if reasons else "")


def _held(held: Sequence[Batch]) -> str:
    return f"{sum(len(batch.tokens) for batch in held)} sequences of {held[0].tokens.shape[1]} tokens"
