"""Many cores: the routes of one relay spread over several worker processes, under a supervisor.

Theory of operation
===================

With ``workers = 1`` a relay is one process, and nothing in this package is loaded. With more, the process that was
started is the supervisor: a :class:`~frelay.relay.relay.Relay` whose backend is a
:class:`~frelay.relay.workers.supervisor.Supervisor`. To the outside it is like any relay: it has the file, the signals,
the watcher, systemd, the admin API and ``/metrics``. But it serves no function itself::

    supervisor      binds every address, and keeps it bound
      worker 1      a Relay with its share of the routes, no file, no signals, no HTTP
      worker 2      ...

1.  **A listening address belongs to one worker**, and with it all routes that share it, with all their addresses. So
    both parties of a route meet in one process, and nothing between accept and pairing has to know of other workers. A
    new address goes to the worker that has the fewest. An address that is there already stays at its worker, with the
    one exception that :mod:`~frelay.relay.workers.placement` describes. A hash of the address would put two busy
    addresses on one of two workers half the time.

2.  **The supervisor binds the sockets** (or systemd does) and hands them over, so they outlive any worker. While a
    worker is started again, new connections wait in the kernel's queue.

3.  **The channel** between the two is a Unix socket pair with JSON messages; descriptors travel beside them
    (:mod:`~frelay.net.channel`). The supervisor asks, and each question has its answer. In between a worker reports
    what happens, in the order in which it happens, and it sends an answer after everything that it reported before.
    If the supervisor does not read fast enough, a worker drops its oldest reports; traffic never waits for them. A
    worker ends when its channel ends. So no worker is left over however the supervisor ends, even by SIGKILL.

4.  **A configuration is loaded once**, by the supervisor, with the files of ``[tls]``, and the supervisor passes their
    bytes on. So all workers have the same certificates, and a worker that is started again gets the configuration in
    force, even if the files on disk have changed or broken since.

5.  **A reload is a commit in two phases.** Each worker stages the new configuration, which is everything that can fail
    (:meth:`~frelay.relay.relay.Relay.stage`), and answers. Only if all succeed, the file of an edit is written
    and they are told to put the configuration in force, which cannot fail; otherwise all of them abandon it. A worker
    that does not answer the second question is killed, and started again with the new configuration. There is one
    change at a time, and the start of a worker counts as one.

6.  **A worker that dies is started again**, at once if it had lived for a while, otherwise after a pause that doubles.
    A worker reports every second. One that is silent for :data:`~frelay.relay.workers.supervisor.WORKER_TIMEOUT` ticks
    hangs, and is killed. Its pairings are gone; those of other workers are not affected.

7.  **Only the workers know what runs**, so the views of the admin API ask them (:mod:`~frelay.relay.workers.views`).
    Totals must not fall when a worker dies: each worker reports its totals every second, and its successor begins with
    the last that are known, which include those of every scrape. While there is none, the supervisor answers with them.

Each worker counts by itself what the limits of ``[limits]`` bound. That is right for descriptors, whose limit is one of
the process, and for everything that belongs to a route. Of connections that have not shown a certificate
(``max_pre_auth`` and ``max_pre_auth_per_ip``) each worker takes as many as the limit says.
"""
