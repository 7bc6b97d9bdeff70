"""Reads each kind of value in a route file: it turns TOML values into typed, checked, immutable objects.

The fields of the sections are declared with the types at the end of this module. They are strict: ``"10"`` is not 10
and ``true`` is not 1. Errors are written for the author of the file: they say what to write instead, and never quote
what might be a secret.

Some values depend on their context: a path needs the directory of its file, ``group:NAME`` needs the groups. They get
it as pydantic's validation context, a :class:`ValueContext`. Without one, as when a section is built in Python, paths
stay as they are and no group can be named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationInfo,
)

from frelay.config.address import (
    MAX_UNIX_PATH,
    Address,
    Addresses,
    Network,
    UnixAddress,
    ip_of,
    parse_address,
    parse_listen,
    parse_network,
)
from frelay.errors import holds_pem
from frelay.protocol.identity import Selector, parse_selector

__all__ = [
    "Account",
    "CongestionControl",
    "Count",
    "Dial",
    "Duration",
    "DurationOrZero",
    "File",
    "InnerTls",
    "KeepAlive",
    "Listen",
    "Listens",
    "Name",
    "Networks",
    "Party",
    "PartyValue",
    "SelectorList",
    "UnixOrAddress",
    "UserTimeout",
    "ValueContext",
    "Workers",
    "is_name",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
# Linux: TCP_CA_NAME_MAX, less its NUL.
_CONGESTION_CONTROL: Final = re.compile(r"[a-z0-9_-]{1,15}\Z")
# The names that useradd(8) accepts, and also capitals and dots, which other user databases have.
_ACCOUNT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,31}\Z")
_CONNECT_TIMEOUT: Final = 5.0  # seconds

# Seconds. TOML has no durations, and text with units would be one more notation to learn.
Duration = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DurationOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class ValueContext:
    """What values depend on: the directory that paths start from, and the groups by name.

    ``groups`` is None where no group may be named, such as inside a group.
    """

    base: Path
    groups: Mapping[str, tuple[Selector, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Dial:
    """A party that is a service: the relay dials its address when the other party joins.

    ``address`` has a port from 1 to 65535, or is a Unix socket with an absolute path. ``connect_timeout`` bounds the
    resolving of the name and the connecting together, in seconds.
    """

    address: Address | UnixAddress
    connect_timeout: float = _CONNECT_TIMEOUT

    def __str__(self) -> str:
        return f"dial {self.address}"

    def as_toml(self) -> dict[str, object]:
        """The table that a route file has for it."""
        return {"dial": str(self.address), "connect_timeout": self.connect_timeout}


Party = tuple[Selector, ...] | Dial


def is_name(value: object) -> TypeGuard[str]:
    """Whether ``value`` may name a route, a group or a relay."""
    return isinstance(value, str) and _NAME.match(value) is not None


# --- text ------------------------------------------------------------------------------------------------------


def _context(info: ValidationInfo) -> ValueContext | None:
    return info.context if isinstance(info.context, ValueContext) else None


def _text(value: object, form: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text: {form}")
    return value


def _name(value: object) -> str:
    if not is_name(value):
        raise ValueError(
            "must begin with a letter or digit and have at most 63 of A-Z a-z 0-9 '.' '_' '-', since it is also a "
            "file name, a metric label and a TLS server name"
        )
    return value


def _congestion_control(value: object) -> str:
    text = _text(value, "the name of a congestion control of this kernel, such as cubic or bbr")
    if _CONGESTION_CONTROL.match(text) is None:
        raise ValueError(
            "is not the name of a congestion control: at most 15 small letters, digits, '_' and '-', as in cubic"
        )
    return text


def _account(value: object) -> str:
    text = _text(value, "the name of a user of this machine")
    if _ACCOUNT.match(text) is None:
        raise ValueError("is not the name of a user: letters, digits, '.', '_' and '-', at most 32 of them")
    return text


def _path(value: object, info: ValidationInfo) -> Path:
    if isinstance(value, Path):
        return value
    text = _text(value, "a path, relative to the directory of this file or absolute")
    if holds_pem(text):
        raise ValueError("is PEM text: put that into a file, and write the name of the file here")
    if not text or "\0" in text or "\n" in text:
        raise ValueError("is not a path: it is empty, or has a line break or a NUL in it")
    context = _context(info)
    return Path(text) if context is None else context.base / text


def _unix_or_address(value: object, info: ValidationInfo) -> str:
    text = _text(value, '"unix:PATH" or "HOST:PORT"')
    if not text.startswith("unix:"):
        return str(parse_listen(text))
    return f"unix:{_unix_path(text, info)}"


def _unix_path(text: str, info: ValidationInfo) -> str:
    path = str(_path(text.removeprefix("unix:"), info))
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_UNIX_PATH:
        raise ValueError(
            f"a Unix socket's path has at most {MAX_UNIX_PATH} bytes, and this has {size}: {path}; use a shorter one, "
            "or a symbolic link to its directory"
        )
    return path


def _address(value: object) -> Address:
    return value if isinstance(value, Address) else parse_listen(_text(value, "HOST:PORT"))


def _addresses(value: object) -> Addresses:
    if isinstance(value, Addresses):
        return value
    if isinstance(value, (str, Address)):
        return Addresses((_address(value),))
    # The index in a ValidationError from here ("[2]") is put after the key of this value.
    found = _ADDRESSES.validate_python(value)
    for index, address in enumerate(found):
        if address in found[:index]:
            raise ValueError(f"names {address} twice")
    return Addresses(found)


def _address_list(value: object) -> object:
    if not isinstance(value, (list, tuple)):
        raise ValueError('must be HOST:PORT, or a list of them as in ["0.0.0.0:9001", "[::]:9001"]')
    if not value:
        raise ValueError(
            'is an empty list, so no function could connect: name at least one address, as in "0.0.0.0:9001"'
        )
    return tuple(value)


_ADDRESSES: Final[TypeAdapter[tuple[Address, ...]]] = TypeAdapter(
    Annotated[
        tuple[Annotated[Address, PlainValidator(_address)], ...],
        BeforeValidator(_address_list),
    ]
)


def _dial(value: object, info: ValidationInfo) -> Address | UnixAddress:
    text = _text(value, "HOST:PORT or unix:PATH")
    if text.startswith("unix:"):
        return UnixAddress(_unix_path(text, info))
    address = parse_address(text)
    host = ip_of(address.host)
    if address.port == 0 or (host is not None and host.is_unspecified):
        raise ValueError(f"{value!r} cannot be dialled: name one host, and a port from 1 to 65535")
    return address


# --- parties and networks --------------------------------------------------------------------------------------


def _selectors(value: object, info: ValidationInfo) -> tuple[Selector, ...]:
    """The selectors that one text means: itself, or all of its group if it is ``group:NAME``."""
    text = _text(value, "dns:NAME, uri:URI, spki:sha256:HEX or group:NAME")
    if not text.startswith("group:"):
        return (parse_selector(text),)
    context = _context(info)
    groups = None if context is None else context.groups
    if groups is None:
        raise ValueError(f"{text!r}: a group cannot be named here, only the selectors themselves")
    name = text.removeprefix("group:")
    if name not in groups:
        known = ", ".join(sorted(groups)) or "none"
        raise ValueError(f"there is no group {name!r}; groups in this configuration: {known}")
    return groups[name]


def _one_or_more(value: object) -> object:
    if not isinstance(value, list):
        raise ValueError("must be a selector such as dns:NAME, or a list of them")
    if not value:
        raise ValueError("is an empty list, which lets nobody in: name at least one selector")
    return tuple(value)


def _flat(value: tuple[tuple[Selector, ...], ...]) -> tuple[Selector, ...]:
    return tuple(dict.fromkeys(selector for part in value for selector in part))


class _DialTable(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dial: Annotated[Address | UnixAddress, PlainValidator(_dial)]
    connect_timeout: Duration = _CONNECT_TIMEOUT


_SELECTORS: Final[TypeAdapter[tuple[Any, ...]]] = TypeAdapter(
    Annotated[
        tuple[Annotated[tuple[Selector, ...], PlainValidator(_selectors)], ...],
        BeforeValidator(_one_or_more),
        AfterValidator(_flat),
    ]
)


def _selector_list(value: object, info: ValidationInfo) -> tuple[Selector, ...]:
    if isinstance(value, tuple) and all(isinstance(selector, Selector) for selector in value):
        return value  # made in Python: TOML gives lists
    if isinstance(value, str):
        return _selectors(value, info)
    # The index in a ValidationError from here ("[2]") is put after the key of this value.
    return _SELECTORS.validate_python(value, context=info.context)


def _party(value: object, info: ValidationInfo) -> Party:
    if isinstance(value, Dial):
        return value
    if isinstance(value, dict):
        table = _DialTable.model_validate(value, context=info.context)
        return Dial(table.dial, table.connect_timeout)
    return _selector_list(value, info)


def _networks(value: object) -> tuple[Network, ...]:
    return _NETWORKS.validate_python(value)


def _network(value: object) -> Network:
    if isinstance(value, (IPv4Network, IPv6Network)):
        return value
    return parse_network(_text(value, "a network such as 10.0.0.0/8"))


def _network_tuple(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise ValueError('must be a list of networks, as in ["10.0.0.0/8"]')


_NETWORKS: Final[TypeAdapter[tuple[Network, ...]]] = TypeAdapter(
    Annotated[
        tuple[Annotated[Network, PlainValidator(_network)], ...],
        BeforeValidator(_network_tuple),
    ]
)


# --- single choices --------------------------------------------------------------------------------------------


def _inner_tls(value: object) -> bool | Literal["always"]:
    if value is True or value is False:
        return value
    if value == "always":
        return "always"
    raise ValueError('must be true, false or "always"')


# More than the cores of a machine that runs one relay alone. A typing error must not start thousands of processes.
_MOST_WORKERS: Final = 256


def _workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if type(value) is not int or not 1 <= value <= _MOST_WORKERS:
        raise ValueError(f'must be a whole number from 1 to {_MOST_WORKERS}, or "auto"')
    return value


def _triple(value: object) -> object:
    if isinstance(value, (list, tuple)) and len(value) == 3:
        return tuple(value)
    raise ValueError("must be a list of three whole numbers: idle seconds, interval seconds, count")


# --- the types -------------------------------------------------------------------------------------------------

# No machine has more of anything than the upper bound. Without it, Python fails to print an int of 4,301 digits.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, PlainValidator(_name)]
Account = Annotated[str, PlainValidator(_account)]
File = Annotated[Path, PlainValidator(_path)]
Listen = Annotated[Address, PlainValidator(_address)]
Listens = Annotated[Addresses, PlainValidator(_addresses)]
SelectorList = Annotated[tuple[Selector, ...], PlainValidator(_selector_list)]
PartyValue = Annotated[Party, PlainValidator(_party)]
Networks = Annotated[tuple[Network, ...], PlainValidator(_networks)]
InnerTls = Annotated[bool | Literal["always"], PlainValidator(_inner_tls)]
Workers = Annotated[int | Literal["auto"], PlainValidator(_workers)]
CongestionControl = Annotated[str, PlainValidator(_congestion_control)]
UnixOrAddress = Annotated[str, PlainValidator(_unix_or_address)]
# The kernel takes milliseconds as an int, and 0 means its own default.
UserTimeout = Annotated[float, Field(ge=0.001, le=2_147_483, allow_inf_nan=False)]
# The bounds are those of Linux, include/net/tcp.h: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT.
KeepAlive = Annotated[
    tuple[
        Annotated[int, Field(ge=1, le=32767)],
        Annotated[int, Field(ge=1, le=32767)],
        Annotated[int, Field(ge=1, le=127)],
    ],
    BeforeValidator(_triple),
]
