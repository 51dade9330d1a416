"""People rate answers: a page served to this machine alone, or the terminal. Blind, in random order, saved at once."""

import contextlib
import html
import json
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from llmjax.errors import UserError
from llmjax.eval.ratings import Choice, Pair, Rating, append, pair_key, rate, read, shown_order, summary

BODY_LIMIT = 1 << 16
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Which answer is better?</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; border: 1px solid #999; border-radius: .4rem; padding: .8rem; margin: 0; }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1rem 0; }}
button {{ font: inherit; padding: .5rem 1rem; }}
</style>
{body}
<script>
addEventListener("keydown", event => {{
  const name = {{1: "first", 2: "second", 3: "tie"}}[event.key];
  if (name && event.target.tagName != "INPUT") document.getElementById(name)?.click();
}});
</script>
</html>"""
NAME_FORM = '<h1>Which answer is better?</h1><form method="get" action="/"><label>Your name: <input name="rater" required maxlength="100"></label> <button>Begin</button></form>'
DONE = "<h1>Done</h1><p>{rater} has rated all {count} pairs. Thank you.</p>"
FORM = """<p>{rater}: {number} of {count}</p><h2>Request</h2><pre>{prompt}</pre>
<div class="two"><section><h2>Answer 1</h2><pre>{first}</pre></section><section><h2>Answer 2</h2><pre>{second}</pre></section></div>
<form method="post" action="/"><input type="hidden" name="rater" value="{rater}"><input type="hidden" name="pair" value="{key}">
<button id="first" name="shown" value="0">1 is better</button> <button id="tie" name="shown" value="tie">3: equally good</button>
<button id="second" name="shown" value="1">2 is better</button></form>"""


class Session:
    """The pairs to rate and the file that ratings go to."""

    def __init__(self, pairs: Sequence[Pair], path: Path, *, seed: int = 0) -> None:
        self.pairs, self.path, self.seed = list(pairs), path, seed
        self._by_key = {pair_key(pair): pair for pair in self.pairs}
        self._lock = threading.Lock()
        self._done = {(r.rater, r.key) for r in read(path)}

    def next_of(self, rater: str) -> tuple[int, Pair] | None:
        """How many pairs the rater has rated, and the next one; None when there is none left."""
        left = [pair for pair in self.pairs if not self.is_rated(rater, pair)]
        return (len(self.pairs) - len(left), left[0]) if left else None

    def is_rated(self, rater: str, pair: Pair) -> bool:
        """Whether the rater has rated the pair."""
        return (rater, pair_key(pair)) in self._done

    def order(self, pair: Pair, rater: str) -> tuple[int, int]:
        """Which answer the rater sees first."""
        return shown_order(pair, rater=rater, seed=self.seed)

    def save(self, rater: str, key: str, shown: str) -> Rating | None:
        """Save that the answer shown in this place ("0", "1") or "tie" was chosen; None if that pair was rated before.

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
    """The page that a rater sees: the next pair, without the systems' names."""
    if not rater:
        return PAGE.format(body=NAME_FORM)
    found = session.next_of(rater)
    if found is None:
        return PAGE.format(body=DONE.format(rater=html.escape(rater), count=len(session.pairs)))
    done, pair = found
    first, second = (pair.answers[i] for i in session.order(pair, rater))
    shown = {"prompt": pair.prompt, "first": first, "second": second, "rater": rater, "key": pair_key(pair)}
    escaped = {name: html.escape(text) for name, text in shown.items()}
    return PAGE.format(body=FORM.format(number=done + 1, count=len(session.pairs), **escaped))


def make_server(session: Session, *, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0: any that is free (`server.server_address`)."""

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
            """Pages of other sites may not use the visitor's browser to rate (DNS rebinding, cross-site forms)."""
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
            """Say nothing: the terminal is the user's."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(session: Session, *, port: int = 0, say: Callable[[str], None] = print) -> None:
    """Serve the page until it is interrupted; then what the ratings say."""
    with make_server(session, port=port) as server:
        say(f"rate at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends); ratings go to {session.path}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    say(summary(read(session.path)))


def in_terminal(
    session: Session, *, rater: str, ask: Callable[[str], str] | None = None, say: Callable[[str], None] = print
) -> None:
    """Rate in the terminal until all is rated, the input ends or the rater says q."""
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


def dump_pairs(pairs: Sequence[Pair]) -> str:
    """Pairs as the JSON Lines that `read_pairs` reads."""
    rows = [{"prompt": p.prompt, "answers": p.answers, "systems": p.systems} for p in pairs]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
