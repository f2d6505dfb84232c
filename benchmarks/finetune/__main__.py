"""Entry point of `python -m benchmarks.finetune`."""

import sys
import time

from benchmarks.busy import wait_politely_if_busy


def process_began() -> float:
    """Return the value that `time.monotonic()` had when this process began."""
    try:
        import psutil
    except ModuleNotFoundError:  # main says so
        return time.monotonic()
    return time.monotonic() - max(time.time() - psutil.Process().create_time(), 0.0)


if __name__ == "__main__":
    wait_politely_if_busy()

    from benchmarks.finetune.cli import main

    sys.exit(main(began=process_began()))
