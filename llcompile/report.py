"""The report: what was converted, what was declined and why, what was left untouched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llcompile.folding import folded, grouped
from llcompile.patterns.records import Certificate, Converted, Declined, GraphBreak, ModelCertificate, Untouched

__all__ = ["Certificate", "Converted", "Declined", "GraphBreak", "ModelCertificate", "Report", "Untouched"]


# Where level weights are said to be large: a share of the model's parameters, in a model where that is many.
_LARGE_SHARE, _MANY = 0.05, 10_000_000


@dataclass(frozen=True)
class Report:
    """The result of converting or inspecting a model. `print(report)` shows it as tables.

    Args:
        converted: mixers that were rewritten, each with its certificate.
        declined: linear-time mixers and near misses that were not rewritten, each with a reason and the user's line.
        untouched: other mechanisms, by their usual name.
        graphs: number of graphs that Dynamo made of the model (1 without graph breaks).
        breaks: the graph breaks, each with its line.
        certificate: of the whole model, from a run on the example inputs in `convert`; None if there was no such run.
        remarks: limits of the example inputs.
        own_parameters: number of parameters of the model without level weights; 0 where it is not known.
        unverified: why `convert` made no certificate; "" if it made one, or had nothing to verify.
    """

    converted: tuple[Converted, ...] = ()
    declined: tuple[Declined, ...] = ()
    untouched: tuple[Untouched, ...] = ()
    graphs: int = 0
    title: str = field(default="", compare=False)
    breaks: tuple[GraphBreak, ...] = ()
    certificate: ModelCertificate | None = None
    unverified: str = ""
    remarks: tuple[str, ...] = ()
    own_parameters: int = 0

    @property
    def verified(self) -> bool:
        """Whether the converted model was run and agreed with the model's own output."""
        return self.certificate is not None

    @property
    def parameters(self) -> int:
        """How many level-weight parameters the model has."""
        return sum(c.parameters for c in self.converted)

    @property
    def share(self) -> float | None:
        """Level-weight parameters per parameter of the model without them; None where their number is not known."""
        return self.parameters / self.own_parameters if self.own_parameters else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "title"}

    def merged(self, other: Report) -> Report:
        """Both reports in one; if both name a module, the later one wins."""
        return Report(
            _merge(self.converted, other.converted),
            _merge(self.declined, other.declined),
            _merge(self.untouched, other.untouched),
            self.graphs + other.graphs,
            self.title or other.title,
            _counted((*self.breaks, *other.breaks)),
            self.certificate or other.certificate,
            self.unverified or other.unverified,
            tuple(dict.fromkeys((*self.remarks, *other.remarks))),
            max(self.own_parameters, other.own_parameters),
        )

    def __str__(self) -> str:
        console = Console(width=140, force_terminal=False, color_system=None)
        with console.capture() as captured:
            for table in self._tables():
                console.print(table)
        return captured.get().rstrip()

    def __rich_console__(self, *_: Any) -> Iterable[Any]:
        yield from self._tables()

    def _tables(self) -> Iterable[Any]:
        total = len(self.converted) + len(self.declined)
        head = f"{self.title or 'model'}: {len(self.converted)} of {total} linear-time mixers are log-linear"
        yield f"{head}; {self.new_parameters}" if self.parameters else head
        if not total:
            yield "  No linear-time mixer was found."
        yield from (f"  {remark}" for remark in (*self.advice, *self.remarks))
        if self.converted:
            yield _converted_table(self.converted)
            noted = [(note, r.module) for r in self.converted for note in r.notes]
            yield from (f"  {_names(m for _, m in group)}: {group[0][0]}" for group in grouped(noted, lambda n: n[0]))
        if self.declined:
            yield _declined_table(self.declined)
        if self.untouched:
            for alike in grouped(self.untouched, lambda r: r.kind):
                yield f"left untouched, {alike[0].kind}: {_names(r.module for r in alike)}"
        if self.certificate is not None:
            yield _verified(self.certificate)
        elif self.unverified:
            yield f"not verified: {self.unverified}"
        yield from (f"the graph breaks at {b.where}{_times(b.count)}: {b.reason}" for b in self.breaks)

    @property
    def new_parameters(self) -> str:
        """How many parameters the level weights have, in words, and what share of the model's that is."""
        new = f"their level weights have {self.parameters:,} parameters"
        if self.share is None:
            return new
        return f"{new}, {_percent(self.share)} of the model's {self.own_parameters:,}"

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change: a word about level weights that are a large part of a large model."""
        if self.share is None or self.share <= _LARGE_SHARE or self.parameters <= _MANY:
            return ()
        kinds = {record.level_weights for record in self.converted} - {"mlp", "static"}
        less = "options level_weights ('mlp' or 'static') and levels make" if kinds else "option levels makes"
        return (f"large level weights: {_percent(self.share)} more parameters; the {less} them smaller",)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:,.0f} %"


def _verified(c: ModelCertificate) -> str:
    gradients = "" if c.gradient_error is None else f", gradients to {c.gradient_error:.1e}"
    act = f"; {len(c.acts)} {'mixer acts' if len(c.acts) == 1 else 'mixers act'}" if c.acts else ""
    return (
        f"verified on the example inputs: outputs agree to {c.error:.1e}{gradients} ({c.dtype}){act}; {c.seconds:.1f} s"
    )


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _names(modules: Iterable[str]) -> str:
    return ", ".join(folded(modules))


def _converted_table(records: tuple[Converted, ...]) -> Table:
    table = Table(title="converted", title_justify="left", box=None, pad_edge=False)
    right = ("mixers", "proof error", "parameters")
    columns = ("module", "mixers", "family", "heads x K x V", "found as", "proof error", "level weights", "parameters")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for alike in grouped(records, _shown_alike):
        r = alike[0]
        sizes = f"{r.heads} x {r.key_dim} x {r.value_dim}"
        proof = f"{max(c.certificate.max_error for c in alike):.1e} {r.certificate.dtype}"
        shared = "" if r.weight_sets in (0, r.heads) else f", {r.heads // r.weight_sets} heads share each"
        parameters = f"{sum(c.parameters for c in alike):,}"
        modules = _names(c.module for c in alike)
        row = modules, str(len(alike)), r.family, sizes, r.origin, proof, r.level_weights + shared, parameters
        table.add_row(*row)
    return table


def _shown_alike(r: Converted) -> Any:
    """Equal for mixers that make one row: what is not summed, and of the proof not its error."""
    sizes = r.heads, r.key_dim, r.value_dim, r.weight_sets, r.parameters
    return r.family, *sizes, r.origin, r.certificate.dtype, r.level_weights


def _declined_table(records: tuple[Declined, ...]) -> Table:
    table = Table(title="declined", title_justify="left", box=None, pad_edge=False)
    for name in ("module", "reason", "where", "what to do"):
        table.add_column(name, overflow="fold")  # a line that is cut cannot be opened
    for alike in grouped(records, lambda r: (r.given, r.where)):
        r = alike[0]
        modules = _names(d.module for d in alike)
        table.add_row(modules, escape(f"{r.reason} [{r.code}]"), r.where, escape(r.hint))
    return table


def _merge(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
    """Both; a frame that was traced twice is in `second` again. Within one report nothing is merged: a line may run
    two mixers."""
    again = {_identity(record) for record in second}
    return (*(record for record in first if _identity(record) not in again), *second)


def _counted(breaks: Iterable[GraphBreak]) -> tuple[GraphBreak, ...]:
    """The same line for the same reason stands once."""
    return tuple(
        replace(alike[0], count=sum(b.count for b in alike)) for alike in grouped(breaks, lambda b: (b.reason, b.where))
    )


def _identity(record: Any) -> tuple[str, str]:
    return record.module, getattr(record, "where", "")
