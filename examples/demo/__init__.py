"""`llcompile demo`: convert transformers models, train one, and show what the conversion changes.

All results are measured in the run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from llcompile.arguments import at_least

NEXT = (
    "Next, try your own model. Run `llcompile inspect your_module:factory` to see what would be converted. Then call "
    'llcompile.convert(model, *inputs) and model.compile(backend="loglinear"), and train the model as usual.'
)


def add_parser(subparsers: Any) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="convert and train small transformers models and compare the results",
        description="Convert two transformers models. Then train a small Mamba-2 on associative recall, convert it, "
        "and continue training in three ways. Takes 3 to 6 minutes on two CPU cores; each further seed about 2 more.",
    )
    parser.add_argument(
        "--seeds",
        type=at_least(1),
        default=1,
        metavar="N",
        help="repeat the training with N seeds and print mean and spread",
    )
    parser.add_argument("--seed", type=at_least(0, 2**32 - 1), default=0, help="the first seed (default 0)")
    parser.add_argument(
        "--distances",
        choices=("key", "any"),
        default="key",
        help="key: the distance to a value depends on its key; any: it does not (default: key)",
    )
    parser.add_argument("--steps", type=at_least(1), help="training steps before conversion")
    parser.add_argument("--more", type=at_least(1), help="training steps after conversion")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        help="folder for the plot and the numbers (default demo-output)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when it came to its end, whatever the numbers."""
    from rich.console import Console

    began = time.perf_counter()
    console = Console(highlight=False)
    with console.status("loading torch and llcompile"):
        from demo import acts
    acts.tour(console)
    acts.recall(console, args)
    seconds = time.perf_counter() - began
    console.print(f"\n[bold]{NEXT}[/bold]", soft_wrap=True)
    console.print(f"(The demo took {seconds // 60:.0f} min {seconds % 60:.0f} s.)")
    return 0
