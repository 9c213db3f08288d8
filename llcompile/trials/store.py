"""Store: a folder with one JSON file for each finished run, so that a trial that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llcompile.errors import TrialError
from llcompile.look import files
from llcompile.trials.arms import Arm
from llcompile.trials.running import State
from llcompile.trials.training import Record

_CONFIG, _CHECKPOINT, _RUNS = "config.json", "checkpoint.pt", "runs"


class Store:
    """The folder of one trial.

    Raises:
        OutputError: it cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files.check_folder(self.folder)
        files.make_folder(self.folder / _RUNS)

    def open(self, config: Mapping[str, Any], state: State) -> State:
        """Claim the folder for a trial; the checkpoint that all its runs start from.

        An earlier start of the same trial has left it there: a model with random weights is drawn once.

        Raises:
            TrialError: the folder holds a trial with other settings, or with a model of other sizes.
        """
        known = self.folder / _CONFIG
        wanted = json.loads(json.dumps(config))
        if not known.exists():
            torch.save(dict(state), self.folder / _CHECKPOINT)
            files.write_text(known, json.dumps(wanted, indent=2) + "\n")
            return state
        with _reading(known, _OTHER):
            held = json.loads(known.read_text())
        _check_same(self.folder, held, wanted)
        with _reading(self.folder / _CHECKPOINT, _OTHER):
            checkpoint: dict[str, Any] = torch.load(self.folder / _CHECKPOINT, map_location="cpu", weights_only=True)
        shapes, given = ({name: tuple(x.shape) for name, x in held.items()} for held in (checkpoint, state))
        if shapes != given:
            name = sorted(shapes.items() ^ given.items())[0][0]
            raise TrialError(f"the model does not fit the checkpoint in {self.folder}: {name} differs; {_OTHER}")
        return checkpoint

    def record(self, arm: Arm, seed: int) -> Record | None:
        """The record of a finished run."""
        path = self._path(arm, seed)
        if not path.exists():
            return None
        with _reading(path, "remove it, and the run is made again"):
            return Record.of(json.loads(path.read_text()))

    def keep(self, arm: Arm, record: Record) -> None:
        """Write the record of a finished run."""
        files.write_text(self._path(arm, record.seed), json.dumps(record.to_dict()) + "\n")

    def finished(self) -> int:
        """How many runs are finished."""
        return len(list((self.folder / _RUNS).glob("*.json")))

    def _path(self, arm: Arm, seed: int) -> Path:
        # With the rate, which a name has only where there are several.
        name = re.sub("[^a-z0-9.]+", "-", f"{arm.what} {arm.kind} {'' if arm.rate is None else arm.rate}").strip("-")
        return self.folder / _RUNS / f"{name}-seed-{seed}.json"


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the file, of its text, or of a value in it
        raise TrialError(f"{path} of this trial cannot be read ({type(error).__name__}: {error}); {advice}") from error


_OTHER = "name another folder with --out (out=), or remove this one"


def _check_same(folder: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if changed:
        name = changed[0]
        raise TrialError(
            f"{folder} holds runs of another trial: {name} was {known.get(name)!r} and is {wanted.get(name)!r} now; "
            f"{_OTHER}"
        )


def digest(state: State) -> str:
    """A short name for the values of a checkpoint."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
