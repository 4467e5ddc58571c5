"""What a request is told when it cannot be honoured: one object, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from squeezed.errors import SqueezedError, shown
from squeezed.system.failures import explained, is_out_of_memory

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "overloaded_error",
    507: "server_error",
}

LONGEST = 500
"""Characters of a message."""


class Refusal(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one line: what was expected, what came, and the remedy.
        param: the field of the request, if one is to blame.
        code: a word for programs.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        text = " ".join(self.message.split())
        text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
        plain = "".join(c if c.isprintable() else shown(c) for c in text)
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": plain, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refusal_of(error: BaseException) -> Refusal:
    """Any exception as what a client may be told: nothing of the server's inside."""
    if isinstance(error, Refusal):
        return error
    if is_out_of_memory(error) or is_out_of_memory(error.__cause__ or Exception()):
        return Refusal(503, "the server has no memory left for this request", None, "no_memory", 5)
    if isinstance(error, SqueezedError):
        status = 507 if isinstance(error.__cause__, OSError) else 400
        return Refusal(status, outward(str(error)), param_of(str(error)))
    known = explained(error)
    if known is not None:
        return Refusal(507 if isinstance(error, OSError) else 500, outward(str(known)))
    return Refusal(500, "the server failed at this request; its log says why", None, "fault")


def outward(message: str) -> str:
    """A line of ours without the place on the server's disk that it begins with."""
    head, colon, rest = message.partition(": ")
    return rest if colon and "/" in head else message


def param_of(message: str) -> str | None:
    """Our errors begin with the argument that is to blame."""
    name = message.partition(":")[0]
    return name if name.isidentifier() else None
