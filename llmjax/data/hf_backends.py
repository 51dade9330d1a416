"""Encoding and decoding of imported tokenizers: by the `tokenizers` package, or by SentencePiece with added tokens.

There are two kinds of added tokens. Text becomes a control token only where the caller says so. The others, runs of
spaces or whole words, are found in every text, as in the libraries of their models.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sentencepiece

from llmjax.data.tokenizer import Segment, any_of, encode_between
from llmjax.errors import UserError

NEVER = -1e6  # the score of a Unigram piece that no text may give


@dataclass(frozen=True)
class Added:
    """A token that was added to a vocabulary."""

    content: str
    id: int
    special: bool = True
    control: bool = True  # special, or a mark of chats
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # and behind it
    single_word: bool = False
    normalized: bool = False


class JsonBackend:
    """`tokenizers`' Tokenizer of one tokenizer.json, in which control tokens are mere text unless they are asked for."""

    def __init__(
        self,
        file: str,
        description: Mapping[str, Any],
        added: Iterable[Added],
        *,
        piece_bytes: Sequence[bytes] | None = None,
    ) -> None:
        """
        Args:
            file, description: the tokenizer.json, and what it says.
            added: its added tokens, and what else is to be a control token.
            piece_bytes: the bytes of every id, if a text is nothing but these joined (byte-level BPE).
        """
        self._file, self._piece_bytes = file, piece_bytes
        self._controls = [token for token in added if token.control]
        self._special_ids = {token.id for token in self._controls if token.special}
        plain = _without_pieces(description, {token.content for token in self._controls})
        self._plain = _build(file if plain is description else json.dumps(plain))
        # Marks that the file does not flag become special, and special tokens are then mere text.
        self._plain.add_special_tokens([token.content for token in self._controls if not token.special])
        self._plain.encode_special_tokens = True
        model = description["model"]
        unknown = model.get("unk_id", self._plain.token_to_id(model.get("unk_token") or ""))
        self._never = {token.id: token.content for token in self._controls if token.id != unknown}

    @cached_property
    def _parsing(self) -> Any:
        """The tokenizer as it is in the file, made when first needed: it takes as much memory again."""
        return _build(self._file)

    @cached_property
    def _stand_ins(self) -> tuple[dict[str, str], dict[int, int]]:
        """What is written for each control token to be encoded as such, and the ids of the real ones by the stand-ins'.

        The stand-ins are added tokens with the same flags, so that the text around them is normalised and cut as
        around the real ones. Nobody can write one: they are drawn anew in every process.
        """
        import tokenizers

        drawn = secrets.token_hex(8)
        written = {token.content: f"<{drawn}-{number}>" for number, token in enumerate(self._controls)}
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        self._plain.add_tokens(
            [
                tokenizers.AddedToken(written[token.content], special=False, **{f: getattr(token, f) for f in flags})
                for token in self._controls
            ]
        )
        return written, {self._plain.token_to_id(written[token.content]): token.id for token in self._controls}

    def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
        tokenizer = self._parsing if parse else self._plain
        if threads == 1:
            return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [row.ids for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        written, ids = self._stand_ins
        text = "".join(written[segment.text] if segment.control else segment.text for segment in segments)
        found = self._plain.encode(text, add_special_tokens=False).ids
        if slipped := self._never.keys() & set(found):
            raise UserError(
                f"the tokenizer makes its control token {self._never[min(slipped)]!r} of plain text: take the words "
                "out of the message that it is written in"
            )
        return [ids.get(i, i) for i in found]

    def decode(self, ids: Sequence[int]) -> str:
        if self._piece_bytes is not None:
            return b"".join(self._piece_bytes[i] for i in ids).decode("utf-8", "replace")
        return self._plain.decode([i for i in map(int, ids) if i not in self._special_ids], skip_special_tokens=False)

    def template_around(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's own template puts before and after a text."""
        bare = self._plain.encode(text, add_special_tokens=False).ids
        whole = self._plain.encode(text, add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start]), tuple(whole[start + len(bare) :])
        return (), ()

    def id_of(self, token: str) -> int | None:
        """The id of a token in the file's own vocabulary."""
        return self._plain.token_to_id(token)


class PiecesBackend:
    """A SentencePiece model that may normalise, with tokens added to it (T5's <extra_id_0> ...)."""

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, added: Iterable[Added], *, space_behind: bool = True
    ) -> None:
        """`space_behind`: the space that the model puts before a text comes behind an added token too."""
        self._space_behind = space_behind
        self._processor, self._added = processor, {token.content: token for token in added}
        self._all = any_of(self._added)
        self._words = any_of(token.content for token in self._added.values() if not token.control)
        self._ids = {token.content: token.id for token in self._added.values()}
        self._texts = {token.id: "" if token.special else token.content for token in self._added.values()}

    def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
        pattern = self._all if parse else self._words
        if not any(pattern.search(text) for text in texts):
            return self._processor.encode(list(texts), num_threads=threads)
        return [self._encode_split(text, pattern) for text in texts]

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        split = [[one] if one.control else self._split(one.text, self._words) for one in segments]
        return self._encode_parts([part for parts in split for part in parts])

    def _split(self, text: str, pattern: Any) -> list[Segment]:
        parts = enumerate(pattern.split(text))
        return [Segment(part, control=i % 2 == 1, generated=False) for i, part in parts if part]

    def _encode_split(self, text: str, pattern: Any) -> list[int]:
        return self._encode_parts(self._split(text, pattern))

    def _encode_parts(self, parts: list[Segment]) -> list[int]:
        """The ids of texts and tokens; tokens that say so take the white space beside them."""
        stripped = list(parts)
        for i, part in enumerate(parts):
            if i and part.control and self._added[part.text].lstrip and not stripped[i - 1].control:
                stripped[i - 1] = stripped[i - 1]._replace(text=stripped[i - 1].text.rstrip())
            if i and not part.control and parts[i - 1].control and self._added[parts[i - 1].text].rstrip:
                stripped[i] = stripped[i]._replace(text=stripped[i].text.lstrip())
        at_start = bool(stripped) and not stripped[0].control

        def encode(text: str) -> list[int]:
            nonlocal at_start
            spaced, at_start = at_start or self._space_behind, False
            return self._processor.encode(text) if spaced else self._continued(text)

        return encode_between(stripped, self._ids, encode)

    def _continued(self, text: str) -> list[int]:
        """The ids of a text that has no space put before it, because it stands behind a line feed."""
        feed, ids = self._processor.encode("\n"), self._processor.encode(f"\n{text}")
        return ids[len(feed) :] if ids[: len(feed)] == feed else self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        size = self._processor.vocab_size()
        texts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i in self._texts:
                if self._texts[i]:
                    texts += [self._processor.decode(run), self._texts[i]]
                    run = []
            elif i < size:
                run.append(i)
        return "".join([*texts, self._processor.decode(run)])


def _build(file: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("reading it needs the package `tokenizers`: pip install 'llmjax[hf]'") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file)
    except Exception as error:  # the package raises nothing more exact
        raise UserError(f"the `tokenizers` package does not understand it ({error}); a newer one may") from error
    # Some files carry what they were last used with (MiniLM's pads to 128).
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _without_pieces(description: Mapping[str, Any], controls: set[str]) -> Mapping[str, Any]:
    """The same tokenizer, whose model never puts a control token together out of text.

    The vocabularies of converted SentencePiece models hold control tokens as pieces, which Unigram would choose and BPE
    would merge when a text has their characters.
    """
    model = description["model"]
    if model.get("type") == "Unigram" or isinstance(model["vocab"], list):
        unknown = model.get("unk_id")
        vocabulary = [
            [piece, NEVER if piece in controls and i != unknown else score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]
        return {**description, "model": {**model, "vocab": vocabulary}}
    if merges := model.get("merges"):
        kept = [pair for pair in merges if _joined(pair) not in controls]
        if len(kept) == len(merges):
            return description
        return {**description, "model": {**model, "merges": kept}}
    return description


def _joined(pair: str | Sequence[str]) -> str:
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)
