"""Prompts on their way into slots' caches: in parts of few lengths, several side by side, from beginnings that are kept.

A prompt is read but for its last token, which the first step of decoding is fed. Caches of beginnings that prompts share
are kept and copied: by whole `ALIGN` tokens, and wholly where the same prompt waits several times, as with n samples.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmjax.infer.request import Request
from llmjax.infer.slots import Slots
from llmjax.infer.steps import Programs

ALIGN = 16  # beginnings are kept by so many tokens, which every part of a prompt but the last has a multiple of
TOGETHER = 4  # prompts that are read at once: on CPU more are no faster, and fewer read all weights more often


@dataclass
class Reading:
    """A prompt that is being read."""

    slot: int
    request: Request
    keep: frozenset[int]  # lengths at which the cache is kept for other prompts
    at: int = 0  # tokens that the cache has

    @property
    def ids(self) -> tuple[int, ...]:
        """What is to be read."""
        return self.request.ids[:-1]

    @property
    def count(self) -> int:
        """Tokens up to the next place where the cache is kept, or the end."""
        return min([mark for mark in self.keep if mark > self.at], default=len(self.ids)) - self.at


@dataclass
class Reader:
    """Reads prompts into the slots of an engine.

    Args:
        programs, params: what computes, and the parameters as `prefill` reads them.
        slots: how many the engine has.
        capacity: of a slot, tokens, a multiple of ALIGN.
        parts: lengths, ascending multiples of ALIGN, in which prompts are read; a program each, or two: for `ways`
            prompts and for `together`.
        ways: devices that rows are divided over.
        source_length: of an encoder-decoder's sources.
        beginnings: how many shared beginnings are kept.
    """

    programs: Programs
    params: tuple[Any, ...]
    slots: int
    capacity: int
    parts: Sequence[int]
    ways: int
    source_length: int
    beginnings: int
    count: int = 0  # tokens computed, those of copied beginnings not counted
    _kept: OrderedDict[tuple[Any, ...], Any] = field(default_factory=OrderedDict)

    @property
    def together(self) -> int:
        """Prompts of the larger programs."""
        rows = -(-TOGETHER // self.ways) * self.ways
        return rows if rows <= self.slots else self.ways

    def next(self, requests: Sequence[Request], free: Sequence[int]) -> list[Reading]:
        """The first of the requests that can be read side by side into free slots: up to one that begins as another of
        them does, because what both begin with is kept when that one has been read."""
        group: list[Reading] = []
        for number, (slot, request) in enumerate(zip(free, requests, strict=False)):
            known = self._known(request)
            ids, at = request.ids[:-1], len(known[1]) if known else 0
            begun = (
                at < mark <= len(ids) and one.ids[:mark] == ids[:mark] and one.request.source == request.source
                for one in group
                for mark in one.keep
            )
            if self.beginnings and any(begun):
                break
            twins = any(other.ids == request.ids and other.source == request.source for other in requests[number + 1 :])
            marks = {request.shared // ALIGN * ALIGN} | ({len(ids)} if twins else set())
            group.append(Reading(slot, request, frozenset(mark for mark in marks if mark <= len(ids))))
        return group

    def read(self, group: Sequence[Reading], slots: Slots) -> Slots:
        """The slots with the prompts of a group in their caches, all but the last tokens."""
        for one in group:
            if known := self._known(one.request):
                self._kept.move_to_end(known)
                slots = self.programs.put_row(slots, np.int32(one.slot), self._kept[known])
                one.at = len(known[1])
        pending = [one for one in group if one.at < len(one.ids) or self._has_source_to_read(one)]
        while pending:
            # Neighbours in length, so that little is padding.
            pending.sort(key=lambda one: (self._has_source_to_read(one), one.count))
            left = pending
            while left:
                first = self._has_source_to_read(left[0])
                alike = [one for one in left if self._has_source_to_read(one) == first]
                rows = self.together if 2 * len(alike) > self.together else self.ways
                left = left[min(rows, len(alike)) :]
                slots = self._part(alike[:rows], slots, rows=rows, first=first)
            for one in pending:
                if one.at in one.keep and self.beginnings:
                    self._keep((one.request.source, one.ids[: one.at]), slots, one.slot)
            pending = [one for one in pending if one.at < len(one.ids)]
        return slots

    def forget(self) -> None:
        """Drop all beginnings, and count anew."""
        self._kept.clear()
        self.count = 0

    def _has_source_to_read(self, one: Reading) -> bool:
        """A source is read with the first part of its prompt, or alone where the prompt has nothing to read."""
        return self.source_length > 0 and one.at == 0

    def _known(self, request: Request) -> tuple[Any, ...] | None:
        """The key of the longest kept beginning that a prompt has."""
        ids = request.ids[:-1]
        known = [
            key
            for key in self._kept
            if key[0] == request.source
            and key[1] == ids[: len(key[1])]
            and (len(key[1]) % ALIGN == 0 or len(key[1]) == len(ids))
        ]
        return max(known, key=lambda key: len(key[1]), default=None)

    def _part(self, group: Sequence[Reading], slots: Slots, *, rows: int, first: bool) -> Slots:
        """The next part of up to `rows` prompts, in one call; with `first` their sources too."""
        fitting = [part for part in self.parts if max(one.at for one in group) + part <= self.capacity]
        longest = max(one.count for one in group)
        size = next((part for part in fitting if part >= longest), fitting[-1])
        rows_R = np.full(rows, self.slots, np.int32)
        tokens_RL = np.zeros((rows, size), np.int32)
        starts_R, counts_R = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        names = ("tokens", "segments")
        source = {name: np.zeros((rows, self.source_length), np.int32) for name in names} if first else None
        for row, one in enumerate(group):
            assert one.at % ALIGN == 0, one.at
            count = min(one.count, size)
            rows_R[row], starts_R[row], counts_R[row] = one.slot, one.at, count
            tokens_RL[row, :count] = one.ids[one.at : one.at + count]
            if source is not None:
                ids = one.request.source
                source["tokens"][row, : len(ids)], source["segments"][row, : len(ids)] = ids, 1
            one.at += count
            self.count += count
        return self.programs.prefill(self.params, slots, rows_R, tokens_RL, starts_R, counts_R, source)

    def _keep(self, key: tuple[Any, ...], slots: Slots, slot: int) -> None:
        self._kept[key] = self.programs.take_row(slots.caches, np.int32(slot))
        if len(self._kept) > self.beginnings:
            self._kept.popitem(last=False)
