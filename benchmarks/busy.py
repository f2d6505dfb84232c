"""What a benchmark does on a machine that others use; imports no torch, before whose import it must
run.
"""

import os


def wait_politely_if_busy() -> None:
    """On a machine that others use, let OpenMP's threads sleep while they wait for each other.

    By default they spin; where another process holds a core, every small operation then costs a
    time slice, and a step takes up to 20 times as long. Must run before torch is imported. What the
    user has set stays.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > (os.cpu_count() or 1):  # what has just ended still counts: an idle machine must not pay for it
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
