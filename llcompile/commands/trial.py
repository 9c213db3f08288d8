"""`llcompile trial SPEC --data ...`: should this model be converted? Trained and measured, not guessed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llcompile.arguments import at_least, not_negative, positive
from llcompile.commands.spec import SPEC_HELP, add_set_argument, is_factory, load_model
from llcompile.errors import TrialError

if TYPE_CHECKING:
    from torch import nn

    from llcompile.trials.result import Trial
    from llcompile.trials.sources import Cut

DATA_HELP = """
--data is one of:
  a .pt, .npy or .safetensors file           tokens, whole numbers [N] or [N, T]; the last tenth is held out
  package.module:function                     function(split, seed) yields batches; split is "train" or "held out"
  any other file                              its bytes are the tokens (vocabulary 256)"""

_OF_FILES = ("batch", "length", "held_length")
_MOST_SEEDS, _MOST_WORKERS = 10_000, 1024
_LARGEST_SEED = 2**32 - 1 - _MOST_SEEDS  # numpy's generators take 32 bits


def add_parser(subparsers: Any) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "trial",
        help="train a model as it is and converted, and say whether converting it pays",
        description="Train a model from one checkpoint and on the same batches in several ways: as it is, with "
        "state passing, level weights alone of each kind, and all weights. Give a verdict with paired 95 % intervals.",
        epilog=SPEC_HELP + DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", metavar="SPEC", help="a config, a model_type, or module:factory; see below")
    parser.add_argument("--data", metavar="DATA", required=True, help="what to train on; see below")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of the model (.safetensors, .pt)")
    add_set_argument(parser)
    _add_amounts(parser)
    _add_training(parser)
    _add_outputs(parser)


def _add_amounts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=at_least(1), default=400, help="optimizer steps of each run (default 400)")
    parser.add_argument(
        "--seeds",
        type=at_least(2, _MOST_SEEDS),
        default=5,
        metavar="N",
        help="runs of each arm (default 5, at least 2)",
    )
    parser.add_argument("--first-seed", type=at_least(0, _LARGEST_SEED), default=0, help="the first seed (default 0)")
    parser.add_argument("--batch", type=at_least(2), help="sequences in a batch (default 16)")
    parser.add_argument("--length", type=at_least(2), help="tokens of a training sequence (default 128)")
    parser.add_argument(
        "--held-length", type=at_least(2), help="tokens of a held-out sequence (default: 4 times --length)"
    )
    parser.add_argument("--held-out", type=at_least(1), default=16, help="held-out batches (default 16)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rate",
        type=_rates,
        default=(1e-3,),
        help="learning rate of the model's weights; several, as 1e-4,1e-3, try each",
    )
    parser.add_argument(
        "--level-rate",
        type=positive,
        default=3e-2,
        help="learning rate of level weights for 32 features (default 3e-2)",
    )
    parser.add_argument("--kinds", type=_names, default=(), help="kinds of level weights, as linear,mlp (default: all)")
    parser.add_argument("--loss", metavar="MODULE:FUNCTION", help="loss(model, batch), in place of the cross-entropy")
    parser.add_argument("--metric", choices=("loss", "accuracy"), default="loss", help="what is judged (default: loss)")
    parser.add_argument(
        "--part", choices=("inside", "beyond", "all"), default="inside", help="positions that are judged, relative to "
        "the training length (default: inside)"
    )  # fmt: skip
    parser.add_argument(
        "--worth", type=not_negative, help="least gain worth a conversion (default: 0.01 nats, 0.005 of accuracy)"
    )
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager (default: inductor)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--workers",
        type=at_least(1, _MOST_WORKERS),
        default=1,
        help="processes that train arms side by side (default 1)",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("trial-output"),
        help="folder for finished runs and results; a second start goes on (default trial-output)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Make the trial and write what came of it; 0 whatever the verdict."""
    from llcompile.kernels import progress
    from llcompile.look import files
    from llcompile.trials import sources
    from llcompile.trials.trial import trial

    files.check_folder(args.out)
    if args.checkpoint is not None and not Path(args.checkpoint).is_file():
        what = "it is a folder, name the file in it" if Path(args.checkpoint).is_dir() else "no such file"
        raise TrialError(f"--checkpoint {args.checkpoint}: {what}; expected weights (.safetensors, .pt)")
    result = trial(
        Model(args.spec, tuple(args.set), args.checkpoint),
        sources.named(args.data, _cut(args)),
        loss=sources.function(args.loss, "--loss") if args.loss else None,
        out=args.out,
        steps=args.steps,
        seeds=tuple(range(args.first_seed, args.first_seed + args.seeds)),
        held_out=args.held_out,
        rates=args.rate,
        level_rate=args.level_rate,
        kinds=args.kinds,
        metric=args.metric,
        part=args.part,
        worth=args.worth,
        inner=args.inner,
        device=args.device,
        workers=args.workers,
    )
    print(result)
    for line in _written(result, args.out):
        progress.on_stderr(line)
    return 0


def _cut(args: argparse.Namespace) -> Cut:
    """How a file is cut into sequences; a function of the user's has cut them itself."""
    from llcompile.trials import sources

    given = {name: value for name in _OF_FILES if (value := getattr(args, name)) is not None}
    if given and sources.is_function(args.data):
        flag = "--" + next(iter(given)).replace("_", "-")
        raise TrialError(f"{flag} has no effect on {args.data}: change what the function yields")
    return sources.Cut(**given)


def _written(result: Trial, folder: Path) -> list[str]:
    from llcompile.trials.plot import available

    lines = [f"wrote {result.to_json(folder / 'trial.json')}", f"wrote {result.to_html(folder / 'trial.html')}"]
    if not result.arms:
        return lines
    if available():
        return [*lines, f"wrote {result.to_plot(folder / 'trial.png')}"]
    return [*lines, "no plot, which needs matplotlib: pip install 'llcompile[plot]'"]


@dataclass(frozen=True)
class Model:
    """The model that SPEC names, with its checkpoint; other processes build it again."""

    spec: str
    changes: tuple[str, ...]
    checkpoint: str | None

    def __call__(self) -> nn.Module:
        """A new model.

        Raises:
            SpecError: SPEC names nothing that can be found or built.
            TrialError: the checkpoint cannot be read, or belongs to another model.
        """
        model: nn.Module = load_model(self.spec, list(self.changes), "cpu")
        if self.checkpoint is not None:
            _restore(model, self.checkpoint)
        elif not is_factory(self.spec) and parent_process() is None:
            _say_random(self.spec)
        return model


@cache
def _say_random(spec: str) -> None:
    """Once: a config has no weights. A folder of `save_pretrained` has them beside it."""
    from llcompile.kernels import progress

    folder = Path(spec) if Path(spec).is_dir() else Path(spec).parent
    beside = sorted(folder.glob("*.safetensors")) if Path(spec).exists() else []
    file = beside[0] if len(beside) == 1 else "FILE"
    progress.on_stderr(
        f"{spec} gives a model with random weights, so that all arms train from scratch; for trained ones, add "
        f"--checkpoint {file}"
    )


def _restore(model: nn.Module, path: str) -> None:
    import torch

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_model

            load_model(model, path)
        else:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of the file, or of the names and shapes in it
        raise TrialError(f"--checkpoint {path} does not fit {type(model).__name__}: {error}") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not one or more positive numbers") from None
