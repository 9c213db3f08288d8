"""What a process has found, in a file of its own, written anew after each result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import record


class Store:
    """Results by their key, in FOLDER/NAME.json. A result that is there already is not made again.

    `plan` is what the results depend on: a file of another plan is begun anew.
    """

    def __init__(self, folder: Path, name: str, plan: dict[str, Any], device: str) -> None:
        self.path = folder / f"{name}.json"
        self.content: dict[str, Any] = {"plan": plan, "environment": record.environment(device), "results": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            # As JSON has it: a tuple of the plan comes back as a list.
            if found.get("plan") == json.loads(json.dumps(plan)):
                self.content = found

    def __contains__(self, key: str) -> bool:
        return key in self.content["results"]

    def __getitem__(self, key: str) -> Any:
        return self.content["results"][key]

    def put(self, key: str, result: Any) -> None:
        """Add a result and write the file."""
        self.content["results"][key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(new, self.path)  # a process that is ended while it writes leaves the file of before


def read(folder: Path) -> list[dict[str, Any]]:
    """All files of an experiment's folder, in the order of their names, each with that as its `share`."""
    return [{**json.loads(path.read_text()), "share": path.stem} for path in sorted(folder.glob("*.json"))]
