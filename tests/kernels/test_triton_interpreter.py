"""Triton kernels against the definition, in Triton's interpreter: every family, odd shapes, poisoned operands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.description import Description
from tests.kernels import triton_cases
from tests.kernels.interpreting import interpreter

CELLS = list(itertools.product((None, "token", "channel"), (False, True)))
RATE = ("rate", False)  # kernels of its own, which take the interpreter as long for each token as others for a chunk
ERASE = ("channel", "erase")
Check = Callable[..., None]


def sampled(*names: str, **values: list[object]) -> pytest.MarkDecorator:
    """Every combination; of each two, one runs for `make test-all` only."""
    chosen = []
    for i, row in enumerate(itertools.product(*(values[name] for name in names))):
        marks = [pytest.mark.slow] if (i + i // 2) % 2 else []
        chosen.append(pytest.param(*row, marks=marks, id="-".join(map(str, row))))
    return pytest.mark.parametrize(names, chosen)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process where the interpreter is on from the start."""
    with interpreter(tmp_path_factory.mktemp("kernels")) as pool:
        yield pool


@pytest.fixture
def check(worker: ProcessPoolExecutor) -> Check:
    """Compare a case with the definition."""

    def run(
        final: bool = False,
        lengths: list[int] | None = None,
        poisoned: bool = False,
        hopper: bool = False,
        **case: object,
    ) -> None:
        case = {"dtype": torch.float32, "batch": 1, "groups": 1, "heads": 1, **case}
        found = worker.submit(triton_cases.errors, case, final, lengths, poisoned, hopper).result()
        assert {"o", "q", "k", "v"} <= found.keys()
        for name, (error, budget) in found.items():
            assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"

    return run


@pytest.mark.parametrize("sizes", [(5, 3), (72, 6)])
@pytest.mark.parametrize("levels", [None, 9])
def test_tiles_of_hopper(check, levels, sizes):
    """The wide tiles that Hopper gets for narrow sizes, and its loop over values of two turns for wide keys."""
    key_dim, value_dim = sizes
    check(length=70, decay="token", delta=True, levels=levels, key_dim=key_dim, value_dim=value_dim, hopper=True)


@sampled("cell", "levels", cell=CELLS, levels=[None, 9])
def test_definition(check, cell, levels):
    """Output and gradients of every family on several chunks, the last one partial, in poisoned buffers."""
    decay, delta = cell
    check(length=140 if decay == "channel" else 200, decay=decay, delta=delta, levels=levels, poisoned=True)


@pytest.mark.parametrize("delta", [False, True])
def test_groups_and_short_rows(check, delta):
    """Heads that share queries, several rows, two chunks, fewer levels than needed."""
    check(length=67, decay="token", delta=delta, levels=3, batch=2, groups=2, heads=4, poisoned=True)


def test_groups_with_decay_per_channel(check):
    """The same where gradients of queries and keys come out of another kernel."""
    check(length=50, decay="channel", delta=True, levels=7, groups=1, heads=2)


@sampled("cell", "dtype", cell=CELLS[:4], dtype=[torch.bfloat16, torch.float16])
def test_half_precision(check, cell, dtype):
    """Half precision loses what its roundings lose."""
    decay, delta = cell
    check(length=130, decay=decay, delta=delta, levels=9, dtype=dtype, key_dim=16, value_dim=17)


@sampled("delta", "dtype", delta=[False, True], dtype=[torch.bfloat16, torch.float16])
def test_half_precision_with_decay_per_channel(check, delta, dtype):
    """The same where scores go by blocks of tokens."""
    check(length=70, decay="channel", delta=delta, levels=8, dtype=dtype, key_dim=16, value_dim=17)


@sampled("cell", "state", "levels", cell=[CELLS[0], CELLS[3]], state=["linear", "level"], levels=[None, 9])
def test_states(check, cell, state, levels):
    """Initial and final states with their gradients; rows that continue at positions of their own."""
    decay, delta = cell
    check(length=90, decay=decay, delta=delta, levels=levels, state=state, batch=2, final=True, poisoned=True)


def test_states_with_decay_per_channel(check):
    """The same where a block's decay is one number per channel."""
    check(length=70, decay="channel", levels=5, state="level", final=True)


def test_matrices_in_slices(check):
    """Transitions wider than a slice of their products, through the tree, to the end of the row and back."""
    check(length=200, decay="token", delta=True, levels=9, state="level", final=True, key_dim=40, value_dim=3)


