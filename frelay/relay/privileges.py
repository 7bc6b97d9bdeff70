"""What a relay process may do, and what may be done to it: as little as it can work with.

Three things, all before the first thread and the first connection, since capabilities and most of these flags belong to
a thread and are only inherited by those that it starts:

1. *Nobody reads its memory.* The relay's private key is in it. A core dump would write that to a disk, so there is
   none: RLIMIT_CORE is 0, which a ``core_pattern`` that pipes to a program does not heed, and the process is not
   "dumpable", which every core heeds. The latter also keeps other processes of the same user from attaching to it.
2. *Nothing that it could run gives it more than it has*: PR_SET_NO_NEW_PRIVS. frelay runs nothing but its own workers;
   whoever has found a way to make it run something gets no further by a setuid program.
3. *It is not root*, where ``[relay] user`` names somebody else. CAP_NET_BIND_SERVICE stays, and nothing beside it, if
   the route file has a port below 1024: a reload may have to bind another one. Workers are given their sockets, and
   have no capability.

The third comes *before* anything is bound, not after it as in daemons that have no such capability. Whatever that user
cannot do (read the key, bind the socket of the API) then fails at the start, in front of whoever starts it, and not at
the first reload, a month later.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import sysconfig
import threading
from typing import Final

from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.pki.key_mode import own_groups

__all__ = ["find_account", "give_up", "groups_in_force", "seal"]

# linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_SET_NO_NEW_PRIVS: Final = 38

# linux/capability.h
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAP_NET_BIND_SERVICE: Final = 10

_FIRST_FREE_PORT: Final = 1024
"""net.ipv4.ip_unprivileged_port_start unless somebody has changed it; where it is lower the capability does no harm."""


def find_account(config: Config) -> pwd.struct_passwd | None:
    """Whom ``[relay] user`` means, None if it is not set; raises ConfigError for nobody, and for root."""
    name = config.relay.user
    if name is None:
        return None
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        remedy = f"useradd --system --no-create-home --shell /usr/sbin/nologin {name}"
        raise _refusal(config, f'there is no user "{name}" on this machine; {remedy}') from None
    if account.pw_uid == 0:
        raise _refusal(config, f'"{name}" is root: name a user that may do less, or leave the key out')
    return account


def groups_in_force(config: Config) -> frozenset[int]:
    """The ids of the groups that a relay with this configuration is in, once it has given up being root.

    Raises ConfigError where ``[relay] user`` names nobody.
    """
    account = find_account(config)
    if account is None or os.geteuid() == account.pw_uid:
        return own_groups()
    return frozenset(os.getgrouplist(account.pw_name, account.pw_gid))


def give_up(config: Config) -> None:
    """Give up all that a relay with this configuration does not need, for good; raises ConfigError if that cannot be.

    Call it from the only thread of the process.
    """
    account = find_account(config)
    if account is not None and os.geteuid() != account.pw_uid:
        _become(account, config)
        _check_program(account, config)
        _check_files(account, config)
    # Last, because a change of user sets "dumpable" to what fs.suid_dumpable says.
    seal()


def seal() -> None:
    """The first two of the three. A worker process does this again: "dumpable" comes back with each program started."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def _become(account: pwd.struct_passwd, config: Config) -> None:
    name = account.pw_name
    if os.geteuid() != 0:
        raise _refusal(
            config,
            f'only root can become "{name}", and this is uid {os.geteuid()}: start it as root, or leave the key out '
            f"and start it as {name}",
        )
    if threading.active_count() > 1:
        raise AssertionError("another thread would keep what this one gives up")
    try:
        # Capabilities otherwise go with the last uid 0.
        _prctl(_PR_SET_KEEPCAPS, 1)
        # In this order: each of these steps takes the right to the one before it.
        os.setgroups(os.getgrouplist(name, account.pw_gid))
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
        _keep_capabilities({_CAP_NET_BIND_SERVICE} if _binds_low_ports(config) else set())
        _prctl(_PR_SET_KEEPCAPS, 0)
    except OSError as error:
        # Root without CAP_SETUID, as in some containers.
        raise _refusal(config, f'this process cannot become "{name}": {error.strerror}') from error


def _binds_low_ports(config: Config) -> bool:
    addresses = [address for route in config.routes for address in route.listen]
    if config.admin is not None and config.admin.address is not None:
        addresses.append(config.admin.address)
    if config.metrics is not None:
        addresses.append(config.metrics.listen)
    return any(0 < address.port < _FIRST_FREE_PORT for address in addresses)


def _check_program(account: pwd.struct_passwd, config: Config) -> None:
    """Raise ConfigError if Python or frelay lie in root's own home, say: modules are loaded as they are needed."""
    places = sysconfig.get_paths()
    for place in (places["stdlib"], places["platlib"], os.path.dirname(__file__)):
        if not os.access(place, os.R_OK | os.X_OK):
            name = account.pw_name
            raise _refusal(config, f"{place}, a part of this program, cannot be read by {name}: install it elsewhere")


def _check_files(account: pwd.struct_passwd, config: Config) -> None:
    """Raise ConfigError for each file that root could read, and this user cannot: with what to do about it."""
    hidden = [path for path in config.watched_files if not os.access(path, os.R_OK) and not _is_absent(path)]
    if hidden:
        name = account.pw_name
        raise ConfigError(
            [
                Problem(
                    config.path,
                    f"{path} cannot be read by {name}, who has to read it again at each reload: chown {name} {path}, "
                    f"and let {name} into the directories above it",
                    key="relay.user",
                )
                for path in hidden
            ]
        )


def _is_absent(path: os.PathLike[str]) -> bool:
    """Whether it is not there at all: whoever loads it says so better."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _refusal(config: Config, message: str) -> ConfigError:
    return ConfigError([Problem(config.path, message, key="relay.user")])


# --- the kernel -------------------------------------------------------------------------------------------------------


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityWord(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _keep_capabilities(kept: set[int]) -> None:
    """Make ``kept`` the only capabilities of this thread, none of them inheritable."""
    mask = sum(1 << capability for capability in kept)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    # Two words of 32; all that may be kept here is in the first.
    words = (_CapabilityWord * 2)(_CapabilityWord(mask, mask, 0), _CapabilityWord(0, 0, 0))
    _check(_libc().capset(ctypes.byref(header), words))


def _prctl(option: int, value: int) -> None:
    nothing = ctypes.c_ulong(0)
    _check(_libc().prctl(option, ctypes.c_ulong(value), nothing, nothing, nothing))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
