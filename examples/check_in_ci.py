"""Gradient-check every op and method on this machine as a step of your CI: fails if one is beyond
its limit.

    python examples/check_in_ci.py                    # float32
    # any of `python -m delora_kernels check --help`; may be repeated
    python examples/check_in_ci.py --dtype bfloat16
    python examples/check_in_ci.py --out check.json   # keep the whole report

`python -m delora_kernels check` alone does as a CI step too: its exit status is 0, or 1 if a check
failed, or 2 if what was asked for can't run here. This script reads its --json.
examples/github-actions.yml is a workflow that runs it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run the check, print a summary, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", help="default: float32")
    parser.add_argument("--out", type=Path, help="file for the JSON report")
    options = parser.parse_args()

    dtypes = [part for dtype in options.dtype or ["float32"] for part in ("--dtype", dtype)]
    command = [sys.executable, "-m", "delora_kernels", "check", "--json", *dtypes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # it could not run: the reason is on standard error
        return done.returncode
    if options.out is not None:
        options.out.write_text(done.stdout, encoding="utf-8")

    report = json.loads(done.stdout)
    checked = [row for row in report["rows"] if row["status"] != "skipped"]
    for row in (row for row in checked if row["status"] == "FAIL"):
        print(f"FAIL {row['method']}, {row['what']}, {row['dtype']}: error {row['error']}, limit {row['limit']}")
    # a failed row may have no finite error: null in JSON
    worst = max(checked, key=lambda row: row["error"] / row["limit"] if row["error"] and row["limit"] else 0.0)
    share = worst["error"] / worst["limit"]
    print(f"{len(checked)} results on {report['device']} in {report['seconds']:.1f} s, seed {report['seed']}")
    print(f"nearest to its limit: {worst['method']}, {worst['what']}, {worst['dtype']}: {share:.0%} of it")
    print("ok" if report["ok"] else "FAILED")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
