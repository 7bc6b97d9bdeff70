"""The buffers that callers give to a group: bytes-like objects, ``array.array`` and NumPy arrays, as plain bytes.

NumPy is never imported. It is used if the program has imported it already, because only then can a caller have one of
its arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["EMPTY", "is_numpy_array", "numpy", "readable", "readable_parts", "writable"]

EMPTY: Final = memoryview(bytearray())
"""No bytes. It is writable, because it is received into as well."""
_SHAPES: Final = "a bytes-like object, an array.array or a NumPy array"


def numpy() -> Any:
    """The module NumPy if the program has loaded it, else None."""
    return sys.modules.get("numpy")


def is_numpy_array(buffer: object) -> bool:
    """Whether ``buffer`` is an array of NumPy."""
    module = numpy()
    return module is not None and isinstance(buffer, module.ndarray)


def readable(buffer: object, what: str) -> memoryview:
    """The bytes of ``buffer``, without a copy; ``what`` names the argument. Raises TypeError or ValueError."""
    view = _view(buffer, what)
    if not view.c_contiguous:
        raise ValueError(f"{what}: the buffer is not contiguous; give a copy of it")
    # memoryview.cast refuses a view without bytes.
    return view.cast("B") if view.nbytes else EMPTY


def writable(buffer: object, what: str) -> memoryview:
    """As :func:`readable`, for a buffer that the group writes into."""
    view = readable(buffer, what)
    if view.nbytes and view.readonly:
        raise ValueError(f"{what}: the buffer is read-only; give a bytearray, an array.array or a writable NumPy array")
    return view


def readable_parts(parts: Sequence[Any], size: int, what: str) -> list[memoryview]:
    """The bytes of one buffer for each rank."""
    if isinstance(parts, bytes | bytearray | memoryview | str):
        raise TypeError(f"{what}: give a sequence of {size} buffers, one for each rank, and not one buffer")
    if len(parts) != size:
        raise ValueError(f"{what}: there are {len(parts)} buffers for {size} ranks")
    return [readable(part, f"{what}[{rank}]") for rank, part in enumerate(parts)]


def _view(buffer: Any, what: str) -> memoryview:
    if is_numpy_array(buffer):
        if buffer.dtype.hasobject:
            raise TypeError(f"{what}: an array of Python objects has no bytes to send; use an array of numbers")
        if not buffer.flags.c_contiguous:
            raise ValueError(f"{what}: the array is not contiguous in C order; give numpy.ascontiguousarray(...) of it")
        # As bytes: the buffer protocol does not know every element type of NumPy, datetime64 for example.
        return memoryview(buffer.reshape(-1).view(numpy().uint8))
    try:
        return memoryview(buffer)
    except TypeError:
        raise TypeError(f"{what}: {_SHAPES} expected, not {type(buffer).__name__}") from None
