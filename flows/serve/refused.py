"""What the server says to a request that it does not answer."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class Refused(Exception):
    """A request that is not answered: the HTTP status, and OpenAI's type of the error with the parameter at fault."""

    def __init__(self, status: int, kind: str, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.parameter = status, kind, parameter

    @property
    def content(self) -> dict[str, object]:
        """What is answered, as OpenAI puts it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.parameter, "code": None}}

    def response(self) -> JSONResponse:
        """The answer as OpenAI gives it."""
        # What is left of a body that is too long is not read.
        headers = {429: {"Retry-After": "5"}, 413: {"Connection": "close"}}.get(self.status)
        return JSONResponse(self.content, self.status, headers)


def unknown_model(asked: str, name: str) -> Refused:
    """Returns what says that there is no model ``asked``, but ``name``."""
    return Refused(404, "invalid_request_error", f"there is no model '{asked}', but '{name}'", "model")


def failed(error: Exception) -> Refused:
    """Returns what says that the fault is the server's own."""
    told = f"the server failed ({type(error).__name__}); where it was started, it says more"
    return Refused(500, "server_error", told)


def bad_request(message: str, parameter: str | None = None) -> Refused:
    """Returns what says that ``parameter`` cannot be answered as it is."""
    return Refused(400, "invalid_request_error", message, parameter)


def invalid(error: RequestValidationError) -> Refused:
    """Returns what says which parameter of a request's body is wrong, and how."""
    # Where one of several types may stand, each that was tried is told. What is of a type and wrong in another way was
    # meant as that one; else the one that came furthest was. What is missing may be so for what is there in its place.
    fault = max(
        error.errors(), key=lambda one: (one["type"] != "missing", not one["type"].endswith("_type"), len(one["loc"]))
    )
    parameter = _parameter(fault["loc"])
    told = "not supported here" if fault["type"] == "extra_forbidden" else fault["msg"]
    return bad_request(f"{parameter}: {told}" if parameter else f"the body is no request: {told}", parameter)


def _parameter(place: Sequence[int | str]) -> str | None:
    """Returns the parameter at ``place``: "body", its name, then names and numbers inside it, and types among them."""
    if len(place) < 2 or not isinstance(place[1], str):
        return None
    found = place[1]
    for step in place[2:]:
        if isinstance(step, int):
            found += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int"):
            found += f".{step}"
    return found


async def _refused(_: Request, error: Refused) -> JSONResponse:
    return error.response()


async def _misunderstood(request: Request, error: RequestValidationError) -> JSONResponse:
    kind = request.headers.get("content-type", "")
    if "json" not in kind.lower():
        sent = f"is of the Content-Type '{kind}'" if kind else "has no Content-Type"
        told = f"the body {sent}, and is no request; send it as application/json"
        return bad_request(told).response()
    return invalid(error).response()


async def _unanswerable(request: Request, error: HTTPException) -> JSONResponse:
    what = f"{request.method} {request.url.path}"
    if error.status_code == 400:
        what = "the body is no request"
    told = "there is nothing here" if error.status_code == 404 else error.detail
    return Refused(error.status_code, "invalid_request_error", f"{what}: {told}").response()


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    return failed(error).response()


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    Refused: _refused,
    RequestValidationError: _misunderstood,
    HTTPException: _unanswerable,
    Exception: _unexpected,
}
"""What answers each kind of exception, as FastAPI wants it."""
