"""Texts of a given form: a JSON schema, a regular expression or a grammar says which tokens may come next.

llguidance (an Earley parser over the bytes that tokens stand for) keeps the state of each text and answers with a bit
for every token; the engine adds -inf to the others. A text is over when nothing more fits, or the model ends it where
it may. Whatever the model, an answer that was not cut by its length limit is valid.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError

KINDS = ("json", "regex", "grammar")


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


@dataclass(frozen=True)
class Constraint:
    """A form that a text must have, compiled for a vocabulary; one may be used by many requests."""

    vocabulary: Any
    grammar: str

    def start(self) -> "Matcher":
        """The state of a text of this form before its first token."""
        import llguidance

        return Matcher(llguidance.LLMatcher(self.vocabulary, self.grammar, log_level=0))


def constraint(vocabulary: Any, **form: Any) -> Constraint:
    """A constraint from one of json (a schema, as a dict or text), regex or grammar (Lark's notation).

    Raises UserError for a form that llguidance cannot read, with what it says.
    """
    from llguidance import LLMatcher

    if len(form) != 1 or next(iter(form)) not in KINDS:
        raise UserError(f"give one of {', '.join(KINDS)}, not {', '.join(form) or 'nothing'}")
    kind, value = next(iter(form.items()))
    if kind == "json":
        try:
            schema = json.loads(value) if isinstance(value, str) else value
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        except ValueError as error:
            raise UserError(f"this is no JSON schema: {error}") from error
    else:
        grammar = (LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark)(value)
    if message := LLMatcher.validate_grammar(grammar, vocabulary):
        raise UserError(f"the {kind} cannot be used as a form: {message}")
    return Constraint(vocabulary, grammar)


@dataclass
class Matcher:
    """Where one text is in its form."""

    state: Any

    def words(self, count: int) -> np.ndarray:
        """uint32 (count,): the bit of each token that may come next."""
        bits = np.frombuffer(self.state.compute_bitmask(), np.uint32)
        self._check()
        words = np.zeros(count, np.uint32)
        words[: len(bits)] = bits[:count]
        return words

    def add(self, token: int) -> bool:
        """Go on by a token: whether the text is over."""
        self.state.consume_token(token)
        self._check()
        return bool(self.state.is_stopped())

    def _check(self) -> None:
        if self.state.is_error():
            raise RuntimeError(f"llguidance cannot go on with a text: {self.state.get_error()}")
