"""Who is read and written when: nobody waits for others' prompts, and nothing costs more because more wait. Without a device."""

import sys
from typing import Any

import numpy as np
import pytest

from llmjax.data.tokenizer import byte_tokenizer
from llmjax.infer.constrained import Constraints
from llmjax.infer.prefixes import KeptPrefixes, Prefixes, Prompt, SlotPrefixes, chain
from llmjax.infer.request import Event, Request
from llmjax.infer.scheduler import Copy, Keep, Place, Read, Restore, Scheduler
from llmjax.infer.steps import Written

TOKENIZER = byte_tokenizer()


def scheduler(slots: int = 4, **given: Any) -> Scheduler:
    more = {"capacity": 2048, "steps": 8, "chunks": (16, 32, 64, 128, 256), **given}
    return Scheduler(TOKENIZER, Constraints(TOKENIZER, 288), slots=slots, **more)


class Device:
    """What an engine's programs would do: every text gets the token 70, and caches are lists of what was read."""

    def __init__(self, given: Scheduler) -> None:
        self.scheduler = given
        self.caches: list[list[int]] = [[] for _ in given.slots]
        self.left = np.zeros(len(given.slots), int)
        self.kept: dict[bytes, list[int]] = {}
        self.calls: list[Any] = []

    def step(self) -> list[Event]:
        s = self.scheduler
        told = s.events()
        for action in s.reads():
            self.calls.append(action)
            self.do(action)
        limit_B = s.limits()
        if limit_B.any():
            self.calls.append(limit_B)
            s.take(self.written(limit_B))
        return told + s.events()

    def do(self, action: Any) -> None:
        match action:
            case Read():
                for slot, start, tokens in zip(action.slots, action.starts, action.tokens, strict=True):
                    assert len(self.caches[slot]) >= start
                    self.caches[slot][start:] = tokens
            case Copy(source, slot):
                self.caches[slot] = list(self.caches[source])
            case Keep(slot, key, drop):
                self.kept[key] = list(self.caches[slot])
                for one in drop:
                    del self.kept[one]
            case Restore(key, slot):
                self.caches[slot] = list(self.kept[key])
            case Place(slot, request):
                assert tuple(self.caches[slot][: len(request.ids) - 1]) == request.ids[:-1]
                self.caches[slot][len(request.ids) - 1 :] = [request.ids[-1]]
                self.left[slot] = request.max_new_tokens

    def written(self, limit_B: np.ndarray) -> Written:
        T, B = max(limit_B), len(limit_B)
        count_B = np.minimum(limit_B, self.left)
        self.left -= count_B
        for slot, count in enumerate(count_B):
            self.caches[slot] += [70] * count
        given = np.arange(T)[:, None] < count_B[None]
        nats = np.zeros((T, B), np.float32)
        none = np.zeros((T, B, 0), np.int32)
        return Written(np.full((T, B), 70), nats, nats, given, none, none)  # type: ignore[arg-type]

    def run(self, requests: list[Request]) -> dict[int, Event]:
        numbers = [self.scheduler.submit(request) for request in requests]
        done: dict[int, Event] = {}
        while self.scheduler.busy:
            done |= {event.number: event for event in self.step() if event.finish}
        assert sorted(done) == numbers
        return done

    def read(self) -> int:
        """Tokens of prompts that were computed."""
        return sum(len(tokens) for one in self.calls if isinstance(one, Read) for tokens in one.tokens)


def prompt(length: int, first: int = 4) -> tuple[int, ...]:
    return tuple((first + 7 * i) % 250 + 4 for i in range(length))


def test_a_long_prompt_does_not_stop_the_texts_that_are_being_written():
    """Between two calls of decoding at most one part of a prompt, and at most so many tokens, are read."""
    device = Device(scheduler())
    device.scheduler.submit(Request(prompt(5), 600))
    device.step()
    device.calls.clear()
    device.scheduler.submit(Request(prompt(1500, 90), 4))
    short = device.scheduler.submit(Request(prompt(20, 30), 4))
    told: list[int] = []
    while device.scheduler.busy:
        told += [event.number for event in device.step() if event.finish]
    between, chunks = 0, 0
    for call in device.calls:
        if isinstance(call, Read):
            between += call.rows * call.size
            chunks += 1
        elif isinstance(call, np.ndarray):
            assert between <= 256
            between = 0
    assert chunks == 7  # 1499 tokens in six chunks, and the short prompt
    assert told[0] == short  # which had its turn


def test_the_more_slots_are_to_be_read_the_sooner_the_next_part_comes():
    device = Device(scheduler())
    device.scheduler.submit(Request(prompt(5), 600))
    device.step()
    for first in (60, 120, 180):
        device.scheduler.submit(Request(prompt(600, first), 300))
    device.step()
    assert device.calls[-1].tolist() == [2, 0, 0, 0]  # one of four slots: a quarter of the steps
    while any(not live.writing for live in device.scheduler.slots if live):
        device.step()
    device.step()
    assert device.calls[-1].tolist() == [8] * 4


