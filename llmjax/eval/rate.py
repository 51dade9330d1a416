"""People rate answers, on a page that only this machine can open or in the terminal.

Raters do not see which system gave an answer, and the order is random. A rating is saved at once.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2

from llmjax.errors import UserError
from llmjax.eval.ratings import Choice, Pair, Rating, append, pair_key, rate, read, shown_order, summary

BODY_LIMIT = 1 << 16
PAGE = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)


class Session:
    """The pairs to rate, and the file for the ratings."""

    def __init__(self, pairs: Sequence[Pair], path: Path, *, seed: int = 0) -> None:
        self.pairs, self.path, self.seed = list(pairs), path, seed
        self._by_key = {pair_key(pair): pair for pair in self.pairs}
        self._lock = threading.Lock()
        self._done = {(r.rater, r.key) for r in read(path)}

    def next_of(self, rater: str) -> tuple[int, Pair] | None:
        """How many pairs the rater has rated, and the next pair; None if none is left."""
        left = [pair for pair in self.pairs if not self.is_rated(rater, pair)]
        return (len(self.pairs) - len(left), left[0]) if left else None

    def is_rated(self, rater: str, pair: Pair) -> bool:
        """Whether the rater has rated the pair."""
        return (rater, pair_key(pair)) in self._done

    def order(self, pair: Pair, rater: str) -> tuple[int, int]:
        """The order in which the rater sees the answers."""
        return shown_order(pair, rater=rater, seed=self.seed)

    def save(self, rater: str, key: str, shown: str) -> Rating | None:
        """Save a choice: "0" or "1", the place of the answer, or "tie". None if the pair was rated before.

        Raises UserError for a pair or a choice that does not exist.
        """
        pair = self._by_key.get(key)
        if pair is None or shown not in ("0", "1", "tie") or not rater.strip():
            raise UserError("there is no such pair, choice or rater")
        order = self.order(pair, rater)
        choice: Choice = "tie" if shown == "tie" else order[int(shown)]
        with self._lock:
            if (rater, key) in self._done:
                return None
            rating = rate(pair, rater=rater, choice=choice, order=order)
            append(self.path, rating)
            self._done.add((rater, key))
        return rating


def page(session: Session, rater: str) -> str:
    """The page for a rater: the next pair, without the names of the systems."""
    known = {"rater": rater, "count": len(session.pairs)}
    found = session.next_of(rater) if rater else None
    if found is None:
        return PAGE.get_template("rate.html").render(known, pair=None)
    done, pair = found
    first, second = (pair.answers[i] for i in session.order(pair, rater))
    shown = {"pair": pair, "key": pair_key(pair), "first": first, "second": second, "done": done}
    return PAGE.get_template("rate.html").render(known, **shown)


def make_server(session: Session, *, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1. With port 0 it takes a free one (`server.server_address`)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._from_here() or urlsplit(self.path).path != "/":
                return self._send(HTTPStatus.NOT_FOUND, "there is only one page")
            rater = parse_qs(urlsplit(self.path).query).get("rater", [""])[0].strip()
            self._send(HTTPStatus.OK, page(session, rater))

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if not self._from_here() or size > BODY_LIMIT:
                return self._send(HTTPStatus.BAD_REQUEST, "no")
            fields = {
                name: values[0] for name, values in parse_qs(self.rfile.read(size).decode("utf-8", "replace")).items()
            }
            rater = fields.get("rater", "").strip()
            try:
                session.save(rater, fields.get("pair", ""), fields.get("shown", ""))
            except UserError as error:
                return self._send(HTTPStatus.BAD_REQUEST, str(error))
            self._send(HTTPStatus.OK, page(session, rater))

        def _from_here(self) -> bool:
            """Whether the page itself sent the request, not another site through the browser (DNS rebinding, forms)."""
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}  # type: ignore[attr-defined]
            return host in own and (origin is None or origin.removeprefix("http://") in own)

        def _send(self, status: HTTPStatus, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8" if status == HTTPStatus.OK else "text/plain")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header(
                "Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
            )
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing, because the terminal belongs to the user."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(session: Session, *, port: int = 0, say: Callable[[str], None] = print) -> None:
    """Serve the page until an interrupt, then print a summary of the ratings."""
    with make_server(session, port=port) as server:
        say(f"rate at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends); ratings go to {session.path}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    say(summary(read(session.path)))


def in_terminal(
    session: Session, *, rater: str, ask: Callable[[str], str] | None = None, say: Callable[[str], None] = print
) -> None:
    """Rate in the terminal until all pairs are rated, the input ends or the rater types q."""
    while (found := session.next_of(rater)) is not None:
        done, pair = found
        first, second = (pair.answers[i] for i in session.order(pair, rater))
        say(
            f"\n[{done + 1} of {len(session.pairs)}]\n{pair.prompt}\n\n--- answer 1\n{first}\n\n--- answer 2\n{second}\n"
        )
        try:
            said = (ask or input)("better: 1, 2, or 3 for equally good; q ends: ").strip().lower()
        except EOFError:
            break
        if said == "q":
            break
        shown = {"1": "0", "2": "1", "3": "tie"}.get(said)
        if shown is not None:
            session.save(rater, pair_key(pair), shown)
    say(summary(read(session.path)))
