"""What context parallel sends, by the code that cuts sequences: the table of docs/scale.md.

python -m benchmarks.context_parallel --heads 32 --key-dim 128 --value-dim 128

Bytes are those of the messages of `llcompile.distributed`, for one call of the operator; tests/distributed compares
them with what real processes count. Times are these bytes at a given bandwidth and nothing else: a lower bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from llcompile.arguments import at_least, positive
from llcompile.distributed.cut import Cut

RANKS = (8, 64, 1024)
TOKENS = (1 << 20, 10_000_000, 100_000_000)
COLUMNS = (
    *("processes", "tokens", "states in a message", "message", "received, forward", "training step", "time"),
    "ring attention",
)
STATE = 4  # bytes of a number of a state


@dataclass(frozen=True)
class Mixer:
    """One mixer of one sequence: sizes, and whether its transitions are matrices (delta rule, erase key)."""

    heads: int
    key_dim: int
    value_dim: int
    corrected: bool
    levels: int = 28

    @property
    def transition(self) -> int:
        """Bytes of the transition over a shard; at most those of a decay per channel where it is no matrix."""
        return STATE * self.heads * self.key_dim * (self.key_dim if self.corrected else 1)

    @property
    def state(self) -> int:
        """Bytes of one bucket's state."""
        return STATE * self.heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes of one process."""

    ranks: int
    tokens: int
    states: int  # in a message
    message: int
    received: int  # in a forward pass
    step: int  # received in a training step: summaries in both passes, and the gradients of them
    ring: int  # received by ring attention in a forward pass: keys and values of all others, in two bytes each


def cut(tokens: int, ranks: int, levels: int) -> Cut:
    """Shards as even as whole tokens allow."""
    bounds = [tokens * rank // ranks for rank in range(ranks + 1)]
    return Cut(0, tuple(bounds[:-1]), tuple(bounds[1:]), False, levels)


def row(tokens: int, ranks: int, mixer: Mixer) -> Row:
    """What is sent for one call."""
    shards = cut(tokens, ranks, mixer.levels)
    states = max(len(shards.slots(rank)) for rank in range(ranks))
    message = mixer.transition + states * mixer.state
    received = (ranks - 1) * message
    others = tokens * (ranks - 1) // ranks
    ring = others * mixer.heads * (mixer.key_dim + mixer.value_dim) * 2
    return Row(ranks, tokens, states, message, received, 3 * received, ring)


def table(mixer: Mixer, bandwidth: float) -> Iterator[str]:
    """The lines of the table, as the page has them."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for ranks in RANKS:
        for tokens in TOKENS:
            x = row(tokens, ranks, mixer)
            yield (
                f"| {ranks:,} | {tokens:,} | {x.states} | {_mib(x.message)} | {_mib(x.received)} | {_mib(x.step)} | "
                f"{x.step / bandwidth / 1e6:.1f} ms | {_mib(x.ring)} |"
            )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=at_least(1), default=32)
    parser.add_argument("--key-dim", type=at_least(1), default=128)
    parser.add_argument("--value-dim", type=at_least(1), default=128)
    parser.add_argument("--decay-only", action="store_true", help="no delta rule and no erase key")
    parser.add_argument("--bandwidth", type=positive, default=50.0, help="GB/s that one process receives")
    args = parser.parse_args()
    mixer = Mixer(args.heads, args.key_dim, args.value_dim, not args.decay_only)
    print("\n".join(table(mixer, args.bandwidth)))


if __name__ == "__main__":
    main()
