"""Requests of tools over HTTP: only to hosts on a list, to the address that was checked, without redirects, within limits.

A name is resolved once, and the connection goes to that address, so that a name cannot be public when it is checked and private
when it is called. Addresses that are not public are refused, unless the list names the address itself or localhost. Proxies of
the environment are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmjax.errors import UserError

LENGTH = 2 << 20  # bytes of an answer
PORTS = {"http": 80, "https": 443}
TEXTS = ("text/", "application/json", "application/xml", "application/yaml", "application/problem+json")


class RefusedError(Exception):
    """A request that may not be sent, or an answer that may not be read."""


@dataclass(frozen=True)
class Place:
    """Where a request goes."""

    scheme: str
    host: str
    port: int
    addresses: tuple[str, ...]  # of the host, checked
    path: str  # with the query

    @property
    def authority(self) -> str:
        """The host as the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """What a server answers."""

    status: int
    kind: str  # its content type
    text: str


def host_of(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path with query) of a URL. Raises RefusedError for one that is not plain http or https."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RefusedError(f"{url!r} is no URL: {error}") from error
    if parts.scheme not in PORTS or not host or parts.username is not None or parts.password is not None:
        raise RefusedError(f"{url!r} must be http://HOST/... or https://HOST/..., without a name and a password")
    if any(c <= " " or c > "~" or c == "\\" for c in url):
        raise RefusedError(f"{url!r} has characters that must be percent-encoded")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, host.rstrip(".").lower(), port or PORTS[parts.scheme], path


def listed(allowed: Sequence[str], host: str, port: int, *, default: int) -> bool:
    """Whether a list of HOST and HOST:PORT has this one; without a port only the scheme's own is meant."""
    for one in allowed:
        name, _, number = one.rpartition(":") if one.count(":") == 1 or "]:" in one else (one, "", "")
        if name.strip("[]").rstrip(".").lower() == host and port == (int(number) if number.isdecimal() else default):
            return True
    return False


def place_of(url: str, allowed: Sequence[str]) -> Place:
    """Where a URL leads, if that is permitted. Raises RefusedError."""
    scheme, host, port, path = host_of(url)
    if not listed(allowed, host, port, default=PORTS[scheme]):
        raise RefusedError(
            f"{host}:{port} is not on the list of hosts: give --allow-host {host}:{port} if it may be called"
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RefusedError(f"{host} has no address: {error}") from error
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    named = host == "localhost" or is_address(host)
    for address in addresses:
        if not (is_loopback(address) if host == "localhost" else named or is_public(address)):
            raise RefusedError(
                f"{host} has the address {address}, which is not public: give --allow-host {address}:{port} if it may be called"
            )
    return Place(scheme, host, port, tuple(addresses), path)


def is_address(host: str) -> bool:
    """Whether a host is an IP address in its usual form."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public network, also where it carries another one (mapped, 6to4, Teredo, NAT64)."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(one, ipaddress.IPv6Address):
        inner = [one.ipv4_mapped, one.sixtofour, *(one.teredo or ())]
        if one in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(one) & 0xFFFFFFFF))
        if found := [carried for carried in inner if carried is not None]:
            return all(is_public(str(carried)) for carried in found)
    return one.is_global and not one.is_multicast and not one.is_reserved


class _Connection(http.client.HTTPConnection):
    """A connection to a place."""

    def __init__(self, place: Place, seconds: float) -> None:
        super().__init__(place.host, place.port, timeout=seconds)
        self._place = place
        self._open: socket.socket | None = None  # also when the answer has taken it over

    def connect(self) -> None:
        """Connect to an address that was checked, not to the name."""
        for address in self._place.addresses:
            try:
                self.sock = socket.create_connection((address, self._place.port), self.timeout)
                break
            except OSError:
                if address == self._place.addresses[-1]:
                    raise
        self._open = self.sock
        if self._place.scheme == "https":
            context = ssl.create_default_context()
            self.sock = self._open = context.wrap_socket(
                self.sock, server_hostname=self._place.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()  # which `cut` can end too

    def cut(self) -> None:
        """End what another thread waits for: a server that sends a byte now and then is never silent for long."""
        if self._open is not None:
            with contextlib.suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)


def request(
    method: str, url: str, *, allowed: Sequence[str], headers: Mapping[str, str], body: bytes | None = None, seconds: float
) -> Answer:  # fmt: skip
    """Send a request and read its answer.

    Args:
        allowed: the hosts that may be called, HOST or HOST:PORT.
        seconds: for all of it.

    Raises:
        RefusedError: for a host that is not on the list, an address that is not public, a redirect, and an answer that is too long
            or is no text.
        TimeoutError: if it takes longer.
        OSError, http.client.HTTPException: if the connection fails.
    """
    began = time.monotonic()
    place = place_of(url, allowed)
    connection = _Connection(place, seconds)
    slow = f"{place.host} takes more than {seconds:.0f} s"
    ending = threading.Timer(seconds, connection.cut)
    ending.daemon = True
    ending.start()
    try:
        connection.request(
            method, place.path, body=body, headers={"Host": place.authority, "User-Agent": "llmjax", **headers}
        )
        answer = connection.getresponse()
        if 300 <= answer.status < 400:
            raise RefusedError(
                f"{place.host} answers {answer.status} and leads to {answer.headers.get('Location', 'nowhere')!r}: redirects are not followed"
            )
        kind = answer.headers.get_content_type()
        data = b""
        while piece := answer.read1(1 << 16):
            data += piece
            if len(data) > LENGTH:
                raise RefusedError(f"{place.host} answers more than {LENGTH:,} bytes")
            if time.monotonic() - began > seconds:
                raise TimeoutError(slow)
        if time.monotonic() - began > seconds:
            raise TimeoutError(slow)
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() - began > seconds:
            raise TimeoutError(slow) from error
        raise
    finally:
        ending.cancel()
        connection.close()
    if data and not kind.startswith(TEXTS) and not kind.endswith(("+json", "+xml")):
        raise RefusedError(f"{place.host} answers {kind}, which is no text")
    charset = answer.headers.get_content_charset("utf-8")
    try:
        return Answer(answer.status, kind, data.decode(charset, "replace"))
    except LookupError as error:
        raise RefusedError(f"{place.host} answers in the unknown character set {charset!r}") from error


def check_list(allowed: Sequence[str]) -> None:
    """Raise UserError for an entry of a list of hosts that is neither HOST nor HOST:PORT."""
    for one in allowed:
        port = one.rpartition(":")[2] if one.count(":") == 1 or "]:" in one else "0"
        if not one or not port.isdecimal() or set(one) & set("/*@ "):
            raise UserError(f"--allow-host {one}: give HOST or HOST:PORT, such as api.example.com or 127.0.0.1:8080")
