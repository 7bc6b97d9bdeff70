"""What a configuration refers to beyond its own file: certificates, a user, a congestion control.

Loading the route file and then this is all that ``frelay check`` does, and what a relay does at its start and at each
reload. Nothing is bound here, and no part of a running relay is loaded.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from frelay.config.load import load_sections
from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.net.sockets import objection_to_congestion_control
from frelay.relay.privileges import groups_in_force
from frelay.tls.loading import load_outer_tls
from frelay.tls.trust import OuterTls

__all__ = ["TlsFiles", "prepare", "with_all_problems"]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of ``[tls]`` as they were read, and the time at which they were found good."""

    contents: dict[Path, bytes] = field(repr=False)
    at: float


def prepare(
    config: Config, *, contents: MutableMapping[Path, bytes] | None = None, now: float | None = None
) -> OuterTls | None:
    """Load what the configuration refers to; raises ConfigError. This and loading the file is `frelay check`.

    ``contents`` and ``now`` are those of :func:`~frelay.tls.loading.load_outer_tls`.
    """
    problems: list[Problem] = []
    groups, trust = None, None
    try:
        groups = groups_in_force(config)
    except ConfigError as error:
        problems += error.problems
    try:
        _check_congestion_control(config)
    except ConfigError as error:
        problems += error.problems
    if config.tls is not None:
        serves_http = config.admin is not None and config.admin.address is not None
        try:
            trust = load_outer_tls(
                config.tls, source=config.path, serves_http=serves_http, contents=contents, now=now, key_readers=groups
            )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return trust


def with_all_problems(path: Path, error: ConfigError, *, base: Path | None = None) -> ConfigError:
    """``error``, for which the route file at ``path`` was refused, and what is wrong with the files that it names.

    ``base`` is where their paths start from, as for :func:`~frelay.config.load.load`.
    """
    config = load_sections(path, base=base)
    if config is None:
        return error
    try:
        prepare(config)
    except ConfigError as more:
        return ConfigError([*error.problems, *(one for one in more.problems if one not in error.problems)])
    return error


def _check_congestion_control(config: Config) -> None:
    chosen = config.tcp.congestion_control
    if chosen is None:
        return
    try:
        objection = objection_to_congestion_control(chosen)
    except OSError as error:
        objection = f"cannot be looked for: {error.filename}: {error.strerror}; leave the key out"
    if objection is not None:
        raise ConfigError([Problem(config.path, f'"{chosen}" {objection}', key="tcp.congestion_control")])
