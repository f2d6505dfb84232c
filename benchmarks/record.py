"""Benchmark records: what ran, on what, row by row; and the partial file that a killed run goes on
from.

A record is `{"machine": {...}, "run": {...}, "rows": [...]}` in
`results/<machine>/<date>-<commit>.json`. While a run lasts, `FILE.partial` holds one JSON line for
its header and one for each finished case; a line that was cut off when the run was killed is
dropped, and its case measured again.
"""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Mismatch(Exception):
    """The partial file belongs to another run; the text says in what."""


class Partial:
    """The rows of a run under way.

    Args:
        out: The record's file; the partial one lies beside it.
        run: What is run: a partial file of anything else is refused.
        machine: On what; the header of a run that goes on is the one it began with.

    Raises:
        Mismatch: there is a partial file of another run, another commit or another device.
    """

    def __init__(self, out: Path, run: dict[str, Any], machine: dict[str, Any]) -> None:
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.header: dict[str, Any] = {"machine": machine, "run": run}
        self.done: dict[str, list[Row]] = {}
        if self.path.exists():
            self._go_on()

    @property
    def begun(self) -> bool:
        """Whether there is a header: a run that goes on keeps the one it began with."""
        return self.path.exists()

    def begin(self, **machine: Any) -> None:
        """Write the header.

        Args:
            **machine: Facts measured at the start.
        """
        self.header["machine"] |= machine
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._append(self.header)

    def _go_on(self) -> None:
        lines = []
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
            whole += len(line)
        os.truncate(self.path, whole)
        if not lines:
            self.path.unlink()
            return
        for part, names in (("run", None), ("machine", ("device", "cpu", "threads", "torch", "commit"))):
            before, now = lines[0][part], self.header[part]
            differing = [name for name in names or now if before.get(name) != now.get(name)]
            if differing:
                name = differing[0]
                raise Mismatch(
                    f"{self.path} was begun with {name} {before.get(name)!r}, this run has {now.get(name)!r}: "
                    f"finish that run, give another --out, or delete the file"
                )
        self.header = lines[0]
        self.done = {line["case"]: line["rows"] for line in lines[1:]}

    def add(self, case: str, rows: list[Row]) -> None:
        """Keep the rows of a finished case, on the disk."""
        self.done[case] = rows
        self._append({"case": case, "rows": rows})

    def _append(self, value: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, keep: bool = False, **machine: Any) -> dict[str, Any]:
        """Write the record, delete the partial file.

        Args:
            keep: The partial file stays: the run goes on later.
            **machine: Facts known only at the end.

        Returns:
            The record.
        """
        record = {**self.header, "rows": [row for rows in self.done.values() for row in rows]}
        record["machine"] |= machine
        self.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if not keep:
            self.path.unlink()
        return record


def load(path: Path) -> dict[str, Any]:
    """Return the record in a file, finished or partial; rows of older records get the columns they
    lack.

    Raises:
        ValueError: the file holds no benchmark record.
    """
    text = path.read_text(encoding="utf-8")
    if path.name.endswith(".partial"):
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        record: Any = {**lines[0], "rows": [row for line in lines[1:] for row in line["rows"]]}
    else:
        record = json.loads(text)
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise ValueError(f"{path} is no benchmark record: make one with python -m benchmarks.run --out FILE")
    defaults = {"kind": "layer", "status": "ok", "note": None, "dropout_p": 0.0, "shape": None, "precision": None}
    record["rows"] = [defaults | row for row in record["rows"]]
    return record
