"""Constrained decoding: a JSON schema, a regular expression or a grammar allows only some tokens at each step.

llguidance, an Earley parser over the bytes of tokens, keeps the state of each text and gives a bit for every token. The
engine adds -inf to the logits of the others. A text ends when nothing more fits, or when the model ends it where the
constraint permits. With any model, an answer that is not cut by its length limit is valid.

Some constraints take seconds and much memory (`(a{1000}){1000}`). They are handled in threads beside the engine's, with
limits of time and size. A constraint that reaches a limit ends its own request only.
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

SECONDS = 10.0  # the most time for a constraint, or for the next token of a text
THREADS = 2
KEPT = 16  # compiled constraints that are kept for other requests
# Limits of llguidance, below its defaults. A state of the lexer takes about 2 kB.
LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "max_grammar_size": 200_000}

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")  # of llguidance
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # names -> schemas
VALUES = ("const", "enum", "default", "example", "examples")  # which hold no schemas


@dataclass(frozen=True)
class Matcher:
    """The state of one text in its constraint."""

    kind: str  # one of `request.CONSTRAINTS`
    state: Any  # llguidance.LLMatcher
    words_W: np.ndarray  # uint32, one bit for each token, set if it may come next, the lowest bit of a word first
    over: bool  # whether nothing may come next

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        return bool(self.words_W[token // 32] >> np.uint32(token % 32) & np.uint32(1))


class Job:
    """The work of a thread: it finds the next state of a text."""

    def __init__(self, pool: ThreadPoolExecutor, find: Callable[["Job"], Matcher]) -> None:
        self.began = 0.0  # start of its time limit
        self.future: Future[Matcher] = pool.submit(self._run, find)

    def _run(self, find: Callable[["Job"], Matcher]) -> Matcher:
        try:
            return find(self)
        except UserError:
            raise
        except BaseException as error:  # a panic of llguidance is not an Exception
            raise UserError(f"llguidance fails at the constraint: {type(error).__name__}: {error}") from error

    def result(self) -> Matcher | None:
        """The matcher, or None while the thread works. Raises UserError for a constraint that is wrong or takes too long."""
        if self.future.done():
            return self.future.result()
        if self.began and time.monotonic() - self.began > SECONDS:
            raise UserError(f"the constraint takes more than {SECONDS:.0f} s: make it simpler")
        return None


class Constraints:
    """Compiles constraints for a tokenizer, and follows texts through them. Its methods return at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._words = -(-vocab_size // 32)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def start(self, constraint: tuple[str, str]) -> Job:
        """The job for a text before its first token; see `Request.constraint`."""
        return self._job(lambda job: self._start(job, constraint))

    def follow(self, matcher: Matcher, token: int) -> Job:
        """The job for the text after one more token. The matcher must not be used again."""
        return self._job(lambda job: self._follow(job, matcher, token))

    def _job(self, find: Callable[[Job], Matcher]) -> Job:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="constraints")
        return Job(self._pool, find)

    def _start(self, job: Job, constraint: tuple[str, str]) -> Matcher:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary(self._tokenizer, self._vocab_size)
            state = self._compiled.get(constraint)
        job.began = time.monotonic()
        if state is None:
            state = compiled(self._vocabulary, *constraint)
            self._found(constraint[0], state)  # fills the tables of the lexer, which copies share
            with self._lock:
                self._compiled[constraint] = state
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return self._found(constraint[0], state.deep_copy())

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


def compiled(vocabulary: Any, kind: str, constraint: str) -> Any:
    """An llguidance matcher before the first token; `kind` is one of `request.CONSTRAINTS`.

    Raises UserError with the message of llguidance for a constraint that it cannot read.
    """
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        try:
            # Compact. oneOf is read as anyOf: pydantic writes it for unions, whose alternatives exclude each other.
            defaults: Any = {"whitespace_flexible": False, "coerce_one_of": True}
            schema = of_known_formats(json.loads(constraint))
            grammar = LLMatcher.grammar_from_json_schema({} if schema is True else schema, defaults=defaults)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the json_schema is no JSON schema: {error}") from error
    else:
        grammar = (LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark)(constraint)
    limits = LLParserLimits(**LIMITS)
    if message := LLMatcher.validate_grammar(grammar, vocabulary, limits=limits):
        raise UserError(f"the {kind} cannot be used: {_first_line(message)}")
    state = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if state.is_error():
        raise UserError(f"the {kind} cannot be used: {_first_line(state.get_error())}")
    return state


def of_known_formats(schema: Any) -> Any:
    """The JSON schema without formats that llguidance does not know, such as OpenAPI's `password`.

    Formats that are not known say nothing about a value (JSON Schema 2020-12, validation, section 7.2.3).
    """
    if isinstance(schema, list):
        return [of_known_formats(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in BY_NAME and isinstance(value, dict):
            kept[key] = {name: of_known_formats(one) for name, one in value.items()}
        elif key in VALUES:
            kept[key] = value
        elif key != "format" or value in FORMATS:
            kept[key] = of_known_formats(value)
    return kept


def vocabulary(tokenizer: Tokenizer, vocab_size: int = 0) -> Any:
    """The tokenizer as llguidance reads it. Large ones take a while.

    Raises UserError when llguidance is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise UserError("constrained decoding needs llguidance: pip install 'llmjax[infer]'") from error
    end, count = tokenizer.end_id, max(tokenizer.vocab_size, vocab_size)
    pieces = [*tokenizer.piece_bytes, *[b""] * (count - len(tokenizer.piece_bytes))]
    special = set(tokenizer.special_ids.values()) | {i for i, piece in enumerate(pieces) if not piece}

    class Pieces:
        eos_token_id = end
        bos_token_id = tokenizer.bos_id
        special_token_ids = sorted(special)
        # No text has the byte 0xFF, so llguidance can tell a special token from text that looks like it.
        tokens = tuple(b"\xff<%d>" % i if i in special else piece for i, piece in enumerate(pieces))

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode("utf-8", "replace"))

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Pieces()), n_vocab=count, eos_token=end)


def literal(text: str) -> str:
    """The text as a string of Lark's notation, which is that of JSON but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _first_line(message: str) -> str:
    return message.strip().split("\n<state>", 1)[0].strip()
