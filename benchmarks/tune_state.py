"""What `python -m benchmarks.tune` has found so far, on the disk: it goes on where it stopped.

state = State(Path("tune.json"), machine, seconds=300)
if "row_norm 16" not in state.done and not state.late(): state.keep("row_norm 16", entry)
"""

import json
import time
from pathlib import Path
from typing import Any


class State:
    """Name of each thing tuned → what was found.

    Args:
        path: The file; None: nothing is kept.
        machine: On what: a file of another card, driver or commit is refused.
        seconds: After which nothing new is begun; None: never.

    Raises:
        ValueError: the file is of another machine or commit.
    """

    def __init__(
        self, path: Path | None = None, machine: dict[str, Any] | None = None, seconds: float | None = None
    ) -> None:
        self.path, self.machine = path, machine or {}
        self.until = None if seconds is None else time.monotonic() + seconds
        self.done: dict[str, Any] = {}
        self.stopped = False
        if path is not None and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            for name in ("device", "driver", "triton", "commit"):
                if before["machine"].get(name) != self.machine.get(name):
                    raise ValueError(
                        f"{path} was begun with {name} {before['machine'].get(name)!r}, this run has "
                        f"{self.machine.get(name)!r}: give another --state, or delete the file"
                    )
            self.done = before["done"]

    def late(self) -> bool:
        """Whether nothing new is to be begun."""
        if self.until is not None and time.monotonic() > self.until:
            self.stopped = True
        return self.stopped

    def keep(self, key: str, found: Any) -> None:
        """Remember what was found, on the disk."""
        self.done[key] = found
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": self.machine, "done": self.done}, indent=1)
            whole = self.path.with_suffix(".tmp")
            whole.write_text(text + "\n", encoding="utf-8")
            whole.replace(self.path)
