"""Show benchmark records.

python -m benchmarks.report FILE...  # report.md and plots of each, into runs/report-<name>
python -m benchmarks.report FILE --base OTHER        # what changed between two
python -m benchmarks.report --readme  # write the figures of README and docs from records
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import load
from benchmarks.report import readme
from benchmarks.report.tables import compare, report


def main(argv: Sequence[str] | None = None) -> int:
    """Write and print what is asked for; 0: done, 2: bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records, or .partial files of a run")
    parser.add_argument("--base", type=Path, metavar="FILE", help="the record to compare with")
    parser.add_argument("--readme", action="store_true", help="write the pages' figures")
    parser.add_argument("--out", type=Path, help="folder [runs/report-<name of the file>]")
    args = parser.parse_args(argv)
    if not args.files and not args.readme:
        parser.error("name a record, or --readme")
    try:
        if args.readme:
            for page in readme.PAGES:
                page.write_text(readme.written(page.read_text(encoding="utf-8"), page), encoding="utf-8")
        for path in args.files:
            _show(path, args.base, args.out or Path("runs") / f"report-{path.stem}")
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


def _show(path: Path, base: Path | None, out: Path) -> None:
    record = load(path)
    text = report(record) if base is None else compare(load(base), record)
    figures = _figures(record) if base is None else {}
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        text += f"\n![{name}]({name}.png)\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"→ {out / 'report.md'}" + (f", {len(figures)} plots" if figures else ""))


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """Return the plots; none where matplotlib is not installed, as on a machine that only
    measures.
    """
    try:
        from benchmarks.report.plots import draw
    except ImportError as error:
        print(f"benchmarks.report: no plots ({error}); pip install matplotlib", file=sys.stderr)
        return {}
    return draw(record)


if __name__ == "__main__":
    sys.exit(main())
