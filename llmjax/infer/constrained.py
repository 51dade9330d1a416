"""Texts of a given form: a JSON schema, a regular expression or a grammar says which tokens may come next.

llguidance (an Earley parser over the bytes that tokens stand for) keeps the state of each text and answers with a bit
for every token; the engine adds -inf to the others. A text is over when nothing more fits, or the model ends it where
it may. Whatever the model, an answer that was not cut by its length limit is valid.

Some forms take seconds and much memory (`(a{1000}){1000}`), so all of this happens in threads beside the engine's, with
limits of time and size; a form that reaches them ends its own request and no other.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError

SECONDS = 10.0  # that a form, or the next token of a text, may take
THREADS = 2
KEPT = 16  # compiled forms that are kept for other requests
# llguidance's own limits, below its defaults: a state of the lexer takes about 2 kB.
LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "max_grammar_size": 200_000}


@dataclass(frozen=True)
class Matcher:
    """Where one text is in its form."""

    kind: str  # of the form, see `request.FORMS`
    state: Any  # llguidance.LLMatcher
    words_W: np.ndarray  # uint32, the bit of each token that may come next, the lowest of a word first
    over: bool  # nothing may come next

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        return bool(self.words_W[token // 32] >> np.uint32(token % 32) & np.uint32(1))


class Job:
    """What a thread finds out: where a text is in its form."""

    def __init__(self, pool: ThreadPoolExecutor, find: Callable[["Job"], Matcher]) -> None:
        self.began = 0.0  # when the time that it may take began
        self.future: Future[Matcher] = pool.submit(self._run, find)

    def _run(self, find: Callable[["Job"], Matcher]) -> Matcher:
        try:
            return find(self)
        except UserError:
            raise
        except BaseException as error:  # a panic of llguidance is no Exception
            raise UserError(f"llguidance fails at the form: {type(error).__name__}: {error}") from error

    def result(self) -> Matcher | None:
        """The matcher; None while it is not there. UserError for a form that cannot be used or takes too long."""
        if self.future.done():
            return self.future.result()
        if self.began and time.monotonic() - self.began > SECONDS:
            raise UserError(f"the form takes more than {SECONDS:.0f} s: make it simpler")
        return None


class Forms:
    """Compiles forms for a tokenizer, and follows texts through them. Its methods return at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._words = -(-vocab_size // 32)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def start(self, form: tuple[str, str]) -> Job:
        """A text of this form (see `Request.form`) before its first token."""
        return self._job(lambda job: self._start(job, form))

    def follow(self, matcher: Matcher, token: int) -> Job:
        """The text after one more token. The matcher must not be used again."""
        return self._job(lambda job: self._follow(job, matcher, token))

    def _job(self, find: Callable[[Job], Matcher]) -> Job:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="forms")
        return Job(self._pool, find)

    def _start(self, job: Job, form: tuple[str, str]) -> Matcher:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary(self._tokenizer, self._vocab_size)
            state = self._compiled.get(form)
        job.began = time.monotonic()
        if state is None:
            state = compiled(self._vocabulary, *form)
            self._found(form[0], state)  # what the lexer learns of it is kept for the copies
            with self._lock:
                self._compiled[form] = state
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return self._found(form[0], state.deep_copy())

    def _follow(self, job: Job, matcher: Matcher, token: int) -> Matcher:
        job.began = time.monotonic()
        matcher.state.consume_token(token)
        return self._found(matcher.kind, matcher.state)

    def _found(self, kind: str, state: Any) -> Matcher:
        words_W = np.zeros(self._words, np.uint32)
        over = bool(state.is_stopped())
        if not over:
            bits = np.frombuffer(state.compute_bitmask(), np.uint32)[: self._words]
            words_W[: len(bits)] = bits
        if state.is_error():
            raise UserError(f"the {kind} cannot go on: {_first_line(state.get_error())}")
        return Matcher(kind, state, words_W, over)


def compiled(vocabulary: Any, kind: str, form: str) -> Any:
    """An llguidance matcher before the first token; `kind` is one of `request.FORMS`.

    Raises UserError for a form that llguidance cannot read, with what it says.
    """
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        try:
            # Compact, and oneOf as anyOf: what pydantic writes for unions has alternatives that exclude each other.
            defaults: Any = {"whitespace_flexible": False, "coerce_one_of": True}
            grammar = LLMatcher.grammar_from_json_schema(json.loads(form), defaults=defaults)
        except (ValueError, RecursionError) as error:
            raise UserError(f"this is no JSON schema: {error}") from error
    else:
        grammar = (LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark)(form)
    limits = LLParserLimits(**LIMITS)
    if message := LLMatcher.validate_grammar(grammar, vocabulary, limits=limits):
        raise UserError(f"the {kind} cannot be used as a form: {_first_line(message)}")
    state = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if state.is_error():
        raise UserError(f"the {kind} cannot be used as a form: {_first_line(state.get_error())}")
    return state


def vocabulary(tokenizer: Tokenizer, vocab_size: int = 0) -> Any:
    """The tokenizer as llguidance reads it; made once for a tokenizer, it takes a while for large ones.

    Raises UserError when llguidance is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise UserError("texts of a given form need llguidance: pip install 'llmjax[infer]'") from error
    end, count = tokenizer.end_id, max(tokenizer.vocab_size, vocab_size)
    pieces = [*tokenizer.piece_bytes, *[b""] * (count - len(tokenizer.piece_bytes))]
    special = set(tokenizer.special_ids.values()) | {i for i, piece in enumerate(pieces) if not piece}

    class Pieces:
        eos_token_id = end
        bos_token_id = tokenizer.bos_id
        special_token_ids = sorted(special)
        # 0xFF begins no text: so llguidance tells a special token from a text that looks like it.
        tokens = tuple(b"\xff<%d>" % i if i in special else piece for i, piece in enumerate(pieces))

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode("utf-8", "replace"))

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Pieces()), n_vocab=count, eos_token=end)


def _first_line(message: str) -> str:
    return message.strip().split("\n<state>", 1)[0].strip()
