"""Where the time of a command goes: phases, each without the phases inside it, for `--timings`.

with timings.phase("read the model"):
    ...
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

START = "start Python, read the command"


@dataclass
class Timings:
    """Seconds by phase (wall clock, all cores together), and moments, since the process began."""

    began: tuple[float, float]
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    moments: dict[str, float] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    since: tuple[float, float] = (0.0, 0.0)

    def switch(self) -> None:
        """Give the time since the last switch to the phase that is running."""
        now = _now()
        name = self.running[-1] if self.running else "the rest"
        old = self.seconds.get(name, (0.0, 0.0))
        self.seconds[name] = (old[0] + now[0] - self.since[0], old[1] + now[1] - self.since[1])
        self.since = now


_kept: Timings | None = None  # of this process; None: not asked for


def start(*, asked: bool) -> None:
    """Measure from here on, if asked. The time since the process began is the first phase."""
    global _kept
    if not asked:
        _kept = None
        return
    _kept = Timings(_beginning())
    _kept.since = _kept.began
    _kept.running = [START]
    _kept.switch()
    _kept.running = []


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the command. Parts of the same name add up. Costs nothing unless asked for."""
    if _kept is None:
        yield
        return
    _kept.switch()
    _kept.running.append(name)
    try:
        yield
    finally:
        _kept.switch()
        _kept.running.pop()


def moment(name: str) -> None:
    """Note when something happens for the first time."""
    if _kept is not None:
        _kept.moments.setdefault(name, _now()[0] - _kept.began[0])


def show(file: TextIO | None = None) -> None:
    """Print the phases so far, if `start` was asked to measure."""
    if _kept is None:
        return
    _kept.switch()
    file = file or sys.stderr
    rows = [*_kept.seconds.items(), ("together", (_now()[0] - _kept.began[0], _now()[1] - _kept.began[1]))]
    width = max(len(name) for name, _ in rows)
    print(f"\n{'':<{width}}  seconds  of all cores", file=file)
    for name, (wall, cores) in rows:
        print(f"{name:<{width}}  {wall:7.2f}  {cores:12.2f}", file=file)
    for name, at in _kept.moments.items():
        print(f"{name}: {at:.2f} s after the start", file=file)


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _beginning() -> tuple[float, float]:
    """When this process began, by the clocks of `_now`; if the system does not say, now."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = time.process_time()
    return time.monotonic() - age, 0.0
