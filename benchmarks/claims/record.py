"""The record of a study: one line of JSON for each finished run, keyed by its settings.

A line `{"machine": ...}` precedes the runs of each start. A run is written when it is done, so a
study that is stopped goes on where it was; a line that was cut off is not read, and dropped before
another is written. Reading changes nothing. Claims share runs.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims.task import Problem
from benchmarks.claims.training import Run


class Record:
    """What has been found so far.

    Args:
        path: the file; it need not be there. None: nothing is kept.

    Raises:
        Problem: the file can't be read, or a line of it is no line of a record.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.machines = path, []  # type: tuple[Path | None, list[dict[str, Any]]]
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None:
            for number, line in enumerate(_whole_lines(path), 1):
                try:
                    self._take(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    problem = f"--record {path}: line {number} is no line of a record: remove it"
                    raise Problem(problem) from None

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_unfinished(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Problem(f"--record {self.path} can't be written: {error.strerror}") from None


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines that end, of a file that is not there none."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Problem(f"--record {path} can't be read: {error.strerror}") from None


def _drop_unfinished(path: Path) -> None:
    """Remove what stands behind the last line that ends."""
    if not path.exists():
        return
    held = path.read_bytes()
    if not held.endswith(b"\n"):
        os.truncate(path, held.rfind(b"\n") + 1)