@pytest.mark.parametrize("levels", [None, 8])
def test_padded_rows(check, levels):
    """Rows that end early, one of them without any token."""
    check(length=80, delta=True, levels=levels, state="linear", batch=3, lengths=[70, 0, 80], final=True)


@pytest.fixture
def packed(worker: ProcessPoolExecutor) -> Check:
    """Compare sequences that are read where they lie with the definition."""

    def run(
        bounds: list[int] | None = None, mask: list[list[int]] | None = None, spoilt: int | None = None, **case: object
    ) -> None:
        case = {"dtype": torch.float32, "batch": 1, "groups": 1, "heads": 1, "levels": 9, **case}
        if bounds is not None:
            case["length"] = bounds[-1]
        found = worker.submit(triton_cases.packed_errors, case, bounds, mask, spoilt).result()
        assert {"o", "state", "q", "k", "v"} <= found.keys()
        for name, (error, budget) in found.items():
            assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"

    return run


# Two sequences that end in one chunk of all, an empty one, one of a whole number of chunks, one token at the end.
BOUNDS = [0, 40, 40, 170, 298, 299]


@sampled("cell", "levels", cell=[CELLS[2], CELLS[3]], levels=[None, 9])
def test_packed(packed, cell, levels):
    """Sequences of all lengths in one batch, one of them NaN throughout: none reads another."""
    decay, delta = cell
    packed(BOUNDS, spoilt=2, decay=decay, delta=delta, levels=levels, state="linear")


def test_packed_at_positions(packed):
    """Packed sequences that continue at positions of their own, with groups."""
    packed([0, 70, 75, 75, 90], decay="token", state="level", heads=2)


def left_padded(*lengths: int, width: int) -> list[list[int]]:
    return [[0] * (width - n) + [1] * n for n in lengths]


def test_padding_is_read_in_place(packed):
    """Left padding, and a row of nothing else."""
    packed(mask=left_padded(70, 0, 66, width=70), batch=3, length=70, delta=True, state="linear")


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 9, 3])
@pytest.mark.parametrize("state", [None, "linear", "level"])
@pytest.mark.parametrize(("decay", "delta"), [*CELLS, ERASE])
def test_grid_of_packed(packed, decay, delta, levels, state):
    """Every family, with states of every kind; long and short sequences in turn."""
    # What is not spoilt holds a long sequence: with one token alone decays have no gradient to be compared with.
    for bounds, spoilt in ((BOUNDS, 1), ([0, 1, 130, 130, 131], 3)):
        if state == "level":
            bounds = bounds[:5]  # states are made for at most four rows
        packed(bounds, decay=decay, delta=delta, levels=levels, state=state, heads=2, spoilt=spoilt)
    packed(mask=left_padded(5, 80, width=80), batch=2, length=80, decay=decay, delta=delta, levels=levels, state=state)


@pytest.mark.parametrize(("decay", "delta"), [("token", False), ("token", True), ("channel", False)])
def test_strong_decays(check, decay, delta):
    """Decays of 0 and sums beyond -1e5 beside mild ones: finite, and right."""
    check(length=120, decay=decay, delta=delta, levels=9, strong=True)


@sampled("levels", levels=[None, 9])
def test_erase_keys(check, levels):
    """An erase key of its own: several chunks, output and gradients."""
    check(length=70, decay="channel", delta="erase", levels=levels, poisoned=True)


@pytest.mark.parametrize(("decay", "levels"), [("head", 5), pytest.param(None, None, marks=pytest.mark.slow)])
def test_erase_keys_of_groups(check, decay, levels):
    """Decays that are made into those per channel, heads that share erase keys, states; without a factor."""
    sizes = {"groups": 1, "heads": 2, "state": "level", "factor": decay is not None}
    check(length=20, decay=decay, delta="erase", levels=levels, final=True, **sizes)


def test_packed_erase_keys(packed):
    """Sequences that do not begin where chunks do."""
    packed([0, 4, 4, 20], spoilt=0, decay="token", delta="erase", state="level")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_half_precision_with_erase_keys(check, decay, dtype):
    """Half precision loses what its roundings lose."""
    check(length=130, decay=decay, delta="erase", levels=9, dtype=dtype, key_dim=16, value_dim=17)


@pytest.mark.parametrize(("levels", "state"), [(None, "linear"), (9, "level")])
def test_rates(check, levels, state):
    """Decays by rates: states and their gradients, heads that share queries and weights, several programs of them."""
    sizes = {"batch": 2, "groups": 2, "heads": 8, "key_dim": 33, "shared": 4}
    check(length=6, decay="rate", levels=levels, state=state, final=True, poisoned=True, **sizes)


