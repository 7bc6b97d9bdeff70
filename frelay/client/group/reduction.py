"""The operations of reduce, allreduce and scan, on the elements of one buffer. Standard library only.

:meth:`Reduction.fold` takes the contributions of lower ranks and of higher ranks and always calls the operation in this
order. So an operation that does not commute works too, and all ranks that compute a result compute the same bits.

With NumPy in the program, its functions do the work. Without it Python loops over the elements, and rounds and wraps
around as NumPy does. So a result does not depend on what a rank has imported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

from frelay.client.group.buffers import is_numpy_array, numpy, writable

__all__ = ["NAMES", "Operation", "Reduction"]

Operation = str | Callable[[Any, Any], Any]

_PLAIN: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "sum": operator.add,
    "prod": operator.mul,
    # As NumPy: a NaN wins, whichever of the two it is.
    "min": lambda a, b: a if a < b or a != a else b,
    "max": lambda a, b: a if a > b or a != a else b,
}
_OF_NUMPY: Final = {"sum": "add", "prod": "multiply", "min": "minimum", "max": "maximum"}
NAMES: Final = tuple(_PLAIN)

_SIGNED: Final = frozenset("bhilqn")
_UNSIGNED: Final = frozenset("BHILQN")
_OTHERS: Final = frozenset("fd?")
# The kinds of element types of NumPy that are numbers: bool, signed, unsigned, float, complex.
_NUMBERS: Final = frozenset("biufc")


class Reduction:
    """One buffer, the type of its elements, and the operation on them."""

    def __init__(self, buffer: Any, op: Operation, what: str = "buf") -> None:
        """Raises TypeError or ValueError if the buffer or the operation cannot be used."""
        if not callable(op) and op not in NAMES:
            raise ValueError(f"op={op!r}: write one of {', '.join(NAMES)}, or give a function of two arguments")
        self.view: Final = writable(buffer, what)
        """The buffer as bytes."""
        self._op: Final = op
        self._is_array: Final = is_numpy_array(buffer)
        if self._is_array:
            self._type: Any = buffer.dtype
            self.item_size: int = buffer.dtype.itemsize
            if buffer.dtype.kind not in _NUMBERS:
                raise TypeError(f"{what}: the elements are {buffer.dtype}, and not numbers")
        else:
            with memoryview(buffer) as typed:
                self._type = typed.format.removeprefix("@")
                self.item_size = typed.itemsize
            if self._type not in _SIGNED | _UNSIGNED | _OTHERS:
                raise TypeError(f"{what}: the elements have the format {self._type!r}, and not one of a native number")

    @property
    def arguments(self) -> str:
        """What must be equal at all ranks."""
        name = self._op if isinstance(self._op, str) else "function"
        if self._is_array:
            return f"{name} {self._type.kind}{self.item_size}"
        kind = "i" if self._type in _SIGNED else "u" if self._type in _UNSIGNED else "b" if self._type == "?" else "f"
        return f"{name} {kind}{self.item_size}"

    def fold(self, lower: memoryview, higher: memoryview, into: memoryview) -> None:
        """Write ``op(lower, higher)`` into ``into``, which may be one of the two; all are bytes of whole elements."""
        if not into.nbytes:
            return
        if isinstance(self._op, str):
            self._fold_by_name(self._op, lower, higher, into)
        elif self._is_array:
            a, b, c = (self._array(view) for view in (lower, higher, into))
            c[:] = self._op(a, b)
        else:
            a, b, c = (view.cast(self._type) for view in (lower, higher, into))
            for at, (x, y) in enumerate(zip(a, b, strict=True)):
                c[at] = self._op(x, y)

    def _fold_by_name(self, name: str, lower: memoryview, higher: memoryview, into: memoryview) -> None:
        module = numpy()
        if module is not None:
            # An overflow of floats is an infinity, as in Python, and no warning on some ranks only.
            with module.errstate(all="ignore"):
                getattr(module, _OF_NUMPY[name])(self._array(lower), self._array(higher), out=self._array(into))
            return
        function, fit = _PLAIN[name], self._fit
        a, b, c = (view.cast(self._type) for view in (lower, higher, into))
        for at, (x, y) in enumerate(zip(a, b, strict=True)):
            c[at] = fit(function(x, y))

    def _array(self, view: memoryview) -> Any:
        return numpy().frombuffer(view, dtype=self._type)

    def _fit(self, value: Any) -> Any:
        """``value`` as the element type holds it: an integer wraps around, a float rounds or becomes infinite."""
        if self._type in _UNSIGNED:
            return value & ((1 << 8 * self.item_size) - 1)
        if self._type in _SIGNED:
            half = 1 << (8 * self.item_size - 1)
            return ((value + half) & (2 * half - 1)) - half
        if self._type == "f" and abs(value) >= _TOO_LARGE:
            return float("inf") if value > 0 else float("-inf")
        return value


# Half a unit above the largest number of 32 bits. C rounds this and more to infinity; Python raises OverflowError.
_TOO_LARGE: Final = (2.0 - 2.0**-24) * 2.0**127
