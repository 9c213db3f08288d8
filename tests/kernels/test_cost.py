"""What kernels cost: counts by hand, formulas against counts, what cannot be counted, and the budgets."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from llcompile.commands import cli
from llcompile.errors import KernelError, SpecError
from llcompile.kernels.triton.cost import worker
from llcompile.kernels.triton.cost.around import around
from llcompile.kernels.triton.cost.budgets import BUDGETS, MEASURES, measured
from llcompile.kernels.triton.cost.case import Case
from llcompile.kernels.triton.cost.compilations import compilations
from llcompile.kernels.triton.cost.count import cost, costs
from llcompile.kernels.triton.cost.families import FAMILIES, STEPS
from llcompile.kernels.triton.cost.scale import BLOCK_FEATURES, BLOCK_SAMPLES, FEATURES, SAMPLES, Shape, formula

SMALL = Case("scalar/none", "forward", 64, 64, heads=2, groups=1, length=640, levels=11)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files stay in the test's folder."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))


def totals(launches):
    """Numbers by kernel."""
    found: dict[str, Counter[str]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, Counter()).update(launch.numbers)
    return found


def test_by_hand():
    """Linear attention of one head: a whole chunk, and one of 40 tokens, whose mask lets 40 rows through."""
    one = Case("none/none", "forward", 64, 32, heads=1, groups=1, length=64)
    whole, part = map(totals, worker.counts([one, dataclasses.replace(one, length=40)]))
    state = 64 * 32 * 4
    for found, tokens in ((whole, 64), (part, 40)):
        numbers = found["chunk_state"]
        assert numbers["loaded"] == numbers["read"] == tokens * (64 + 32) * 2
        assert numbers["stored"] == numbers["written"] == state
        numbers = found["output"]
        assert numbers["loaded"] == tokens * (64 + 64 + 32) * 2 + state
        assert numbers["stored"] == tokens * 32 * 2
    # Masked rows are multiplied all the same. A tile of values is 64 wide here, as rows of 128 bytes are on Hopper.
    assert whole["chunk_state"]["dot bf16"] == part["chunk_state"]["dot bf16"] == 2 * 64 * 64 * 64
    assert whole["output"]["dot bf16"] == 2 * 64 * 64 * (64 + 64 + 64)


def test_distinct_bytes_are_fewer():
    """A state that several chunks read is loaded for each and read once for the head; heads are added up."""
    (found,) = worker.counts([dataclasses.replace(SMALL, length=256)])
    output = totals(found)["output"]
    state = 64 * 64 * 4
    reads, blocks = 4, 3  # of chunks 0 to 3: none, one, one and two blocks; chunk 3 reads one that chunk 2 has read
    assert output["loaded"] - output["read"] >= 2 * (reads - blocks) * state
    assert output["written"] == 2 * 256 * 64 * 2


@pytest.mark.parametrize(
    ("family", "operation"),
    [pytest.param(f, p, marks=pytest.mark.slow) for f, p in itertools.product(FAMILIES, ("forward", "backward"))],
)
def test_formulas(family, operation):
    """What follows for 10 chunks (16 tokens with rates) from fewer is what is counted there, to the byte."""
    case = dataclasses.replace(SMALL, family=family, operation=operation, key_dim=32, value_dim=32)
    if family == "rate/none":
        case = dataclasses.replace(case, length=16, key_dim=16, value_dim=1)
    assert case.length // case.unit > max(SAMPLES)
    found = {row.kernel: row.numbers for row in cost(case).rows}
    (counted,) = worker.counts([case])
    assert found == {kernel: dict(numbers) for kernel, numbers in totals(counted).items()}


def test_tiles_of_a_block_share_its_rows():
    """Four value tiles read keys once from memory, as they run side by side; states and values are a tile's own."""
    case = dataclasses.replace(SMALL, key_dim=16, value_dim=256, heads=1, length=2048, in_blocks=True)
    (launches,) = worker.counts([case])
    numbers = totals(launches)["block_state"]
    decays = 2048 * 4
    assert numbers["read"] == 2048 * (16 + 256) * 2 + decays
    assert numbers["loaded"] >= 2048 * (4 * 16 + 256) * 2 + 4 * decays
    assert numbers["written"] == 2 * (16 * 256 + 1) * 4


def test_tiles_share_rows():
    """The output's two value tiles run side by side, too: queries and keys come from memory once."""
    (launches,) = worker.counts([Case("none/none", "forward", 16, 128, heads=1, groups=1, length=128)])
    numbers = totals(launches)["output"]
    states = 2 * 16 * 128 * 4
    assert numbers["read"] == 128 * (16 + 16 + 128) * 2 + states
    assert numbers["loaded"] == numbers["read"] + 128 * (16 + 16) * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        ("scalar/none", {"block_state", "tree_up", "block_output"}),
        ("scalar/delta", {"chunk_mix", "delta_block_state", "tree_up", "far_state", "delta_block_output"}),
    ],
)
def test_formulas_in_blocks(family, kernels):
    """Long calls go in blocks of chunks; what follows for 11 blocks from fewer is what is counted there."""
    case = dataclasses.replace(
        SMALL, family=family, key_dim=16, value_dim=16, heads=1, length=11 * 1024, in_blocks=True
    )
    found = {row.kernel: row.numbers for row in cost(case).rows}
    (launches,) = worker.counts([case])
    assert found.keys() == kernels
    assert {kernel: dict(numbers) for kernel, numbers in totals(launches).items()} == found
    long = dataclasses.replace(SMALL, heads=32, length=65_536)
    assert long.goes_in_blocks
    assert not dataclasses.replace(long, operation="backward").goes_in_blocks
    assert not SMALL.goes_in_blocks


