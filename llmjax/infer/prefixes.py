"""Beginnings of prompts that are already computed, found by hashes of their blocks of tokens.

A prompt is known by the hash of each of its beginnings of whole blocks, and of all of it; each hash covers everything
before it, so equal hashes mean equal beginnings. Two ways to keep them, by what the model's caches can do:

`SlotPrefixes`: where every layer attends to everything, the cache of a text holds the cache of each of its beginnings.
What a slot has read and written is copied to another slot, or goes on where it is; nothing is kept besides.
`KeptPrefixes`: a window or a recurrent state cannot be gone back in, so a copy is kept at the length at which prompts
part. Where that is, is known when the second of them comes.

Both are without jax: they say what is to be copied, the engine copies.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

ALIGN = 16  # tokens of a block
SAVES = 64  # a beginning of so many tokens, or of a quarter of the prompt, is worth the copy of a cache
SEEN = 1 << 16  # hashes of prompts that are remembered


@dataclass(eq=False)
class Prompt:
    """What is to be read of a request: its ids but the last, which the first step of decoding is fed."""

    ids: tuple[int, ...]
    source: tuple[int, ...] = ()
    at: int = 0  # tokens that its slot's cache has
    begun: bool = False  # whether anything, the source included, has been read
    marks: set[bytes] = field(default_factory=set)  # beginnings at whose ends the cache is kept

    def __post_init__(self) -> None:
        self.chain = chain(self.ids, self.source)

    def has(self, length: int) -> bool:
        """Whether its slot's cache has a beginning of this length."""
        return self.at >= length and (self.begun or not self.source)

    @property
    def next_stop(self) -> int:
        """The next length at which the cache is kept, or the end."""
        ahead = (length for length, key in self.chain if length > self.at and key in self.marks)
        return next(ahead, len(self.ids))


def chain(ids: Sequence[int], source: Sequence[int] = ()) -> list[tuple[int, bytes]]:
    """(length, hash) of each beginning, ascending: of the source alone, of whole blocks, and of everything."""
    key = hashlib.blake2b(np.asarray(source, np.int32).tobytes(), digest_size=16).digest()
    found = [(0, key)] if source else []
    data = np.asarray(ids, np.int32).tobytes()
    for end in [*range(ALIGN, len(ids) + 1, ALIGN), *([len(ids)] if len(ids) % ALIGN else [])]:
        start = (end - 1) // ALIGN * ALIGN
        key = hashlib.blake2b(key + data[4 * start : 4 * end], digest_size=16).digest()
        found.append((end, key))
    return found


@dataclass(frozen=True)
class Found:
    """A beginning that is known: its length, and the slot or the key of the copy that has it; None: soon, wait for it."""

    length: int
    where: int | bytes | None


def _worth(prompt: Prompt) -> Iterable[tuple[int, bytes]]:
    """The beginnings of a prompt, the longest first, that are worth a copy."""
    least = 0 if prompt.source else min(SAVES, len(prompt.ids) / 4)
    return (pair for pair in reversed(prompt.chain) if pair[0] >= least)


class Prefixes:
    """Prompts share nothing; and what the other classes are asked."""

    def expect(self, prompt: Prompt) -> None:
        """A prompt waits."""

    def find(self, prompt: Prompt, reading: Mapping[int, Prompt]) -> Found | None:
        """The longest beginning that is known, or is going to be. `reading`: what is being read, by slot."""
        return None

    def replaceable(self, slot: int, prompt: Prompt) -> bool:
        """Whether all whole blocks that a slot has begin this prompt: nothing is lost when it goes on there."""
        return False

    def begin(self, slot: int, prompt: Prompt) -> None:
        """The slot is going to have this prompt, in place of what it has."""

    def reached(self, prompt: Prompt) -> bytes | None:
        """The key under which a copy of the prompt's slot is to be kept now."""
        return None

    def end(self, slot: int, prompt: Prompt, written: Sequence[int]) -> None:
        """The slot is free; its cache has what was read of the prompt, and these tokens after it."""

    def dropped(self) -> list[bytes]:
        """Keys of copies that are no longer wanted."""
        return []

    def forget(self) -> None:
        """Nothing that was computed is valid any more."""


class SlotPrefixes(Prefixes):
    """Beginnings in the slots themselves."""

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
        self._put(slot, [*whole, *chain((*prompt.ids[: prompt.at], *written), prompt.source)])

    def forget(self) -> None:
        for slot in range(len(self._has)):
            self._put(slot, [])

    def _put(self, slot: int, beginnings: Sequence[tuple[int, bytes]]) -> None:
        for key in self._has[slot]:
            self._slots[key].discard(slot)
            if not self._slots[key]:
                del self._slots[key]
        self._has[slot] = {key: length for length, key in beginnings}
        for key in self._has[slot]:
            self._slots.setdefault(key, set()).add(slot)


class KeptPrefixes(Prefixes):
    """Copies at the lengths at which prompts part, so many at most; the one that was not used for longest goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        self._dropped: list[bytes] = []
        self._seen: OrderedDict[bytes, set[bytes]] = OrderedDict()  # hash -> the marks of the last prompt with it

    def expect(self, prompt: Prompt) -> None:
        """Where a prompt parts from one before it, both keep their caches, whoever is read first."""
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
        self._dropped += self._kept
        self._kept.clear()
