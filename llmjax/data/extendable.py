"""The files of tokenizers that can be extended: their pieces, what two pieces are together, and the file with more of them."""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmjax.data import hf_tokenizer
from llmjax.data.hf_backends import NEVER
from llmjax.data.tokenizer import SPACE_SIGN, Tokenizer
from llmjax.errors import UserError

NORMAL, USER_DEFINED = 1, 4  # kinds of pieces of SentencePiece
UNIGRAM, BPE = 1, 2  # and of its models
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


@dataclass
class Learnt:
    """Tokens that were learnt."""

    merges: list[tuple[int, int, int]] = field(default_factory=list)  # left id, right id, the id of both together
    counts: list[int] = field(default_factory=list)  # how often each new token was made
    total: int = 0  # tokens of the text


class Extendable(Protocol):
    """The pieces of a tokenizer's file."""

    names: dict[int, str]  # what the file calls each id
    alone: set[int]  # ids that are joined with nothing: special ones, marks, bytes that stand for what has no piece

    def joined(self, left: str, right: str) -> str:
        """What two pieces are called together; "" where the tokenizer never joins them."""

    def model(self, named: Sequence[str], learnt: Learnt, parts: Sequence[Sequence[int]]) -> bytes:
        """The file with more tokens: those that are named, then those learnt, which stand for the old ids `parts`."""


def open_pieces(base: Tokenizer) -> Extendable:
    """The pieces of a tokenizer. Raises UserError for a kind that cannot be extended."""
    if base.kind == "sentencepiece":
        pieces = _SentencePiece(base)
        if pieces.kind in (UNIGRAM, BPE):
            return pieces
        told = "a char tokenizer joins no characters"
    elif base.kind == "huggingface" and base.name.endswith(".json"):
        found = _Json(base)
        if found.kind in ("BPE", "Unigram", "WordPiece"):
            return found
        told = f"the model of its tokenizer.json is {found.kind}"
    elif base.kind == "huggingface":
        told = (
            f"{base.name} is the SentencePiece model of an imported tokenizer: import the model with its tokenizer.json"
        )
    else:
        told = f"a tokenizer of kind {base.kind} has no pieces to join"
    raise UserError(
        f"no tokens can be added to this tokenizer ({told}): leave tokenizer.add_tokens and tokenizer.add_learnt at their "
        "defaults"
    )


def _scores(learnt: Learnt, parts: Sequence[Sequence[int]], old: Sequence[float]) -> list[float]:
    """Unigram scores of new tokens: the logarithm of their share, or a little more than that of their parts."""
    return [
        max(math.log(count / learnt.total), 0.999 * sum(old[i] for i in ids))
        for count, ids in zip(learnt.counts, parts, strict=True)
    ]


class _SentencePiece:
    """A model that was trained here. In BPE the scores are the order of the merges, so new pieces come last."""

    def __init__(self, base: Tokenizer) -> None:
        from sentencepiece import sentencepiece_model_pb2 as proto

        assert base.processor is not None
        self._proto: Any = proto.ModelProto.FromString(base.model)  # type: ignore[attr-defined]
        self.kind: int = self._proto.trainer_spec.model_type
        self.names: dict[int, str] = {i: piece.piece for i, piece in enumerate(self._proto.pieces)}
        self.alone: set[int] = {i for i, piece in enumerate(self._proto.pieces) if piece.type != NORMAL}

    def joined(self, left: str, right: str) -> str:
        return left + right

    def model(self, named: Sequence[str], learnt: Learnt, parts: Sequence[Sequence[int]]) -> bytes:
        made = copy.deepcopy(self._proto)
        old = [piece.score for piece in made.pieces]
        names = dict(self.names)
        for text in named:
            made.pieces.add(piece=text.replace(" ", SPACE_SIGN), score=0.0, type=USER_DEFINED)
        for left, right, i in learnt.merges:
            names[i] = names[left] + names[right]
        first = len(made.pieces)
        last = min(old)
        scores = (
            _scores(learnt, parts, old) if self.kind == UNIGRAM else [last - 1 - i for i in range(len(learnt.counts))]
        )
        for i, score in enumerate(scores, first):
            made.pieces.add(piece=names[i], score=score, type=NORMAL)
        made.trainer_spec.vocab_size = len(made.pieces)
        return made.SerializeToString()


class _Json:
    """A tokenizer.json."""

    def __init__(self, base: Tokenizer) -> None:
        self._description = json.loads(base.model)
        self._size = base.vocab_size
        own = self._description["model"]
        vocabulary = own["vocab"]
        self.kind = own.get("type", "BPE")
        self._ids = vocabulary if isinstance(vocabulary, dict) else {p: i for i, (p, _) in enumerate(vocabulary)}
        self.names: dict[int, str] = {i: name for name, i in self._ids.items()}
        self._prefix = own.get("continuing_subword_prefix") or ""
        beside = {name: json.loads(base.files.get(name, b"{}")) for name in hf_tokenizer.FILES[:-1]}
        inside = self._description.get("added_tokens") or []
        known = self._ids.keys() | {token["content"] for token in inside}
        self._added = [*inside, *(t for t in hf_tokenizer.added_beside(beside) if t["content"] not in known)]
        silent = {i for i, piece in enumerate(base.piece_bytes) if not piece}
        self.alone: set[int] = silent | {token["id"] for token in self._added} | set(base.control_ids.values())
        if own.get("byte_fallback"):
            self.alone |= {i for name, i in self._ids.items() if BYTE.fullmatch(name)}

    def joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix) if right.startswith(self._prefix) else ""

    def model(self, named: Sequence[str], learnt: Learnt, parts: Sequence[Sequence[int]]) -> bytes:
        made = copy.deepcopy(self._description)
        own, names = made["model"], dict(self.names)
        added = [{"id": i, "content": text, **FLAGS} for i, text in enumerate(named, self._size)]
        made["added_tokens"] = [*self._added, *added]
        first = self._size + len(named)
        for left, right, i in learnt.merges:
            names[i] = self.joined(names[left], names[right])
        # Added tokens that the vocabulary lacks would move behind the new ones: they are pieces now, which no merge makes.
        new = {token["content"]: token["id"] for token in made["added_tokens"] if token["content"] not in self._ids}
        new |= {names[i]: i for i in range(first, first + len(learnt.counts))}
        if self.kind == "Unigram":
            self._append(own["vocab"], new, learnt, parts, first)
        else:
            own["vocab"] = {**self._ids, **new}
        if self.kind == "BPE":
            pairs = [[names[left], names[right]] for left, right, _ in learnt.merges]
            in_one = bool(own["merges"]) and isinstance(own["merges"][0], str)
            own["merges"] = [*own["merges"], *(" ".join(pair) if in_one else pair for pair in pairs)]
        return (json.dumps(made, ensure_ascii=False, indent=1) + "\n").encode()

    def _append(
        self,
        vocabulary: list[Any],
        new: Mapping[str, int],
        learnt: Learnt,
        parts: Sequence[Sequence[int]],
        first: int,
    ) -> None:
        """Append to a Unigram vocabulary, where places are ids."""
        scores = _scores(learnt, parts, [score for _, score in vocabulary])
        for name, i in sorted(new.items(), key=lambda item: item[1]):
            if i != len(vocabulary):
                raise UserError(
                    f"no tokens can be added to this tokenizer (there is a hole before id {i}): leave tokenizer.add_tokens "
                    "and tokenizer.add_learnt at their defaults"
                )
            vocabulary.append([name, scores[i - first] if i >= first else NEVER])
