"""What a claim is, and how its runs are carried out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.claims.record import Record
from benchmarks.claims.rules import CANNOT_TELL, Rules
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run, carry_out


class Line(NamedTuple):
    """One row of the table: what is claimed, the paper's figure, ours, the verdict."""

    claimed: str
    paper: str
    ours: str
    verdict: str


class Claim(NamedTuple):
    """One file of this folder.

    Attributes:
        name: of the command, the figure and the anchor.
        title: a heading of docs/claims.md.
        source: the paper, and where in it.
        minutes: of one core, for what `runs` wants beyond claims before it in `CLAIMS`.
        runs: what it wants, of a record that may lack some or all of it: asked again after each
            run, so that later runs may depend on earlier ones; the first missing one is next.
        lines: the verdicts, whatever is missing ("can't tell: incomplete").
        draw: the figure, of what is there; None: nothing to draw yet.
        core: whether `--core` has it.
    """

    name: str
    title: str
    source: str
    minutes: int
    runs: Callable[[Record, Rules], list[Run]]
    lines: Callable[[Record, Rules], list[Line]]
    draw: Callable[[Record, Rules], Figure | None]
    core: bool = True


def missing(claim: Claim, record: Record, rules: Rules) -> list[Run]:
    """Return the runs of a claim that the record lacks, as far as they are known, each once."""
    return [run for run in dict.fromkeys(claim.runs(record, rules)) if run not in record]


def study(claims: Sequence[Claim], record: Record, rules: Rules) -> None:
    """Carry out what is missing, claim after claim, method after method, each run kept when it is
    done.
    """
    from tqdm import tqdm

    for claim in claims:
        with tqdm(desc=claim.name, unit="run", disable=None) as bar:
            while wanted := missing(claim, record, rules):
                bar.total = bar.n + len(wanted)  # as far as it is known
                run = wanted[0]
                bar.set_postfix_str(f"{run.row} q={run.q} seed {run.seed}")
                record.add(run, carry_out(run))
                bar.update()


def incomplete(sweeps: Sequence[Sweep]) -> str | None:
    """Return the verdict where some sweep lacks runs or has its best rate at an edge; None where
    all can be judged.
    """
    lacking = [sweep.label for sweep in sweeps if not sweep.complete]
    if lacking:
        return f"{CANNOT_TELL}: incomplete ({', '.join(lacking)})"
    edges = [sweep.label for sweep in sweeps if sweep.at_edge]
    return f"{CANNOT_TELL}: best rate at the edge ({', '.join(edges)})" if edges else None
