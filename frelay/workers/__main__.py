"""``python -m frelay.workers``: what a supervisor starts, and nobody else."""

import sys

from frelay.workers.worker import main

sys.exit(main(*sys.argv[1:]))
