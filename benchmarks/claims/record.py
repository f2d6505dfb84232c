"""The record of a study: one line of JSON for each finished run, keyed by its settings.

A line `{"machine": ...}` precedes the runs of each start. A run is written when it is done, so a
study that is stopped goes on where it was; a line that was cut off is dropped. Claims share runs.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims.training import Run


class Record:
    """What has been found so far.

    Args:
        path: the file; it need not be there. None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.machines = path, []  # type: tuple[Path | None, list[dict[str, Any]]]
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in _whole_lines(path):
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "machine" in line:
            self.machines.append(line["machine"])
        else:
            self._found[json.dumps(line["run"], sort_keys=True)] = line["found"]

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, run: Run) -> bool:
        return run.key in self._found

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self._found[run.key]

    def begin(self, machine: dict[str, Any]) -> None:
        """Say what the runs that follow ran on."""
        self._append({"machine": machine})

    def add(self, run: Run, found: dict[str, Any]) -> None:
        """Keep a finished run, on the disk."""
        self._append({"run": asdict(run), "found": found})

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        self._take(json.loads(text))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines that end; one that was cut off is removed from the file before a run is
    added to it.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    return lines
