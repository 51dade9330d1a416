"""The prefix cache: prefixes of prompts that are computed already, found by hashes of blocks of tokens.

A prompt is known by hashes of its prefixes: of every number of whole blocks, and of the whole prompt. Each hash covers
all tokens before it, so equal hashes mean equal prefixes. There are two stores, because caches differ:

`SlotPrefixes`: where every layer attends to everything, the cache of a text contains the cache of each of its prefixes.
The cache of one slot is copied to another, or goes on where it is. No other memory is used.
`KeptPrefixes`: a window or a recurrent state cannot be rewound, so a copy is kept at the length at which two prompts
part. The second of them shows where that is.

Neither uses jax: they decide, and the engine copies.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

ALIGN = 16  # tokens of a block
SAVES = 64  # a prefix of so many tokens, or of a quarter of the prompt, is worth the copy of a cache
SEEN = 1 << 16  # the most hashes of prompts to remember


@dataclass(eq=False)
class Prompt:
    """The tokens of a request to read: all but the last, which the first step of decoding is fed."""

    ids: tuple[int, ...]
    source: tuple[int, ...] = ()
    salt: bytes = b""  # what else decides the cache: the adapter
    at: int = 0  # tokens in the cache of its slot
    begun: bool = False  # whether anything, the source included, has been read
    marks: set[bytes] = field(default_factory=set)  # hashes of the prefixes at whose ends the cache is kept

    def __post_init__(self) -> None:
        self.chain = chain(self.ids, self.source, self.salt)

    def has(self, length: int) -> bool:
        """Whether the cache of its slot has the prefix of this length."""
        return self.at >= length and (self.begun or not self.source)

    @property
    def next_stop(self) -> int:
        """The next length at which the cache is kept, or the length of the prompt."""
        ahead = (length for length, key in self.chain if length > self.at and key in self.marks)
        return next(ahead, len(self.ids))


def chain(ids: Sequence[int], source: Sequence[int] = (), salt: bytes = b"") -> list[tuple[int, bytes]]:
    """(length, hash) of each prefix, ascending: of the source alone, of whole blocks, and of everything."""
    key = hashlib.blake2b(np.asarray(source, np.int32).tobytes() + salt, digest_size=16).digest()
    found = [(0, key)] if source else []
    data = np.asarray(ids, np.int32).tobytes()
    for end in [*range(ALIGN, len(ids) + 1, ALIGN), *([len(ids)] if len(ids) % ALIGN else [])]:
        start = (end - 1) // ALIGN * ALIGN
        key = hashlib.blake2b(key + data[4 * start : 4 * end], digest_size=16).digest()
        found.append((end, key))
    return found


@dataclass(frozen=True)
class Found:
    """A known prefix: its length, and the slot or the key of the copy that has it. None: it is being read, so wait."""

    length: int
    where: int | bytes | None


def _worth(prompt: Prompt) -> Iterable[tuple[int, bytes]]:
    """The prefixes of a prompt that are worth a copy, the longest first."""
    least = 0 if prompt.source else min(SAVES, len(prompt.ids) / 4)
    return (pair for pair in reversed(prompt.chain) if pair[0] >= least)


class Prefixes:
    """The interface of a store; this one shares nothing."""

    def expect(self, prompt: Prompt) -> None:
        """A prompt is in the queue."""

    def find(self, prompt: Prompt, reading: Mapping[int, Prompt]) -> Found | None:
        """The longest prefix that is known, or is being read. `reading`: slot -> the prompt that it reads."""
        return None

    def replaceable(self, slot: int, prompt: Prompt) -> bool:
        """Whether all whole blocks of a slot are a prefix of this prompt, so that nothing is lost when it goes on there."""
        return False

    def begin(self, slot: int, prompt: Prompt) -> None:
        """The slot reads this prompt from now on, in place of what it has."""

    def reached(self, prompt: Prompt) -> bytes | None:
        """The key under which to keep a copy of the prompt's slot now; None: keep none."""
        return None

    def end(self, slot: int, prompt: Prompt, written: Sequence[int]) -> None:
        """The slot is free. Its cache has the part of the prompt that was read, and these tokens after it."""

    def dropped(self) -> list[bytes]:
        """Keys of the copies to drop."""
        return []

    def forget(self) -> None:
        """Everything that was computed is invalid. The caller drops all copies."""


class SlotPrefixes(Prefixes):
    """Prefixes in the slots themselves."""

    def __init__(self, slots: int) -> None:
        self._has: list[dict[bytes, int]] = [{} for _ in range(slots)]  # hash -> length
        self._slots: dict[bytes, set[int]] = {}

    def find(self, prompt: Prompt, reading: Mapping[int, Prompt]) -> Found | None:
        for length, key in _worth(prompt):
            if slots := self._slots.get(key):
                ready = (slot for slot in sorted(slots) if slot not in reading or reading[slot].has(length))
                return Found(length, next(ready, None))
        return None

    def replaceable(self, slot: int, prompt: Prompt) -> bool:
        own = {key for _, key in prompt.chain}
        return all(key in own for key, length in self._has[slot].items() if length % ALIGN == 0)

    def begin(self, slot: int, prompt: Prompt) -> None:
        self._put(slot, prompt.chain)

    def end(self, slot: int, prompt: Prompt, written: Sequence[int]) -> None:
        if not prompt.has(0):
            self._put(slot, [])
            return
        whole = prompt.chain if prompt.has(len(prompt.ids)) else []
        self._put(slot, [*whole, *chain((*prompt.ids[: prompt.at], *written), prompt.source, prompt.salt)])

    def forget(self) -> None:
        for slot in range(len(self._has)):
            self._put(slot, [])

    def _put(self, slot: int, prefixes: Sequence[tuple[int, bytes]]) -> None:
        for key in self._has[slot]:
            self._slots[key].discard(slot)
            if not self._slots[key]:
                del self._slots[key]
        self._has[slot] = {key: length for length, key in prefixes}
        for key in self._has[slot]:
            self._slots.setdefault(key, set()).add(slot)


class KeptPrefixes(Prefixes):
    """Copies at the lengths at which prompts part. Beyond `most` of them the least recently used one is dropped."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        self._dropped: list[bytes] = []
        self._seen: OrderedDict[bytes, set[bytes]] = OrderedDict()  # hash -> the marks of the last prompt with it

    def expect(self, prompt: Prompt) -> None:
        """Where a prompt parts from an earlier one, whichever is read first keeps its cache."""
        for _, key in _worth(prompt):
            if key in self._seen:
                self._seen[key].add(key)
                prompt.marks.add(key)
                break
        for _, key in prompt.chain:
            self._seen[key] = prompt.marks
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)

    def find(self, prompt: Prompt, reading: Mapping[int, Prompt]) -> Found | None:
        for length, key in _worth(prompt):
            if key in self._kept:
                self._kept.move_to_end(key)
                return Found(length, key)
            if any(key in one.marks and one.at < length for one in reading.values()):
                return Found(length, None)
        return None

    def reached(self, prompt: Prompt) -> bytes | None:
        key = next((key for length, key in prompt.chain if length == prompt.at), None)
        if key is None or key not in prompt.marks or key in self._kept:
            return None
        self._kept[key] = None
        if len(self._kept) > self._most:
            self._dropped.append(self._kept.popitem(last=False)[0])
        return key

    def dropped(self) -> list[bytes]:
        dropped, self._dropped = self._dropped, []
        return dropped

    def forget(self) -> None:
        self._kept.clear()
        self._dropped.clear()
