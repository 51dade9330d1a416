"""Tokens added to a tokenizer that exists: texts that are named, and tokens learnt from the text of a new domain.

New ids follow the old ones, which keep their meaning. Learning goes on where byte-pair encoding stopped (Sennrich et al.
2016): of the pairs of neighbouring tokens within a word, the commonest becomes a token, again and again. A word is a run of
letters or of marks, with the space before it.

Tokenizers trained here (bpe, unigram) and every tokenizer.json whose model is BPE, Unigram or WordPiece can be extended
(`extendable.py`).
"""

import dataclasses
import heapq
import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmjax import storage
from llmjax.data.extendable import Extendable, Learnt, open_pieces
from llmjax.data.tokenizer import SPACE_SIGN, Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError

FILE = "extension.json"  # beside an extended tokenizer: what it was made of
TOGETHER = 256  # texts that are encoded at once
AT_LEAST = 2  # a pair that occurs less often is not learnt

Pair = tuple[int, int]


@dataclass(frozen=True)
class Extension:
    """What a tokenizer was extended from, and the old ids that each new token stands for."""

    base: str  # the old tokenizer's fingerprint
    base_size: int  # the first new id
    parts: tuple[tuple[int, ...], ...]  # of the new ids, in their order


def extend(
    base: Tokenizer, texts: Iterable[str], folder: Path, *, named: Sequence[str], learnt: int, split_digits: bool = True
) -> Tokenizer:
    """Write the extended tokenizer and extension.json to `folder`, and return it.

    Args:
        texts: the domain's, read once; only read if tokens are learnt.
        named: texts that become tokens, wherever they stand.
        learnt: so many tokens are learnt.
        split_digits: never join digits.

    Raises:
        UserError: for a kind of tokenizer that cannot be extended, a text that is a token already or that the tokenizer
            changes, and more tokens than the texts allow, with the number that works.
    """
    pieces = open_pieces(base)
    named_parts = [_named_parts(base, text) for text in dict.fromkeys(named)]
    first = base.vocab_size + len(named_parts)
    found = _learn(base, pieces, texts, first=first, count=learnt, split_digits=split_digits) if learnt else Learnt()
    whole: dict[int, tuple[int, ...]] = {}
    for left, right, made in found.merges:
        whole.setdefault(made, whole.get(left, (left,)) + whole.get(right, (right,)))
    learnt_parts = [whole[first + i] for i in range(len(found.counts))]
    model = pieces.model(list(dict.fromkeys(named)), found, learnt_parts)
    dataclasses.replace(base, model=model).save(folder)
    extension = Extension(base.fingerprint, base.vocab_size, (*named_parts, *learnt_parts))
    storage.write_json(folder / FILE, dataclasses.asdict(extension))
    extended = load_tokenizer(folder)
    _check(base, extended, named, extension)
    return extended


def read_extension(folder: Path) -> Extension | None:
    """What the tokenizer of a folder was extended from; None: it was not."""
    path = folder / FILE
    if not path.is_file():
        return None
    read = storage.read_json(path, mend="run `llmjax tokenizer --again`")
    return Extension(read["base"], read["base_size"], tuple(tuple(ids) for ids in read["parts"]))


def _named_parts(base: Tokenizer, text: str) -> tuple[int, ...]:
    if not text.strip() or SPACE_SIGN in text:
        raise UserError(f"tokenizer.add_tokens has {text!r}: name texts with visible characters and without U+2581")
    ids = base.encode(text, specials="parse")
    if len(ids) < 2:
        raise UserError(f"tokenizer.add_tokens has {text!r}, which is one token already: leave it out")
    return tuple(ids)


def _check(base: Tokenizer, extended: Tokenizer, named: Sequence[str], extension: Extension) -> None:
    """Raise UserError unless old ids mean what they meant and named texts are tokens."""
    size = base.vocab_size
    kept = extended.vocab_size == size + len(extension.parts) and extended.piece_bytes[:size] == base.piece_bytes
    if not kept or extended.control_ids.items() < base.control_ids.items():
        raise UserError(
            "this tokenizer's file does not allow more tokens without a change of the old ones: leave tokenizer.add_tokens "
            "and tokenizer.add_learnt at their defaults"
        )
    for i, text in enumerate(dict.fromkeys(named), size):
        if i not in extended.encode(text, specials="parse"):
            raise UserError(
                f"tokenizer.add_tokens has {text!r}, which this tokenizer changes before it looks for tokens: write it as "
                f"the tokenizer reads it, {base.decode(base.encode(text))!r}"
            )


