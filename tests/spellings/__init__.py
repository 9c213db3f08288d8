"""The corpus: mixers as people write them, and near misses that must be left alone.

A file for each kind of spelling; a layer says in its decorator what it is and which changes make it something else.
What mathematics would call a mixer of the family, but with operands that stand nowhere in the code (a gate that
becomes another one divided by it, say), is in a table of its own, EITHER.
"""

# ruff: noqa: F401  (each file fills the two tables)

from tests.spellings import (
    channels,
    chunked,
    cumulative,
    decayed,
    delta,
    early,
    either,
    erased,
    fast_weights,
    higher_order,
    idioms,
    loops,
    notebooks,
    others,
    quadratic,
    recurrences,
    selective,
    shifts,
    tails,
    twofold,
)

# Behind the others, so that `make test` takes of those what it took.
from tests.spellings.habits import layer
from tests.spellings.registry import EITHER, NEGATIVE, POSITIVE, Mixer, NearMiss, Spelling

__all__ = ["EITHER", "NEGATIVE", "POSITIVE", "Mixer", "NearMiss", "Spelling"]
