"""The state that flows through the pipeline: one graph, what the front door wants, and the mixers found in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from llcompile.passes.candidate import Candidate
from llcompile.passes.marks import Mark, take
from llcompile.patterns.graph.regions import Region, regions
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Declined, Timing, Untouched
from llcompile.patterns.structure.program import Program
from llcompile.torch_internals import nested_gradients


@dataclass(frozen=True)
class Settings:
    """What the front door wants of the passes.

    Args:
        kind: kind of the level weights, "auto" for one by their size, or "none" for the linear operator.
        levels: number of levels that new level weights get.
        features: width of a routing query that new level weights of kind "routed" get.
        asked: what of these (kind, levels, features) was asked for in so many words, and no default.
        choose: the kind for (heads, levels, in_features) where `kind` is "auto", and a remark for the report or "".
        make: makes new level weights: (kind, heads, levels, in_features, like) -> module.
        shard: (level weights, mesh, its dimensions) -> None; splits them by heads over the processes of a mesh.
        find: the level weights that a module owns under a name already, or None.
        held: (name, level weights) for all that a module owns already.
        attach: registers level weights on a module under a name.
        path: the names that lead from what a module has under a name to the level weights, where a wrapper holds them.
        function: (level weights, for how many heads, dtype of their input, what their buckets are read with, where they
            read any) -> the pure function (input, *tensors) that they compute.
        withheld: why the mixer with a module's level weights of a name stays as it is, or None.
        names: id of a module -> its dotted name in the user's model, where the whole model is known; frames after a
            graph break only know a part of it.
        dry_run: find out everything and change nothing.
        compiles: the rewritten graph is what will run (and not the model's own code, as in convert and inspect).
    """

    kind: str
    levels: int
    features: int
    choose: Callable[[int, int, int], tuple[str, str]]
    make: Callable[..., nn.Module]
    shard: Callable[[nn.Module, Any, Sequence[int]], None]
    find: Callable[[nn.Module, str], Any]
    held: Callable[[nn.Module], list[tuple[str, Any]]]
    attach: Callable[[nn.Module, str, nn.Module], None]
    path: Callable[[nn.Module, str], tuple[str, ...]]
    function: Callable[..., Callable[..., Any]]
    withheld: Callable[[nn.Module, str], GivenReason | None] = lambda owner, name: None
    names: Mapping[int, str] = field(default_factory=dict)
    dry_run: bool = False
    compiles: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Session:
    """One graph, with the bodies of its higher-order calls, on its way through the pipeline."""

    module: fx.GraphModule
    settings: Settings
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[Declined] = field(default_factory=list)
    untouched: list[Untouched] = field(default_factory=list)
    # Parts that looked like mixers; those that have another name are left out of the report.
    near_misses: list[Declined] = field(default_factory=list)
    # The nodes of each near miss, for whoever wants to see them.
    missed_nodes: dict[Declined, frozenset[fx.Node]] = field(default_factory=dict)
    # Module -> the line of what runs over one token only, where nothing else was found.
    unseen: dict[str, str] = field(default_factory=dict)
    # Lines at which a search ended because it had taken too many steps.
    stopped: list[str] = field(default_factory=list)
    # What the report says of the level weights that this look made.
    remarks: list[str] = field(default_factory=list)
    # Each region's graph as it was recorded, for passes that come after the recogniser.
    programs: dict[Region, Program] = field(default_factory=dict)
    # How often each rule of the structural recogniser was used.
    structure_counts: Counter[str] = field(default_factory=Counter)
    # How long each pass and proof took.
    timings: list[Timing] = field(default_factory=list)
    # (owner, attribute) of the level weights that this look made.
    attached: list[tuple[nn.Module, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.regions = regions(self.module)
        self.wrappers = nested_gradients.unwrap(self.graph)
        self.marks: tuple[Mark, ...] = take(self.regions)
        # What Dynamo made: some of it has no value, the handle of a context manager for example.
        self.given = frozenset(node for region in self.regions for node in region.graph.nodes)

    def name(self, key: str, path: str) -> str:
        """The name for a module that the report uses: in the user's model, else below the compiled frame's root."""
        return module_name(self.settings.names, key, path)

    @property
    def graph(self) -> fx.Graph:
        """The graph under work."""
        return self.module.graph


def module_name(names: Mapping[int, str], key: str, path: str) -> str:
    """The name of the module with a key of `nn_module_stack` (its id, with "@n" for the nth call), else its path."""
    return names.get(int(key.split("@")[0]), path) if key else path
