"""The kernels of a call, an entry each: when one is needed, over what it runs, how it is launched.

The template of a kernel has its name; what it takes is said by the signature there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from llcompile.kernels.triton.description import Description


class Entry(NamedTuple):
    """One kernel.

    `over` is what has a program each: a chunk, a pair of blocks (level by level, up the tree or down it), a head of a
    sequence, a level of a head's initial state, a slot of a head's state (its header or a level), or a run of a
    sequence's heads that share query and weights (`scan`).
    In `BLOCKS`, "chunks" are blocks of chunks, and "walked chunks" the chunks of all blocks.
    With `tiles`, each value tile has a program of its own; other kernels loop over them. It finds in `changes` what
    others have left there and leaves something else: run again, it would not find that. `launch` is the widest value
    tile, the warps and the pipeline stages, chosen so that nothing spills on sm_90 at K, V <= 128; `tuning` has the
    exceptions, `measured` what was timed. With `fast_tiles`, programs of neighbouring value tiles run one after
    another; else all of one tile do.
    With `passing`, tiles of the K columns of a transition follow those of the values.
    """

    over: Literal["chunks", "walked chunks", "pairs, up", "pairs, down", "heads", "old levels", "slots", "units"]
    launch: tuple[int, int, int]
    when: Callable[[Description], bool] = lambda d: True
    tiles: bool = False
    fast_tiles: bool = False
    passing: bool = False
    changes: tuple[str, ...] = ()


def _of_a_ring(d: Description) -> bool:
    return d.initial_state == "none" and not (d.final_state or d.padded or d.packed)


# In the order in which they run: what every call computes first, then its output, or its gradients.
STATES = {
    "chunk_scores": Entry("chunks", (128, 4, 1), lambda d: d.decay == "channel" and d.correction != "erase"),
    "erase_scores": Entry("chunks", (128, 4, 1), lambda d: d.correction == "erase"),
    "chunk_inverse": Entry("chunks", (128, 4, 1), lambda d: d.dense),
    "erase_chunk": Entry("chunks", (128, 8, 1), lambda d: d.correction == "erase"),
    "chunk_state": Entry("chunks", (128, 8, 1), tiles=True, fast_tiles=True),
    "tree_up": Entry(
        "pairs, up",
        (32, 4, 1),
        lambda d: d.weighted,
        tiles=True,
        fast_tiles=True,
        changes=("states", "totals", "transitions"),
    ),
    "state_scan": Entry("heads", (16, 4, 1), lambda d: not d.weighted, tiles=True, changes=("states",)),
}
OUTPUT = {
    "output": Entry("chunks", (64, 8, 1), tiles=True, fast_tiles=True),
    "final_state": Entry("heads", (64, 8, 1), lambda d: d.weighted and d.final_state, tiles=True),
}
GRADIENTS = {
    "read_gradient": Entry("chunks", (64, 8, 1), changes=("weight_gradients",)),
    "state_gradient": Entry("chunks", (64, 8, 1), tiles=True, fast_tiles=True),
    "transition_gradient": Entry("chunks", (128, 8, 1), lambda d: d.weighted and d.dense),
    "old_state_gradient": Entry(
        "old levels", (64, 8, 1), lambda d: d.weighted and d.initial_state != "none", tiles=True
    ),
    "final_state_gradient": Entry(
        "heads",
        (32, 8, 1),
        lambda d: d.weighted and d.final_state,
        changes=("old_gradients", "state_gradients", "total_gradients", "transition_gradients"),
    ),
    "tree_down": Entry("pairs, down", (64, 8, 1), lambda d: d.weighted, changes=("state_gradients", "total_gradients")),
    "transition_down": Entry(
        "pairs, down", (64, 8, 1), lambda d: d.weighted and d.dense, changes=("transition_gradients",)
    ),
    "scan_gradient": Entry("heads", (16, 4, 1), lambda d: not d.weighted, tiles=True, changes=("state_gradients",)),
    "chunk_values_gradient": Entry("chunks", (64, 8, 1), changes=("weight_gradients",)),
    "final_chunk_gradient": Entry(
        "heads", (64, 8, 1), lambda d: d.weighted and d.final_state, changes=("value_gradients", "writer_gradients")
    ),
    "chunk_transition_gradient": Entry("chunks", (64, 8, 1), lambda d: d.dense, changes=("writer_gradients",)),
    "erase_reader_gradient": Entry(
        "chunks", (128, 8, 1), lambda d: d.correction == "erase", changes=("head_gradients",)
    ),
    "erase_writer_gradient": Entry(
        "chunks", (128, 8, 1), lambda d: d.correction == "erase", changes=("seen_gradients", "tail_gradients")
    ),
    "erase_gradient": Entry("chunks", (128, 8, 1), lambda d: d.correction == "erase", changes=("query_gradients",)),
    "chunk_reader_gradient": Entry(
        "chunks", (128, 8, 1), lambda d: d.delta, changes=("head_gradients", "score_gradients")
    ),
    "chunk_writer_gradient": Entry("chunks", (128, 8, 1), lambda d: d.delta, changes=("writer_gradients",)),
    "chunk_delta_gradient": Entry("chunks", (128, 8, 1), lambda d: d.delta, changes=("key_squares", "score_gradients")),
    "chunk_gradient": Entry(
        "chunks", (128, 8, 1), lambda d: d.correction != "erase", changes=("decay_carries", "query_gradients")
    ),
    "chunk_scores_gradient": Entry(
        "chunks",
        (128, 8, 1),
        lambda d: d.decay == "channel" and d.correction != "erase",
        changes=("decay_gradients", "key_gradients", "query_gradients"),
    ),
}
DECODE = {
    "decode": Entry("heads", (32, 4, 1), tiles=True),
    "decode_in_place": Entry("heads", (32, 4, 1), tiles=True, changes=("states",)),
    # A launch of its own: `decode_in_place` reads the position in all of a head's value tiles.
    "count": Entry("heads", (32, 1, 1), lambda d: d.weighted, changes=("states",)),
    # The tokens that these two replay come without a final state, and one for each row.
    "replay": Entry("heads", (32, 4, 1), _of_a_ring, tiles=True, fast_tiles=True),
    "fold": Entry("slots", (32, 4, 1), _of_a_ring, tiles=True, fast_tiles=True),
}
# Instead of `STATES` and `OUTPUT`, where a program walks over a block of chunks (`blocks`): the tree is over blocks.
BLOCKS = {
    "chunk_mix": Entry("walked chunks", (128, 4, 1), lambda d: d.delta),
    "block_state": Entry("chunks", (64, 4, 1), lambda d: not d.delta, tiles=True, fast_tiles=True),
    "delta_block_state": Entry("chunks", (64, 4, 1), lambda d: d.delta, tiles=True, fast_tiles=True, passing=True),
    "tree_up": STATES["tree_up"],
    "far_state": Entry("chunks", (64, 8, 1), lambda d: d.delta, tiles=True, fast_tiles=True),
    "block_output": Entry("chunks", (64, 4, 1), lambda d: not d.delta, tiles=True, fast_tiles=True),
    "delta_block_output": Entry("chunks", (64, 8, 1), lambda d: d.delta, tiles=True, fast_tiles=True),
}
# Decays by rates, token by token: these kernels alone serve whole sequences and single tokens. The first of `launch` is
# the most numbers of a tile [lanes, K]; kernels that sum over lanes have tiles of `Description.lanes`.
SCAN = {
    "rate_scan": Entry("units", (128, 4, 1), tiles=True),
    "rate_read_gradient": Entry("units", (512, 8, 1)),
    "rate_write_gradient": Entry("units", (512, 4, 1)),
}
KERNELS = {**STATES, **OUTPUT, **GRADIENTS, **DECODE, **BLOCKS, **SCAN}


def kernel_names(d: Description) -> tuple[str, ...]:
    """The kernels that `d` needs, in the order in which they run."""
    if d.walk > 1:
        return tuple(name for name, entry in BLOCKS.items() if entry.when(d))
    alone = {*BLOCKS} - {*STATES}
    kernels = {name: entry for name, entry in KERNELS.items() if name not in alone}
    return tuple(name for name, entry in kernels.items() if (name in SCAN) == d.rated and entry.when(d))
