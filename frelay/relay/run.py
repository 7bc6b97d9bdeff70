"""The composition root: the one place that puts the parts of a relay together, and runs it.

:func:`run` is ``frelay run``. :func:`make_relay` makes a relay that serves by itself or, with ``workers`` above 1, a
supervisor; :func:`make_worker_relay` makes the relay inside a worker process.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from frelay.config.load import load
from frelay.config.model import Config
from frelay.errors import ConfigError
from frelay.joining.accept_context import SharedParts
from frelay.joining.refusal_log import StrangersRefused
from frelay.joining.routes import RouteRegistry
from frelay.joining.runner import PairingRunner
from frelay.joining.tickets import TicketRegistry
from frelay.journal import Journal
from frelay.net.passed_sockets import PassedSockets
from frelay.net.slots import Admission, raise_descriptor_limit
from frelay.pairing.forwarding import Forwarding
from frelay.pairing.pipes import PipePool
from frelay.relay import privileges
from frelay.relay.active_config import ActiveConfig
from frelay.relay.backend import Backend, Resources
from frelay.relay.local import LocalBackend
from frelay.relay.logging import LogFormat, configure
from frelay.relay.parts import Parts
from frelay.relay.prepare import with_all_problems
from frelay.relay.recheck import CredentialRecheck
from frelay.relay.relay import HttpServers, OpenServers, Relay
from frelay.relay.reload import Reloader
from frelay.relay.resources import OwnResources
from frelay.relay.service_manager import ServiceManager

if TYPE_CHECKING:
    from frelay.relay.views import Views
    from frelay.relay.workers.fleet import Fleet

__all__ = ["make_relay", "make_worker_relay", "run"]


def run(path: Path, *, watch_files: bool, log_format: LogFormat, log_level: str) -> int:
    """Run the relay of the route file at ``path`` until it is told to end; gives the exit code.

    Raises ConfigError if it cannot start. The caller ignores SIGHUP, which the relay handles while it runs.
    """
    try:
        config = load(path)
    except ConfigError as error:
        raise with_all_problems(path, error) from error
    privileges.give_up(config)  # before the log, which has a thread
    configure(log_format, log_level)
    relay = make_relay(
        config,
        watch_files=watch_files,
        inherited=PassedSockets.from_environment(),
        service_manager=ServiceManager.from_environment(),
        log_format=log_format,
        log_level=log_level,
    )
    # Everything loaded until now stays until the end, so the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    return trio.run(relay.run)


def make_relay(
    config: Config,
    *,
    watch_files: bool = True,
    inherited: PassedSockets | None = None,
    service_manager: ServiceManager | None = None,
    log_format: LogFormat = "console",
    log_level: str = "info",
) -> Relay:
    """A relay for ``config``, with as many worker processes as that says.

    ``inherited`` are the sockets that systemd has passed. ``log_format`` and ``log_level`` are how the workers log.
    """
    inherited, service_manager = inherited or PassedSockets(), service_manager or ServiceManager()
    parts = _make_parts(config, structlog.get_logger("frelay.relay"))
    resources = OwnResources(parts, inherited)
    backend: Backend
    if config.relay.worker_count == 1:
        backend, open_servers = LocalBackend(parts, resources), _servers_opener(inherited)
    else:
        # Imported here: a relay of one process needs nothing of it.
        from frelay.relay.workers.fleet import Fleet
        from frelay.relay.workers.supervisor import Supervisor

        fleet = Fleet(config.relay.worker_count)
        backend = Supervisor(parts, resources, fleet, log_format=log_format, log_level=log_level)
        open_servers = _servers_opener(inherited, fleet)
    return Relay(
        parts,
        backend,
        Reloader(parts, backend, service_manager),
        inherited=inherited,
        service_manager=service_manager,
        open_servers=open_servers,
        watch_files=watch_files,
        obeys_signals=True,
    )


def make_worker_relay(config: Config, resources: Resources, *, log: Any) -> Relay:
    """The relay inside a worker process: the supervisor has the signals, the files and the HTTP servers."""
    parts = _make_parts(config, log)
    backend, service_manager = LocalBackend(parts, resources), ServiceManager()
    return Relay(
        parts,
        backend,
        Reloader(parts, backend, service_manager),
        inherited=PassedSockets(),
        service_manager=service_manager,
        open_servers=None,
        watch_files=False,
        obeys_signals=False,
    )


def _make_parts(config: Config, log: Any) -> Parts:
    log = log.bind(relay=config.relay.name)
    admission = Admission(config.limits, descriptor_limit=raise_descriptor_limit())
    journal = Journal()
    registry = RouteRegistry(journal)
    runner = PairingRunner(registry, journal)
    active = ActiveConfig(config)
    return Parts(
        active=active,
        registry=registry,
        runner=runner,
        recheck=CredentialRecheck(active, registry, log),
        admission=admission,
        # Two descriptors a pipe. Admission sets them aside, so bulk transfers never take the slots of newcomers.
        forwarding=Forwarding(pipes=PipePool(capacity=admission.leg_budget // 2)),
        shared=SharedParts(
            admission=admission,
            runner=runner,
            tickets=TicketRegistry(),
            journal=journal,
            strangers_refused=StrangersRefused(journal),
        ),
        journal=journal,
        draining=trio.Event(),
        changing=trio.Lock(),
        reading=trio.CapacityLimiter(1),
        log=log,
    )


def _servers_opener(inherited: PassedSockets, fleet: Fleet | None = None) -> OpenServers:
    """A function that binds the HTTP servers of a relay; ``fleet`` serves its routes, None if it does so itself."""

    def open_servers(relay: Relay) -> HttpServers | None:
        config = relay.config
        if config.admin is None and config.metrics is None:
            return None
        # Imported here: FastAPI takes half a second to load, which a relay without a server need not spend.
        from frelay.admin.servers import Servers
        from frelay.relay.control import RelayControl

        return Servers(
            config,
            RelayControl(relay, _views(relay, fleet)),
            running=lambda: relay.config,
            trust=lambda: relay.trust,
            inherited=inherited,
            max_connections=relay.admission.connections_per_http_server,
        )

    return open_servers


def _views(relay: Relay, fleet: Fleet | None) -> Views:
    if fleet is None:
        from frelay.relay.views import LocalViews

        return LocalViews(relay)
    from frelay.relay.workers.views import WorkerViews

    return WorkerViews(relay, fleet)
