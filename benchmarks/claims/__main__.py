"""The command: `python -m benchmarks.claims NAME...`, `--core` or `--all`; without a name, what
there is and what is missing of it.

It goes on where it was stopped (Ctrl-C loses the run in flight), and ends with the verdicts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

RECORD = Path("runs/claims.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Study, judge, draw.

    Returns:
        0; 2: bad input, told in one line; 130: stopped.
    """
    args = _parser().parse_args(argv)
    from benchmarks.claims.claims import CLAIMS
    from benchmarks.claims.task import Problem

    unknown = [name for name in args.names if name not in CLAIMS]
    if unknown:
        print(f"claims: no claim {unknown[0]!r}: there are {', '.join(CLAIMS)}", file=sys.stderr)
        return 2
    try:
        _carry_out(args)
    except Problem as problem:
        print(f"claims: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("claims: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _carry_out(args: argparse.Namespace) -> None:
    """Do what the command line asks for; what the user can put right is a `Problem`."""
    from benchmarks.claims.claim import study
    from benchmarks.claims.claims import CLAIMS
    from benchmarks.claims.page import page_text, write
    from benchmarks.claims.record import Record
    from benchmarks.claims.rules import SMOKE, STUDY
    from benchmarks.machine import machine_info

    rules, record = SMOKE if args.smoke else STUDY, Record(args.record)
    claims = [CLAIMS[name] for name in args.names or CLAIMS if args.names or args.all or CLAIMS[name].core]
    if not (args.names or args.core or args.all or args.show or args.page):
        _list(record, rules)
        return
    claims = claims if args.names or args.core else list(CLAIMS.values())
    if args.page is not None:
        page_text(args.page)  # asked before anything is drawn
    elif not args.show:
        record.begin(machine_info("cpu"))
        study(claims, record, rules)
    for claim in claims:
        print(f"\n{claim.title} ({claim.source})")
        for line in claim.lines(record, rules):
            print(f"  {line.verdict:<40} {line.claimed}{': ' * bool(line.ours)}{line.ours}")
    if args.page is not None:
        write(args.page, claims, record, rules)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="claims; without any and without an option: a list of them")
    add("--core", action="store_true", help="those of the core")
    add("--all", action="store_true", help="all")
    add("--smoke", action="store_true", help="the same machinery in seconds, on drawn data: verdicts mean nothing")
    add("--record", type=Path, default=RECORD, metavar="FILE", help="what is found is added to it [%(default)s]")
    add("--show", action="store_true", help="run nothing: the verdicts by the record")
    add("--page", type=Path, metavar="FILE", help="run nothing: draw the figures, fill the page (docs/claims.md)")
    return parser


def _list(record: object, rules: object) -> None:
    from benchmarks.claims.claim import missing
    from benchmarks.claims.claims import CLAIMS

    for claim in CLAIMS.values():
        left = len(missing(claim, record, rules))  # type: ignore[arg-type]
        core = ", core" * claim.core
        print(f"{claim.name:<16} {claim.title}: {claim.minutes} minutes of one core{core}, {left} runs known missing")


if __name__ == "__main__":
    sys.exit(main())
