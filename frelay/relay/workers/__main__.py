"""``python -m frelay.relay.workers``: a worker process; only a supervisor starts it."""

import sys

from frelay.relay.workers.worker import main

sys.exit(main(*sys.argv[1:]))
