"""Entry point of `python -m benchmarks.finetune`."""

import sys

from benchmarks.finetune.cli import main

sys.exit(main())
