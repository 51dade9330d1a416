"""What stands before every route: the size of headers, the Host, the Origin, API keys and cross-origin answers.

A page of another site that a browser shows may send requests to this machine, under any name that its DNS resolves to it
(DNS rebinding). So a server without a key answers only to the names that are its own.
"""

import hmac
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmjax.serve.refusals import Refusal

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
HEADER_BYTES, HEADERS = 64 << 10, 100
LOOPBACK = frozenset(("127.0.0.1", "localhost", "[::1]"))
OPEN = ("/health",)  # paths that need no key, beside the page's own files


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        hosts: names of the server, without port.
        keys: API keys; empty: nobody needs one.
        origins: sites whose pages may ask; "*": all, but without credentials.
        page: paths of the page's files, which need no key.
    """

    hosts: Collection[str]
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    page: Collection[str] = ()


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = ""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not any(name == b"x-request-id" for name, _ in headers):
                    headers.append((b"x-request-id", scope["llmjax.id"].encode()))
                message["headers"] = [*headers, *(_cross_origin(allowed) if allowed else ())]
            await send(message)

        scope["llmjax.id"] = _request_id(scope)
        try:
            headers = self._checked(scope)
            allowed = self._origin(headers)
            if scope["method"] == "OPTIONS" and allowed:
                await _preflight(send, allowed)
                return
            scope["llmjax.key"] = self._key(scope["path"], headers)
        except Refusal as refusal:
            allowed = ""
            await refusal.response()(scope, receive, marked)
            return
        await self._app(scope, receive, marked)

    def _checked(self, scope: Scope) -> dict[str, str]:
        pairs = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in pairs) + len(scope.get("raw_path") or b"")
        size += len(scope.get("query_string") or b"")
        if size > HEADER_BYTES or len(pairs) > HEADERS:
            raise Refusal(431, f"headers may have {HEADER_BYTES:,} bytes in {HEADERS} lines", code="headers_too_large")
        hosts = [value for name, value in pairs if name == b"host"]
        if len(hosts) != 1 or len([1 for name, _ in pairs if name == b"content-length"]) > 1:
            raise Refusal(400, "a request has exactly one Host", code="invalid_host")
        name = hosts[0].decode("latin-1").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if "*" not in self._access.hosts and name not in self._access.hosts:
            raise Refusal(
                403, "this Host is not a name of the server: give it with --config.serve.hosts='[\"NAME\"]'",
                code="invalid_host",
            )  # fmt: skip
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}

    def _origin(self, headers: dict[str, str]) -> str:
        """The site that may read the answer across origins; "" for none. Raises Refusal for a site that may not ask."""
        origin = headers.get("origin")
        if origin is None or origin.partition("://")[2] == headers["host"]:
            return ""
        if origin in self._access.origins:
            return origin
        if "*" in self._access.origins:
            return "*"
        raise Refusal(
            403, "pages of this origin may not ask: allow it with --config.serve.origins='[\"https://...\"]'",
            code="invalid_origin",
        )  # fmt: skip

    def _key(self, path: str, headers: dict[str, str]) -> str:
        """The number of the key that was given, as text; "" where none is needed. Raises Refusal."""
        if not self._access.keys or path in OPEN or path in self._access.page:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = ""
        for number, key in enumerate(self._access.keys):  # all are compared, so that the time says nothing
            same = hmac.compare_digest(given.strip().encode(), key.encode())
            found = str(number) if same and scheme.lower() == "bearer" else found
        if not found:
            raise Refusal(401, "give a valid API key: Authorization: Bearer KEY", code="invalid_api_key")
        return found


def _request_id(scope: Scope) -> str:
    """The id of a request, which the client may choose."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _cross_origin(allowed: str) -> list[tuple[bytes, bytes]]:
    return [(b"access-control-allow-origin", allowed.encode()), (b"vary", b"origin")]


async def _preflight(send: Send, allowed: str) -> None:
    headers = [
        *_cross_origin(allowed),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, *"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
