"""Many cores: the routes of one relay spread over several worker processes, under a supervisor.

Theory of operation
===================

``workers = 1`` is one process, a :class:`~frelay.relay.relay.Relay`, and nothing in this package is loaded. With more,
the process that was started is a :class:`~frelay.relay.workers.supervisor.Supervisor`. To the outside it is that relay:
it has the file, the signals, the watcher, systemd, the admin API and ``/metrics``. But it serves no function itself::

    supervisor      binds every address, and keeps it bound
      worker 1      a Relay with its share of the routes, no file, no signals, no HTTP
      worker 2      ...

1.  **A listening address belongs to one worker**, and with it all routes that share it, with all their addresses. So
    both parties of a route meet in one process and nothing of the way of a connection has to know that there are
    others. A new address goes to the worker that has the fewest; one that is there already stays where it is, with the
    one exception that :mod:`~frelay.relay.workers.placement` tells. A hash would put two busy addresses on one of two
    workers half the time.

2.  **Sockets are bound by the supervisor** (or by systemd) and passed on, so they outlive any worker: while one is
    started again, whoever dials waits in the kernel's queue.

3.  **The channel** between the two is a Unix socket pair with JSON messages; descriptors travel beside them
    (:mod:`~frelay.net.channel`). The supervisor asks, and each question has its answer. In between a worker tells
    what happens, in the order in which it does, and an answer comes after all that was told before. If the supervisor
    does not keep up, a worker drops the oldest of what it has to tell; traffic never waits for it. The end of the
    channel is the end of the worker: however the supervisor goes, even by SIGKILL, no orphan stays.

4.  **A configuration is loaded once**, by the supervisor, the files of ``[tls]`` too, and their bytes are passed on. So
    all workers have the same certificates; and a worker that is started again gets what is in force, even if something
    else, or something broken, is on disk by then.

5.  **A reload is a commit in two phases.** Each worker does all that can fail (:meth:`~frelay.relay.relay.Relay.stage`)
    and says so. Only if all of them can, the file of an edit is written and they are told to put it in force, which
    cannot fail; otherwise all of them abandon it. A worker that does not answer the second question is killed, and
    started again with the new configuration. There is one change at a time, and the start of a worker counts as one.

6.  **A worker that dies is started again**, at once if it had lived for a while, otherwise after a pause that doubles.
    One that does not say anything for :data:`~frelay.relay.workers.supervisor.PATIENCE` ticks, though it is asked to
    each second, hangs, and is killed. Its pairings are gone; everybody else's do not notice.

7.  **The truth is in the workers,** so a look at the admin API asks them (:mod:`~frelay.relay.workers.control`). Totals
    must not fall when a worker dies: each one reports them every second, and its successor begins with the last that
    are known, those of any scrape included. While there is none, the supervisor answers with these.

What is counted against a limit of ``[limits]`` is counted by each worker for itself. That is right for descriptors,
whose limit is a process's, and for everything that belongs to a route; of strangers (``max_pre_auth`` and
``max_pre_auth_per_ip``) each worker takes as many.
"""
