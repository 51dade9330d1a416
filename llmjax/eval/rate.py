"""People rate answers, on a page that only this machine can open or in the terminal.

Raters do not see which system gave an answer, and the order is random. A rating is saved at once.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2

from llmjax.errors import UserError
from llmjax.eval.ratings import (
    BEST,
    WORST,
    Choice,
    Pair,
    Ranking,
    Rating,
    append,
    pair_key,
    rank,
    rate,
    read,
    shown_order,
    summary,
)

BODY_LIMIT = 1 << 16
PAGE = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)


class Session:
    """The pairs to rate, or the answers to rank, and the file for the ratings.

    With `scales`, or with more than two answers, ratings are rankings and have scores.
    """

    def __init__(self, pairs: Sequence[Pair], path: Path, *, seed: int = 0, scales: Sequence[str] = ()) -> None:
        self.pairs, self.path, self.seed, self.scales = list(pairs), path, seed, tuple(scales)
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

    def ranks(self, pair: Pair) -> bool:
        """Whether the answers are ranked, rather than that one is chosen."""
        return bool(self.scales) or len(pair.answers) > 2

    def order(self, pair: Pair, rater: str) -> tuple[int, ...]:
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

    def save_ranking(
        self, rater: str, key: str, ranks: Sequence[int], scores: Mapping[str, Sequence[int | None]]
    ) -> Ranking | None:
        """Save ranks and scores, which are in the order in which the answers were shown. None if they were rated before.

        Raises UserError for answers, ranks or scores that cannot be.
        """
        pair = self._by_key.get(key)
        if pair is None or not self.ranks(pair) or not rater.strip():
            raise UserError("there are no such answers, or no rater")
        order = self.order(pair, rater)
        if any(len(given) != len(order) for given in (ranks, *scores.values())):
            raise UserError(f"give a rank, and of each scale a score or nothing, for each of the {len(order)} answers")
        places = [order.index(i) for i in range(len(order))]  # of each answer, where it was shown
        turned = {name: [given[place] for place in places] for name, given in scores.items()}
        made = rank(pair, rater=rater, ranks=[ranks[place] for place in places], scores=turned, order=order)
        with self._lock:
            if (rater, key) in self._done:
                return None
            append(self.path, made)
            self._done.add((rater, key))
        return made


def _ranking_of(session: Session, fields: Mapping[str, str]) -> tuple[list[int], dict[str, list[int | None]]]:
    """Ranks and scores of a form, whose fields are rank-I and SCALE-I by the place I. Raises UserError for what is no number."""
    count = max(
        (int(name.removeprefix("rank-")) + 1 for name in fields if re.fullmatch(r"rank-\d{1,3}", name)), default=0
    )
    try:
        ranks = [int(fields[f"rank-{i}"]) for i in range(count)]
        scores = {
            scale: [int(said) if (said := fields.get(f"{scale}-{i}", "")) else None for i in range(count)]
            for scale in session.scales
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"the form lacks a number ({error})") from error
    return ranks, scores


def page(session: Session, rater: str) -> str:
    """The page for a rater: the next pair, without the names of the systems."""
    known = {"rater": rater, "count": len(session.pairs)}
    found = session.next_of(rater) if rater else None
    if found is None:
        return PAGE.get_template("rate.html").render(known, pair=None)
    done, pair = found
    answers = [pair.answers[i] for i in session.order(pair, rater)]
    shown = {"pair": pair, "key": pair_key(pair), "answers": answers, "done": done}
    told = {"ranks": session.ranks(pair), "scales": session.scales, "best": BEST}
    return PAGE.get_template("rate.html").render(known, **shown, **told)


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
            key = fields.get("pair", "")
            try:
                if "rank-0" in fields:
                    session.save_ranking(rater, key, *_ranking_of(session, fields))
                else:
                    session.save(rater, key, fields.get("shown", ""))
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
        texts = [f"--- answer {n}\n{pair.answers[i]}\n" for n, i in enumerate(session.order(pair, rater), start=1)]
        say("\n".join([f"\n[{done + 1} of {len(session.pairs)}]\n{pair.prompt}\n", *texts]))
        try:
            if session.ranks(pair):
                if not _rank_in_terminal(session, pair, rater, ask or input, say):
                    break
                continue
            said = (ask or input)("better: 1, 2, or 3 for equally good; q ends: ").strip().lower()
        except EOFError:
            break
        if said == "q":
            break
        shown = {"1": "0", "2": "1", "3": "tie"}.get(said)
        if shown is not None:
            session.save(rater, pair_key(pair), shown)
    say(summary(read(session.path)))


def _rank_in_terminal(
    session: Session, pair: Pair, rater: str, ask: Callable[[str], str], say: Callable[[str], None]
) -> bool:
    """Ask for ranks and scores of the answers as they were shown; False when the rater ends."""
    count = len(pair.answers)

    def numbers(question: str, missing: str = "") -> list[int | None] | None:
        said = ask(question).strip().lower()
        return None if said == "q" else [None if one == missing else int(one) for one in said.split()]

    try:
        ranks = numbers(
            f"ranks of answers 1 to {count}, 1 the best, such as {' '.join(map(str, range(1, count + 1)))}; q ends: "
        )
        scores: dict[str, list[int | None]] = {}
        for scale in session.scales if ranks is not None else ():
            given = numbers(f"{scale} of answers 1 to {count}, {WORST} to {BEST}, or -: ", "-")
            if given is None:
                return False
            scores[scale] = given
        if ranks is None:
            return False
        session.save_ranking(rater, pair_key(pair), [one or 0 for one in ranks], scores)
    except (ValueError, UserError) as error:
        say(f"{error}; again")
    return True
