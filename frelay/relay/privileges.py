"""Privileges: a relay process gives up all that it does not need, and protects its memory.

It does three things before its first thread and its first connection, since capabilities and most of these flags belong
to a thread, and only threads that it starts later inherit them:

1. *Nobody reads its memory.* The relay's private key is in it, and a core dump would write the key to a disk. So
   RLIMIT_CORE is 0, and the process is not "dumpable": where ``core_pattern`` pipes to a program, the kernel ignores
   the limit, but not the flag. The flag also keeps other processes of the same user from attaching to it.
2. *No program gives it more rights than it has*: PR_SET_NO_NEW_PRIVS. frelay runs nothing but its own workers. An
   attacker that makes it run something else gains nothing from a setuid program.
3. *It is not root* if ``[relay] user`` names another user. It keeps CAP_NET_BIND_SERVICE and no other capability if the
   route file has a port below 1024, because a reload may have to bind another such port. Workers are given their
   sockets, and have no capability.

The third comes *before* anything is bound; daemons without that capability must do it after. So what the user cannot
do (read the key, bind the socket of the API) fails at the start, where the operator sees it, and not at the first
reload, a month later.
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
"""The default of net.ipv4.ip_unprivileged_port_start; where that is set lower, the capability does no harm."""


def find_account(config: Config) -> pwd.struct_passwd | None:
    """The account that ``[relay] user`` names, None if that is not set; raises ConfigError if it is unknown or root."""
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
    """The ids of the groups of a relay with this configuration, after it has given up being root.

    Raises ConfigError if ``[relay] user`` names an unknown user.
    """
    account = find_account(config)
    if account is None or os.geteuid() == account.pw_uid:
        return own_groups()
    return frozenset(os.getgrouplist(account.pw_name, account.pw_gid))


def give_up(config: Config) -> None:
    """Give up for good all that a relay with this configuration does not need; raises ConfigError if it cannot.

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
    """Do the first two of the three. A worker process does it again: each start of a program sets "dumpable" again."""
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
        # Otherwise the kernel takes the capabilities away with the last uid 0.
        _prctl(_PR_SET_KEEPCAPS, 1)
        # In this order: after each of these steps the process may not do the one before it any more.
        os.setgroups(os.getgrouplist(name, account.pw_gid))
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
        _keep_capabilities({_CAP_NET_BIND_SERVICE} if _binds_low_ports(config) else set())
        _prctl(_PR_SET_KEEPCAPS, 0)
    except OSError as error:
        # This is root without CAP_SETUID, as in some containers.
        raise _refusal(config, f'this process cannot become "{name}": {error.strerror}') from error


def _binds_low_ports(config: Config) -> bool:
    addresses = [address for route in config.routes for address in route.listen]
    if config.admin is not None and config.admin.address is not None:
        addresses.append(config.admin.address)
    if config.metrics is not None:
        addresses.append(config.metrics.listen)
    return any(0 < address.port < _FIRST_FREE_PORT for address in addresses)


def _check_program(account: pwd.struct_passwd, config: Config) -> None:
    """Raise ConfigError if the user cannot read Python or frelay, which load modules when they need them.

    They may be installed in root's home, for example.
    """
    places = sysconfig.get_paths()
    for place in (places["stdlib"], places["platlib"], os.path.dirname(__file__)):
        if not os.access(place, os.R_OK | os.X_OK):
            name = account.pw_name
            raise _refusal(config, f"{place}, a part of this program, cannot be read by {name}: install it elsewhere")


def _check_files(account: pwd.struct_passwd, config: Config) -> None:
    """Raise ConfigError with each file that root can read and this user cannot, and what to do about it."""
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
    """Whether there is no file at ``path``; the error of loading it is clearer than one from here."""
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
    # The kernel takes two words of 32 bits; all capabilities that are kept here are in the first.
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
