"""Entry point of `python -m benchmarks.finetune`."""

import sys

from benchmarks.busy import wait_politely_if_busy

if __name__ == "__main__":
    wait_politely_if_busy()

    from benchmarks.finetune.cli import main

    sys.exit(main())
