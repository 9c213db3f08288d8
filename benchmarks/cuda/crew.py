"""The measuring process as the command sees it: asked with a time limit, and replaced when it hangs or dies."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any

from benchmarks import process

Answer = dict[str, Any]


class Helper:
    """A process of `worker`, started with the first question. Errors come back as ``{"error": ...}``."""

    def __init__(self, device: str, environment: dict[str, str] | None = None, command: Sequence[str] = ()) -> None:
        self.command = list(command) or [sys.executable, "-m", "benchmarks.cuda.worker", device]
        self.environment = {**process.environment(), **(environment or {})}
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: Answer, seconds: float) -> Answer:
        """The answer to ``request``, or an error after ``seconds``."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"error": f"given up after {seconds:.0f} s"}
        except BrokenPipeError:
            line = None
        if line is None:
            words = self._last_words()
            self.stop()
            return {"error": f"the process ended: {words}"}
        answer: Answer = json.loads(line)
        if answer.pop("last", False):
            self.stop()
        return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.errors.close()
        self.process = None

    def _start(self) -> None:
        self.stop()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=self.environment,
        )
        assert self.process.stdout is not None
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True).start()

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _read(source: IO[str], lines: queue.Queue[str | None]) -> None:
    """Pass on lines, then None at the end."""
    for line in source:
        lines.put(line)
    lines.put(None)
