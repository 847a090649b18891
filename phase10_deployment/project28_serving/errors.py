"""
Errors

This file implements what a client is told when something cannot be done: OpenAI's error objects, which say what was
wrong, in which field, and under which code a program finds it.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

KINDS = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error",
}  # fmt: skip


class ErrorDetails(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None  # the field
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that cannot be served, and what its client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake, in this field."""
    return ApiError(400, message, param, code)


def unavailable(message: str, seconds: int = 1) -> ApiError:
    """Not now: the client may try again after so many seconds."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})


def too_many(message: str, code: str, seconds: int = 1) -> ApiError:
    """Too much at once: the client may try again after so many seconds."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(seconds)})


def install(app: FastAPI) -> None:
    """Let every error of an app leave it in this form."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError):
        return error.response

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError):
        return of_validation(error).response

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException):
        if error.status_code == 404:
            return ApiError(404, f"there is nothing at {request.url.path}", code="unknown_url").response
        code = "request_too_large" if error.status_code == 413 else None
        return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers).response


def of_validation(error: RequestValidationError) -> ApiError:
    """A 400 that names the field; where several are wrong, the first."""
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return bad_request(f"the body is no JSON: {reason}", code="invalid_json")
    field = _field(first)
    if not field:  # several fields together: protocol.py's messages begin with the one to blame
        message = _message(first)
        word = message.split(" ", 1)[0]
        return bad_request(message, word if word.isidentifier() and others == [] else None, "invalid_value")
    # Where a value may be of several types, each of them has an error.
    messages = [_message(each) for each in (first, *others) if _field(each).split(".")[0] == field.split(".")[0]]
    return bad_request(f"{field}: {' or: '.join(dict.fromkeys(messages[:4]))}", field, "invalid_value")


def _field(error: Mapping[str, Any]) -> str:
    """The place of a mistake, without "body" and without the types that pydantic tried, such as "list[str]"."""
    place = [str(part) for part in error["loc"][1:]]
    return ".".join(part for part in place if not any(mark in part for mark in "[]()-") and part not in _TYPES)


def _message(error: Mapping[str, Any]) -> str:
    return error["msg"].removeprefix("Value error, ")


_TYPES = ("str", "int", "float", "bool", "NamedTool", "constrained")