# ------------------------------------------------------------------ learning


def _learn(
    base: Tokenizer, pieces: Extendable, texts: Iterable[str], *, first: int, count: int, split_digits: bool
) -> Learnt:
    """`count` tokens, from id `first` on. Equal texts give equal tokens."""
    words, total = _words(base, pieces, texts, split_digits=split_digits)
    names = dict(pieces.names)
    known = {name: i for i, name in names.items()}
    rows = _Rows(words)
    heap = [(-amount, pair) for pair, amount in rows.pairs.items()]
    heapq.heapify(heap)
    found = Learnt(total=total)
    while len(found.counts) < count:
        if not heap or -heap[0][0] < AT_LEAST:
            raise UserError(
                f"tokenizer.add_learnt={count} is more than the text has common pairs for: set it to {len(found.counts)}, "
                "or add text"
            )
        amount, pair = heapq.heappop(heap)
        if -amount != rows.pairs[pair]:  # it has changed since, and has a newer entry
            continue
        name = pieces.joined(names[pair[0]], names[pair[1]])
        made = known.get(name, -1)
        if not name or 0 <= made < first:  # there is no such piece, or the old tokenizer never makes it of these
            continue
        if made < 0:
            made = first + len(found.counts)
            names[made], known[name] = name, made
            found.counts.append(-amount)
        found.merges.append((*pair, made))
        for changed in rows.merge(pair, made):
            heapq.heappush(heap, (-rows.pairs[changed], changed))
    return found


class _Rows:
    """Words as rows of ids, and the pairs in them: `pairs` counts them."""

    def __init__(self, words: Counter[tuple[int, ...]]) -> None:
        self._rows, self._amounts = [list(word) for word in words], list(words.values())
        self.pairs: Counter[Pair] = Counter()
        self._where: defaultdict[Pair, set[int]] = defaultdict(set)
        for number in range(len(self._rows)):
            self._count(number, +1)

    def _count(self, number: int, sign: int) -> set[Pair]:
        row = self._rows[number]
        pairs = list(itertools.pairwise(row))
        for pair in pairs:
            self.pairs[pair] += sign * self._amounts[number]
            self._where[pair].add(number)
        return set(pairs)

    def merge(self, pair: Pair, made: int) -> list[Pair]:
        """Put `made` in the place of a pair wherever it stands; the pairs whose counts changed."""
        changed: set[Pair] = set()
        for number in sorted(self._where.pop(pair)):
            changed |= self._count(number, -1)
            row, new, i = self._rows[number], [], 0
            while i < len(row):
                together = (*row[i : i + 2],) == pair
                new.append(made if together else row[i])
                i += 2 if together else 1
            self._rows[number] = new
            changed |= self._count(number, +1)
        return sorted(one for one in changed if one != pair and self.pairs[one] >= AT_LEAST)


def _words(
    base: Tokenizer, pieces: Extendable, texts: Iterable[str], *, split_digits: bool
) -> tuple[Counter[tuple[int, ...]], int]:
    """The words of at least two tokens with how often each occurs, and the number of all tokens."""
    kinds = [_kind(piece) for piece in base.piece_bytes]
    refused = {"X", "N"} if split_digits else {"X"}
    words: Counter[tuple[int, ...]] = Counter()
    total = 0

    def joins(left: int, right: int) -> bool:
        (_, end), (spaced, start) = kinds[left], kinds[right]
        if spaced or {start, end} & refused or {left, right} & pieces.alone:
            return False
        return not end or not start or start == end

    for ids in _encoded(base, texts):
        total += len(ids)
        cuts = [0, *(i for i in range(1, len(ids)) if not joins(ids[i - 1], ids[i])), len(ids)]
        words.update(tuple(ids[a:b]) for a, b in itertools.pairwise(cuts) if b - a > 1)
    return words, total


def _encoded(base: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == TOGETHER:
            yield from base.encode_batch(batch)
            batch = []
    yield from base.encode_batch(batch)


def _kind(piece: bytes) -> tuple[bool, str]:
    """Whether a piece begins with a space, and its characters: L letters, N digits, P marks, X others, "" none.

    Bytes of half a character are none: byte-level pieces are joined with what completes them.
    """
    text = piece.decode(errors="ignore")
    found = {_class(character) for character in text.removeprefix(" ")}
    return text.startswith(" "), found.pop() if len(found) == 1 else "X" if found else ""


def _class(character: str) -> str:
    return {"L": "L", "M": "L", "N": "N", "P": "P", "S": "P"}.get(unicodedata.category(character)[0], "X")
