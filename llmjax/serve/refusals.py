"""What a request is answered with when it is refused: one JSON form for every status."""

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from llmjax.errors import UserError

TYPES = {
    401: "authentication_error",
    403: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
RETRY_SECONDS = 1  # advice to clients where the next try may succeed
FIELD = re.compile(r"^(?:the |a )?(\w+)")  # how the messages of `Request` and its like name what is wrong
# By the word of a message: the field of a request.
NAMES = {
    "max_new_tokens": "max_tokens", "json_schema": "response_format", "ids": "prompt", "regex": "structured_outputs",
    "grammar": "structured_outputs", "documents": "chat_template_kwargs.documents",
    **{name: name for name in (
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
        "logit_bias", "stop", "seed", "prompt", "suffix",
    )},
}  # fmt: skip


class Refusal(Exception):  # noqa: N818
    """A request cannot be answered.

    Args:
        param: the JSON path of the field that is wrong.
        again: whether the same request may succeed later, so that clients should try again.
    """

    def __init__(
        self, status: int, message: str, *, code: str = "invalid_value", param: str | None = None, again: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.again = status, message, code, param, again

    @property
    def body(self) -> dict[str, Any]:
        """The error as clients read it."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Clients try 408, 409, 429 and 5xx again by themselves, also what will not heal: this says what will."""
        if self.again:
            return {"retry-after": str(RETRY_SECONDS)}
        return {"x-should-retry": "false"} if self.status >= 429 else {}

    def response(self) -> Response:
        """The HTTP response."""
        return json_response(self.body, status=self.status, headers=self.headers)


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(encoded(value), status, dict(headers or {}), "application/json")


def encoded(value: Any) -> bytes:
    """JSON in one line, in UTF-8. There is no NaN or infinity in it, and no lone surrogate."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def of_user_error(error: UserError, param: str | None = None) -> Refusal:
    """The refusal for a mistake that the library found in a request."""
    message = str(error)
    named = FIELD.match(message)
    if param is None and named:
        param = NAMES.get(named[1])
    return Refusal(400, message, param=param)


def unsupported(param: str, message: str) -> Refusal:
    """The refusal of a field whose meaning cannot be kept."""
    return Refusal(400, f"{param} is not supported: {message}", code="unsupported_parameter", param=param)
