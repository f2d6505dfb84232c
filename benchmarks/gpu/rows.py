"""A table that is on the disk after every row: what ends early leaves what it has.

table = Rows(folder, "figures", machine)
table.add({"kernel": "row_norm", "us": 9.1})     written to figures.json and printed
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Rows:
    """The rows of one command.

    Args:
        folder: Where its file goes.
        name: Of the file, without `.json`.
        machine: What the rows were measured on: the card, the driver, the commit.
        show: Whether each row is printed.
    """

    def __init__(self, folder: Path, name: str, machine: Mapping[str, Any], show: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.show = folder / f"{name}.json", show
        self.record: dict[str, Any] = {"machine": dict(machine), "rows": []}
        self._write()

    @classmethod
    def of(cls, path: Path) -> "Rows":
        """Return the table in a file, to change."""
        table = cls.__new__(cls)
        table.path, table.show, table.record = path, False, json.loads(path.read_text(encoding="utf-8"))
        return table

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those so far."""
        return list(self.record["rows"])

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        self.record["rows"].append(dict(row))
        self._write()
        if self.show:
            print("  ".join(f"{name} {_short(value)}" for name, value in row.items() if value is not None), flush=True)

    def change(self, rows: list[dict[str, Any]]) -> None:
        """Put these in place of the rows so far."""
        self.record["rows"] = rows
        self._write()

    def note(self, **facts: Any) -> None:
        """Keep facts beside the rows: seconds, what is left."""
        self.record["machine"] |= facts
        self._write()

    def _write(self) -> None:
        whole = self.path.with_suffix(".tmp")
        whole.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        whole.replace(self.path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