@pytest.mark.parametrize("count", [400, 4000])
def test_an_admission_costs_the_same_however_many_wait(count):
    """In calls of functions, Python's and C's, so that no clock decides."""

    def calls(waiting: int) -> int:
        device = Device(scheduler(slots=8, prefixes=SlotPrefixes(8)))
        common = prompt(515)
        for i in range(waiting):
            device.scheduler.submit(Request((*common, 10 + i % 200, 20 + i // 200), 16))
        counted = 0

        def count_calls(*_: Any) -> None:
            nonlocal counted
            counted += 1

        sys.setprofile(count_calls)
        try:
            for _ in range(4):
                device.step()
            device.scheduler.cancel(waiting - 1)
        finally:
            sys.setprofile(None)
        return counted

    assert abs(calls(count) - calls(40)) <= 20


PREFIXES: dict[str, Any] = {"slots": lambda: SlotPrefixes(4), "kept": lambda: KeptPrefixes(2), "none": Prefixes}


@pytest.mark.parametrize("kind", PREFIXES)
def test_every_text_is_written_after_its_own_prompt(kind):
    """Random prompts that share beginnings, with cancellations: `Device` checks the caches."""
    rng = np.random.default_rng(0)
    device = Device(scheduler(prefixes=PREFIXES[kind]()))
    stems = [prompt(n, n) for n in (0, 16, 33, 70, 300)]
    numbers, ended = [], 0
    for _ in range(150):
        stem = stems[int(rng.integers(5))]
        stem = stem[: int(rng.integers(len(stem) + 1))]
        tail = tuple(rng.integers(4, 260, int(rng.integers(1, 40))).tolist())
        numbers.append(device.scheduler.submit(Request(stem + tail, int(rng.integers(1, 40)))))
        if rng.random() < 0.2:
            device.scheduler.cancel(int(rng.choice(numbers)))
        if rng.random() < 0.5:
            ended += sum(bool(event.finish) for event in device.step())
    while device.scheduler.busy:
        ended += sum(bool(event.finish) for event in device.step())
    assert ended == len(numbers)
    assert len(device.kept) <= 2


@pytest.mark.parametrize("kind", ["slots", "kept"])
def test_a_beginning_that_is_known_is_not_read_again(kind):
    device = Device(scheduler(prefixes=PREFIXES[kind]()))
    common = prompt(320)
    device.run([Request((*common, 9, i), 4) for i in range(4, 40)])
    assert device.read() == 321  # the prompts but for their last tokens
    before = device.read()
    device.run([Request((*common[:200], 9, 9), 4), Request((*common[:200], 8, 9), 4)])
    # A slot has every beginning of what it has; a kept copy only what prompts were seen to share.
    assert device.read() - before <= (2 * 9 if kind == "slots" else 201 + 9)


@pytest.mark.parametrize("kind", ["slots", "kept"])
def test_prompts_of_before_are_read_and_shared_anew_once_all_caches_are_invalid(kind):
    """As in reinforcement: every round has other parameters, and the same prompts come again."""
    device = Device(scheduler(prefixes=PREFIXES[kind]()))
    requests = [Request((*prompt(80, first), 9), 4) for first in (4, 50) for _ in range(6)]
    read = []
    for _ in range(3):
        before = device.read()
        device.run(requests)
        read.append(device.read() - before)
        device.scheduler.prefixes.forget()
        device.kept, device.caches = {}, [[] for _ in device.caches]
    assert read == [2 * 80] * 3


def test_a_conversation_goes_on_in_its_slot():
    device = Device(scheduler(slots=2, prefixes=SlotPrefixes(2)))
    first = prompt(100)
    device.run([Request(first, 28)])
    before = device.read()
    device.run([Request((*first, *[70] * 28, *prompt(20, 40)), 4)])
    assert device.read() - before == 19 + 16  # what comes after whole blocks of 16: 127 tokens were fed
    assert not any(isinstance(call, Copy) for call in device.calls)


def test_texts_are_begun_anew_after_an_interruption_and_nothing_is_told_twice():
    device = Device(scheduler())
    requests = [Request(prompt(40, i), 20) for i in range(6)]
    for request in requests:
        device.scheduler.submit(request)
    told = device.step()
    cancelled = next(live.number for live in device.scheduler.slots if live)
    device.scheduler.cancel(cancelled)
    device.scheduler.restart()
    device.caches = [[] for _ in device.caches]
    while device.scheduler.busy:
        told += device.step()
    for number in range(6):
        own = [event for event in told if event.number == number]
        tokens = sum(len(event.tokens) for event in own)
        assert tokens == (8 if number == cancelled else 20)
        assert own[-1].finish == ("cancelled" if number == cancelled else "length")
        assert [event.finish for event in own[:-1]] == [""] * (len(own) - 1)


def test_hashes_tell_beginnings_apart():
    ids = prompt(40)
    assert chain(ids)[:2] == chain(ids[:32])
    assert [length for length, _ in chain(ids)] == [16, 32, 40]
    assert {key for _, key in chain(ids)}.isdisjoint({key for _, key in chain(ids, (5,))})
    assert chain((), (5,))[0][0] == 0
    assert Prompt(ids).next_stop == 40
