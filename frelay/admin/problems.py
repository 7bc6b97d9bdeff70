"""The error answers of the admin API: each has the body :class:`~frelay.admin.model.Problems`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.responses import JSONResponse

from frelay.admin.control import (
    Conflict,
    ControlError,
    InvalidRequest,
    PreconditionFailed,
    RelayDraining,
    UnknownRoute,
    Unwritable,
)
from frelay.admin.model import DialBody, Problems, ProblemView

__all__ = ["control_error_response", "error_answers", "problem_response", "value_problems"]

_STATUS: Final[Mapping[type[ControlError], tuple[int, str]]] = {
    UnknownRoute: (404, "not-found"),
    InvalidRequest: (422, "invalid"),
    Conflict: (409, "conflict"),
    PreconditionFailed: (412, "precondition-failed"),
    Unwritable: (507, "not-writable"),
    RelayDraining: (503, "draining"),
}

_DESCRIPTIONS: Final = {
    400: "The request cannot be read",
    403: "The Host, the Origin or the client certificate of the request is not accepted",
    404: "There is no such route",
    409: "It conflicts with another route or with the configuration files",
    412: "If-Match or If-None-Match does not hold: the route changed since you read it, or exists already, or does not",
    413: "The body is too large or arrives too slowly",
    422: "Some values are wrong; each problem names its key",
    429: "Too many event streams are open",
    503: "The relay is draining and takes no changes",
    507: "The route file cannot be written",
}


def problem_response(
    status: int, error: str, message: str, problems: list[ProblemView] | None = None, headers: Any = None
) -> JSONResponse:
    """An answer with ``status``; ``error`` is a word for programs and ``message`` a sentence for a person."""
    body = Problems(error=error, message=message, problems=problems or [])
    return JSONResponse(body.model_dump(), status, headers=headers)


def control_error_response(error: ControlError) -> JSONResponse:
    """The answer for an error of the control."""
    status, word = _STATUS[type(error)]
    return problem_response(status, word, error.message, error.problems)


def error_answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the errors that every path may answer, and those with ``codes``."""
    return {code: {"model": Problems, "description": _DESCRIPTIONS[code]} for code in (400, 403, 413, 422, *codes)}


def value_problems(errors: Sequence[Any]) -> list[ProblemView]:
    """One problem for each key of pydantic's ``errors``: pydantic has one for each type that the value could have."""
    messages: dict[str, list[str]] = {}
    for found in errors:
        messages.setdefault(_key_path(found["loc"]), []).append(str(found["msg"]))
    return [ProblemView(key=key, message="; or: ".join(texts)) for key, texts in messages.items()]


def _key_path(location: tuple[Any, ...]) -> str:
    """``func1[2]`` for ``("body", "func1", "list[str]", 2)``: leaves out the part of the request and the tried type."""
    path = ""
    for depth, step in enumerate(location[1:]):
        if isinstance(step, int):
            path += f"[{step}]"
        elif depth == 0 or step in DialBody.model_fields:
            path += f".{step}" if path else step
    return path or str(location[0])
