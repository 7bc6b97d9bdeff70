"""``python -m frelay.relay.workers``: what a supervisor starts, and nobody else."""

import sys

from frelay.relay.workers.worker import main

sys.exit(main(*sys.argv[1:]))