def test_rates_in_levels(check):
    """Merges of many levels, rows that end early, one of them at once."""
    check(length=34, decay="rate", levels=4, state="linear", final=True, batch=3, lengths=[34, 0, 9])


def test_rates_that_are_strong(check):
    """Decays of 0 beside mild ones, with the gradient of a rate that is a sum of log decays."""
    check(length=50, decay="rate", levels=None, heads=2, strong=True, final=True)


def test_packed_rates(packed):
    """Sequences where they lie, an empty one among them, at positions of their own."""
    packed([0, 6, 6, 13, 14], decay="rate", state="level", heads=2, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("levels", "state"), list(itertools.product((None, 1, 2, 3, 9), (None, "linear", "level"))))
def test_grid_of_rates(check, levels, state, dtype):
    """Levels, states, dtypes and sizes."""
    for heads, key_dim, value_dim, shared in ((4, 16, 1, 4), (2, 1, 33, 1), (6, 200, 2, 2)):
        sizes = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim, "shared": shared}
        check(length=21, decay="rate", levels=levels, state=state, final=True, dtype=dtype, **sizes)
        check(length=9, decay="rate", levels=levels, state=state, lengths=[9], dtype=dtype, strong=True, **sizes)


def test_decay_per_head(check):
    """A fixed decay per head: its gradient sums over rows and tokens."""
    check(length=70, decay="head", batch=2, heads=2)


def test_public_function(worker):
    """Through the torch operator, chosen by name, on packed sequences: the two implementations agree."""
    for name, error in worker.submit(triton_cases.through_the_operator).result().items():
        assert error < 1e-5, f"{name}: {error:.2e}"


@sampled("cell", cell=[*CELLS, ("head", False), RATE, ("token", "erase"), ERASE])
def test_decode(worker, cell):
    """Token by token, with and without levels, from states of either kind: as the other implementation."""
    decay, delta = cell
    for levels, state in ((7, "level"), (2, "level"), (1, "linear"), (5, "linear"), (None, "linear")):
        case = {"decay": decay, "delta": delta, "levels": levels, "state": state, "dtype": torch.float32, "heads": 2}
        case |= {"groups": 1, "batch": 2, "value_dim": 33}
        assert max(worker.submit(triton_cases.step_differences, case, 3).result()) < 1e-5


@sampled("cell", cell=[*CELLS, ("head", False), ("token", "erase"), ERASE])
def test_replay(worker, cell):
    """Tokens of a state and a ring, one by one: as the definition."""
    decay, delta = cell
    for levels, state in ((7, "level"), (2, "level"), (None, "linear")):
        case = {"decay": decay, "delta": delta, "levels": levels, "state": state, "dtype": torch.float32, "heads": 2}
        case |= {"groups": 1, "batch": 2, "value_dim": 17}
        errors = worker.submit(triton_cases.replay_errors, case, [1] * 5, 2, 64).result()
        assert max(errors) < 1e-5, errors


@sampled("cell", cell=[*CELLS, ("head", False), RATE, ("token", "erase"), ERASE])
def test_fold(worker, cell):
    """The state after some tokens, from positions that merge levels and from others: as the definition."""
    decay, delta = cell
    for levels, state, tokens in ((7, "level", 9), (2, "level", 3), (5, "level", 40), (None, "linear", 4)):
        case = {"decay": decay, "delta": delta, "levels": levels, "state": state, "dtype": torch.float32, "heads": 2}
        case |= {"groups": 1, "batch": 2, "value_dim": 17}
        errors = worker.submit(triton_cases.fold_errors, case, tokens).result()
        assert max(errors) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("cell", [("token", True), RATE])
def test_replay_over_chunks(worker, cell):
    """The kernels of sequences have drafts, rates, and the state after a chunk."""
    decay, delta = cell
    case = {"decay": decay, "delta": delta, "levels": 7, "state": "level", "dtype": torch.float32, "heads": 2}
    errors = worker.submit(triton_cases.replay_errors, {**case, "groups": 1, "batch": 2}, [1, 3, 1, 1], 2, 5).result()
    assert max(errors) < 1e-5, errors


