"""What a client is told when its request is not answered."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused, or that failed, in one sentence for the client.

    Attributes:
        status: the HTTP status.
        param: the field that is wrong, as "messages[0].content".
        code: OpenAI's word for the case, or None.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's servers write it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        names = {401: "authentication_error", 429: "rate_limit_error"}
        return {
            "error": {
                "message": self.message,
                "type": names.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers
