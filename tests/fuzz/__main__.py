"""`python -m tests.fuzz [COUNT]`: runs programs of a seed, and writes those that fail to /tmp.

`python -m tests.fuzz shrink NUMBER` makes a failing one of LLCOMPILE_FUZZ_SEED smaller.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.expected import expect
from tests.fuzz.program import drawn, program
from tests.fuzz.recipes import Recipe
from tests.fuzz.run import run
from tests.fuzz.shrink import shrunk


def main() -> None:
    """Says of each program how it ended."""
    seed = os.environ.get("LLCOMPILE_FUZZ_SEED", str(random.randrange(10**6)))
    count = Counter[str]()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if sys.argv[1:2] == ["shrink"]:
        _shrink(f"{seed}-{sys.argv[2]}", mutate=int(sys.argv[2]) % 2 == 1, path=folder / "smaller.py")
        return
    for number in range(*map(int, sys.argv[1:] or ["50"])):
        recipe, text = drawn(f"{seed}-{number}", mutate=number % 2 == 1)
        path = folder / f"fuzz_{seed}_{number}.py"
        path.write_text(text)
        try:
            report = run(path)
            ended = f"{expect(recipe, report)} {[d.reason for d in report.declined]}"
        except Exception as error:
            ended = f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:300]} ({path})"
        count[f"{'mutated' if recipe.mutation else 'mixer'} {ended.split()[0]}"] += 1
        print(f"{number:3d} {ended}  [{recipe}]", flush=True)
    print(f"LLCOMPILE_FUZZ_SEED={seed}: {dict(count)}")


def _shrink(seed: str, mutate: bool, path: Path) -> None:
    def fails(recipe: Recipe) -> bool:
        try:
            path.write_text(program(recipe))
            expect(recipe, run(path))
        except LookupError:
            return False
        except Exception as error:
            print(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}  [{recipe}]", flush=True)
            return True
        return False

    recipe = shrunk(drawn(seed, mutate)[0], fails)
    path.write_text(program(recipe))
    print(f"{recipe} ({path})")


if __name__ == "__main__":
    main()