def test_bytes_of_a_replayed_token(worker):
    """A token at 128k reads the levels that hold something, and writes its output alone: at most 25 MB for 32 heads.

    What every 64th token costs besides, for the state that is then written, is not counted here.
    """
    level = 128 * 128 * 4
    sizes = []
    for position, tokens in ((2**17, 0), (2**17 - 64, 62), (87360, 31), (2**16 + 64, 0)):
        loaded, stored = worker.submit(triton_cases.replay_bytes, position, tokens, 18).result()
        ring = (tokens + 1) * (2 * 128 * 2 + 2 * 2)  # key, value, decay and beta in bfloat16
        rest = loaded - position.bit_count() * level - ring
        assert 0 < rest < 1024  # the query, level weights, the position and which levels are occupied
        assert stored == 128 * 2
        sizes.append(32 * loaded)
    assert max(sizes) <= 25e6
    assert sizes[0] < 3e6


def test_same_bits(worker):
    """Two backward passes are bitwise the same."""
    case = {"length": 140, "delta": True, "dtype": torch.float32, "heads": 1, "groups": 1}
    assert worker.submit(triton_cases.same_bits, case).result()


def tuned(worker: ProcessPoolExecutor, final: bool, wanted: int, **case: object) -> None:
    """The definition's results come out while each kernel is run several times over, by parameters of all kinds."""
    case = {"dtype": torch.float32, "batch": 1, "groups": 1, "heads": 1, "value_dim": 33, **case}
    found, runs, kernels = worker.submit(triton_cases.tuned_errors, case, final, wanted).result()
    assert runs >= 2 * len(kernels)
    assert {"rate_scan", "rate_read_gradient"} <= set(kernels) or {"output", "chunk_values_gradient"} <= set(kernels)
    for name, (error, budget) in found.items():
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"


@pytest.mark.slow
def test_tuning_leaves_results_right(worker):
    """Kernels that add to their buffers are tuned on what they then find as it was."""
    tuned(worker, True, 1, length=70, decay="token", delta=True, levels=9, state="linear")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [1, 3, 5])
@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize(("decay", "delta"), [*CELLS, ERASE])
def test_grid_of_candidates(worker, decay, delta, levels, wanted):
    """Every kernel with other tiles, warps and stages: nothing but speed depends on them."""
    tuned(worker, True, wanted, length=70, decay=decay, delta=delta, levels=levels, state="level")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_candidates_for_rates(worker, wanted):
    """The same with other numbers of heads in a program."""
    tuned(worker, True, wanted, length=7, decay="rate", levels=5, state="level", heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 9, 3])
@pytest.mark.parametrize("state", ["linear", "level"])
@pytest.mark.parametrize(("decay", "delta"), [*CELLS, ERASE])
def test_grid_of_states(check, decay, delta, levels, state):
    """States of every family."""
    check(length=150, decay=decay, delta=delta, levels=levels, state=state, batch=2, final=True, poisoned=True)
    check(length=140, decay=decay, delta=delta, levels=levels, state=state, batch=2, lengths=[131, 64], final=True)


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "delta"), [*CELLS, ERASE])
@pytest.mark.parametrize("levels", [None, 9])
def test_grid_of_strong_decays(check, decay, delta, levels):
    """Strong decays in every family that has them."""
    if decay is not None:
        check(length=300, decay=decay, delta=delta, levels=levels, strong=True)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 333, 520])
@pytest.mark.parametrize(("decay", "delta"), [*CELLS, ERASE])
@pytest.mark.parametrize("levels", [None, 11])
def test_grid_of_lengths(check, length, decay, delta, levels):
    """All lengths around chunks and blocks of them."""
    check(length=length, decay=decay, delta=delta, levels=levels, poisoned=True)


@pytest.mark.slow
@pytest.mark.parametrize(("key_dim", "value_dim"), list(itertools.product((1, 16, 33, 128), repeat=2)))
@pytest.mark.parametrize(("decay", "delta"), [*CELLS, ERASE])
def test_grid_of_sizes(check, key_dim, value_dim, decay, delta):
    """All head sizes, whatever their remainder."""
    check(length=130, decay=decay, delta=delta, levels=9, key_dim=key_dim, value_dim=value_dim, poisoned=True)


@pytest.mark.parametrize("sweep", ["forward", "backward", "step"])
@pytest.mark.parametrize(
    ("decay", "correction", "levels"),
    [
        ("none", "none", None),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("scalar", "delta", 9), ("channel", "erase", 9))),
        pytest.param("scalar", "none", 9, marks=pytest.mark.slow),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("channel", "delta", None), ("rate", "none", 9))),
    ],
)
def test_right_kernels_are_accepted(worker, decay, correction, levels, sweep):
    """The test before their first use (`acceptance`) passes for the kernels themselves, as the interpreter has them."""
    d = Description(decay, correction, 16, 16, dtype=torch.float32, levels=levels)
    assert worker.submit(triton_cases.accepted, d, sweep).result() is None