def test_heads_and_batches_multiply():
    """Numbers of a batch of 3 with 8 heads are 12 times those of 2 heads that share a query."""
    short = dataclasses.replace(SMALL, length=192)
    small, large = costs([short, dataclasses.replace(short, batch=3, heads=8, groups=4)])
    assert large.total == {name: 12 * n for name, n in small.total.items()}
    assert large.around.workspace == 12 * small.around.workspace


@pytest.mark.parametrize(("features", "chunks"), [(FEATURES, SAMPLES), (BLOCK_FEATURES, BLOCK_SAMPLES)])
def test_samples_tell_features_apart(features, chunks):
    """Else two formulas may give all samples, and different numbers at other lengths."""
    table = [[of(Shape(0, n)) for name, of in features.items() if name != "programs"] for n in chunks]
    assert torch.linalg.matrix_rank(torch.tensor(table, dtype=torch.float64)) == len(features) - 1


def test_no_formula_is_an_error():
    """Numbers that grow otherwise than with a launch's features are refused, not fitted."""
    shapes = [Shape(n, n) for n in SAMPLES]
    assert formula("kernel, loaded", [(s, 7 * s.chunks + 5) for s in shapes]).at(Shape(100, 100)) == 705
    reads = formula("kernel, loaded", [(s, 3 * sum(i.bit_count() for i in range(s.chunks))) for s in shapes])
    assert reads.at(Shape(1024, 1024)) == 3 * 5 * 1024
    for wrong in (lambda n: n**3, lambda n: 7 * n + (n == 4)):
        with pytest.raises(KernelError, match="kernel, loaded: counts at 2, 3, 4, 5, 6 chunks follow no formula"):
            formula("kernel, loaded", [(s, wrong(s.chunks)) for s in shapes])


def test_torch_around():
    """Bytes that torch's operators move, expanded axes once; memory at its peak, results apart."""
    x = torch.empty(10, 1, device="meta").expand(10, 100)

    def run():
        copy = x + 1  # reads 10 numbers, writes 1,000
        kept = copy.t().sum(0)  # a view; reads 1,000, writes 10
        del copy
        return kept

    found = around(run)
    assert (found.calls, found.moved) == (2, 4 * (10 + 1000 + 1000 + 10))
    assert (found.peak, found.results, found.workspace) == (4 * 1010, 40, 4000)


def test_what_is_filled_reads_nothing():
    """Of a tensor that gives its shape or dtype alone."""
    x = torch.empty(10, 100, device="meta")
    found = around(lambda: (x.new_zeros(7), x.new_full((5,), 1), torch.zeros_like(x)))
    assert (found.calls, found.moved) == (3, 4 * (7 + 5 + 1000))


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_memory_is_what_buffers_say(operation):
    """The workspace has at least the states of all blocks, and no launch runs."""
    found = around(dataclasses.replace(SMALL, operation=operation).runner("meta"))
    states = 2 * 10 * 64 * 64 * 4
    assert found.workspace >= states * (1 if operation == "forward" else 2)
    assert {launch.kernel for launch in found.launches} >= {"chunk_state", "tree_up"}


def test_compilations():
    """Every kernel once, whatever the lengths."""
    found = compilations(SMALL)
    assert found.keys() == {"chunk_state", "tree_up", "output"}
    assert all(n == 1 for n in found.values())


def test_bad_lengths_and_heads():
    """What cannot be counted is said before anything runs."""
    with pytest.raises(SpecError, match="length 100: counted are whole chunks of 64"):
        cost(dataclasses.replace(SMALL, length=100))
    with pytest.raises(SpecError, match="3 heads in 2 groups"):
        cost(dataclasses.replace(SMALL, heads=3, groups=2))


def test_command(capsys, tmp_path, monkeypatch):
    """The table on the terminal has the numbers of the file."""
    file = tmp_path / "cost.json"
    flags = "--family none/none --pass forward --key-dim 64 --value-dim 64 --heads 1 --length 128 --compilations"
    assert cli.main(["kernels", "cost", *flags.split(), "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["passes"]
    text = capsys.readouterr().out
    assert f"| all kernels | {record['launches']} |" in text
    assert f"{record['moved'] / 2 / 1e3:.2f}" in text
    assert set(record["compilations"]) == {row["kernel"] for row in record["kernels"]} | {"tree_up"}
    assert cli.main(["kernels", "cost", *flags.split(), "--json", str(tmp_path / "missing" / "x.json")]) != 0
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["kernels", "cost", *flags.split()]) != 0
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def _quick(budget):
    return budget.case.operation in STEPS or not budget.measure.startswith("moved")


@pytest.mark.parametrize(
    "budgets",
    [
        pytest.param([b for b in BUDGETS if _quick(b) and b.case.family == "scalar/none"], id="scalar/none"),
        pytest.param(list(BUDGETS), id="all", marks=pytest.mark.slow),
    ],
)
def test_budgets(budgets):
    """Nothing costs more than it did; a goal that is not met is not a failure."""
    assert budgets
    over = [(b.measure, b.case, now) for b, now in zip(budgets, measured(budgets), strict=True) if now > b.ceiling]
    assert not over


def test_budgets_can_fail():
    """Each measure of a pass is a positive number, so that a ceiling of 0 would be exceeded."""
    found = cost(dataclasses.replace(SMALL, operation="backward", length=64))
    assert {name: value(found) > 0 for name, value in MEASURES.items()} == dict.fromkeys(MEASURES, True)
