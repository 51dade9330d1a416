"""A worker takes trials of a study, one after another, runs them, and writes a line when one ends.

It renews the lease of its trial from a thread. When another worker takes the lease, the process ends at once, so that
it writes nothing more. After a worker is killed, another one takes over its lease and continues its run.
"""

import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llmjax import recipe, storage
from llmjax.config import ConfigDict
from llmjax.errors import Diverged, Stopped, UserError
from llmjax.parallel import processes
from llmjax.sweep import study as studies
from llmjax.sweep.design import Trial, hash_of
from llmjax.sweep.study import Study

LEASE_SECONDS = 60.0
POLL_SECONDS = 1.0  # between looks at trials that others have
SHARED = ("prepare", "tokenizer", "rows")  # stages that trials have in common where their settings are the same
LOST = 75  # exit status of a worker whose lease another has taken: it is to start again


def work(
    study: Study,
    *,
    wanted: Callable[[], Sequence[Trial]],
    ended: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Run trials until `wanted` returns none.

    Args:
        wanted: the trials that are open now, in the order of preference. The worker skips trials that others hold.
        ended: called when a trial of this worker has ended.
    """
    while open_now := wanted():
        if not any(_try(study, trial, wanted, ended) for trial in open_now):
            time.sleep(POLL_SECONDS)


def _try(study: Study, trial: Trial, wanted: Callable[[], Sequence[Trial]], ended: Callable[[Trial], None]) -> bool:
    """Run a trial to its end if it is free. Returns whether this worker ran it. All processes of a job call this."""
    taken: list[storage.Lease] = []

    def take() -> bool:
        lease = storage.take_lease(study.lease(trial), seconds=LEASE_SECONDS)
        taken.extend([lease] if lease else [])
        return lease is not None

    if not processes.broadcast_from_first(take):
        return False
    with ExitStack() as held:
        for lease in taken:
            held.enter_context(renewed(lease))
        if not processes.broadcast_from_first(lambda: trial.id in {one.id for one in wanted()}):
            return True  # another worker has ended it in the meantime
        try:
            run_trial(study, trial)
        except storage.Locked:  # its last worker lost the lease and has not ended yet
            return False
        ended(trial)
    return True


@contextmanager
def renewed(lease: storage.Lease, *, lost: Callable[[], None] = lambda: os._exit(LOST)) -> Iterator[None]:
    """Renew a lease until the block ends, and give it up then. `lost` is called once another process has taken it."""
    over, held = threading.Event(), [lease]

    def keep() -> None:
        while not over.wait(LEASE_SECONDS / 3):
            again = storage.renew_lease(held[0], seconds=LEASE_SECONDS)
            if again is None:
                print("the lease of this trial is another worker's: this one ends", flush=True)
                lost()
                return
            held[0] = again

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        storage.end_lease(held[0])


def run_trial(study: Study, trial: Trial) -> None:
    """Run a trial, and write the line of its end. The caller has the lease.

    Raises:
        Stopped: by a signal, after the training was saved. The trial stays open.
        Locked: when another process works on its run. The trial stays open.
    """
    c, folder = study.config_of(trial), study.run_folder(trial)
    began = time.perf_counter()
    print(f"\n=== {trial.arm}, seed {trial.seed}: {folder}", flush=True)
    _note(study, trial, "running", process=os.getpid())
    try:
        with _stoppable():
            results = run_stages(study.folder, c, folder)
    except (Stopped, storage.Locked, KeyboardInterrupt, processes.FirstFailed):
        raise
    except Diverged as error:
        _note(study, trial, "diverged", error=str(error), seconds=time.perf_counter() - began)
        return
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, UserError):
            storage.write_text(folder / "error.txt", traceback.format_exc())
            first = f"{type(error).__name__}: {first} ({folder / 'error.txt'})"
        _note(study, trial, "failed", error=first, seconds=time.perf_counter() - began)
        return
    _note(study, trial, **outcome(study, folder, results), seconds=time.perf_counter() - began)


def run_stages(study: Path, c: ConfigDict, folder: Path) -> recipe.Results:
    """Run the stages of a trial. A stage that trials share runs once, in its own folder."""
    for stage in (stage for stage in c.stages if stage in SHARED):
        _adopt(study, c, folder, stage)
    return recipe.run(c, folder, [stage for stage in c.stages if stage not in SHARED])


def _adopt(study: Path, c: ConfigDict, folder: Path, stage: str) -> None:
    if processes.broadcast_from_first(lambda: not (folder / stage).exists()):
        source = shared_stage(study, c, stage)
        processes.broadcast_from_first(lambda: recipe.adopt(folder, source, stage))


def shared_stage(study: Path, c: ConfigDict, stage: str) -> Path:
    """The folder of a stage that trials share. It runs once, and others wait for it meanwhile.

    Files of data.sources that change later do not change it: all trials of the study read the same.
    """
    folder = study / "shared" / f"{stage}-{hash_of(recipe.identity(c, (stage,)))}"
    lock, waiting = folder.with_name(f".{folder.name}.lock"), f"another worker runs {stage}: waiting for it"
    with storage.locked(lock, waiting=waiting) if processes.is_first() else nullcontext():
        if not processes.broadcast_from_first(lambda: recipe.is_finished(c, folder, stage)):
            for need in recipe.stage_of(c, stage).needs:
                _adopt(study, c, folder, need)
            recipe.run(c, folder, (stage,))
    return folder


def outcome(study: Study, folder: Path, results: recipe.Results) -> dict[str, Any]:
    """The line of a finished run: its state, its value of each metric, and its cost.

    A run whose training loss ended above where it began, or whose metric is not finite, has diverged. A run without
    the metric has failed.
    """
    values = {name: results.get(name) for name in study.design.metric}
    missing = [name for name, value in values.items() if not isinstance(value, (int, float))]
    told = {key: results[f"train/{key}"] for key in ("steps", "tokens", "flops", "train_seconds", "loss")
            if f"train/{key}" in results}  # fmt: skip
    if missing:
        numbers = ", ".join(sorted(key for key, value in results.items() if isinstance(value, (int, float)))[:12])
        return {"state": "failed", "error": f"the run has no number {missing[0]!r}; it has {numbers}, ...", **told}
    finite = all(math.isfinite(float(value)) for value in values.values() if value is not None)
    first = _first_loss(folder)
    rose = first is not None and float(told.get("loss", 0.0)) > first
    if not finite:
        values = dict.fromkeys(values)  # JSON has no number for it
    return {"state": "diverged" if rose or not finite else "done", "values": values, **told}


def _first_loss(folder: Path) -> float | None:
    """The training loss of the first step, if the metrics have it."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            return float(json.loads(file.readline())["loss"])
        except (ValueError, KeyError, TypeError):
            return None


def share_programs(study: Path) -> None:
    """Keep compiled programs in the study, unless the environment names another folder. Before jax is imported."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((study / "cache" / "jax").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("LLMJAX_CACHE", str((study / "cache" / "llmjax").absolute()))


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the block by Stopped. While the loop trains, it has its own handler, which saves first."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped("stopped by SIGTERM; the same command goes on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _note(study: Study, trial: Trial, state: str, **more: Any) -> None:
    if processes.is_first():
        studies.note(study, trial, state, **more)
