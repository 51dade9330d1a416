"""Several processes, one run: how they find each other, what only the first does, and how they end together.

A job on several hosts is the same command, started once on each host. Before JAX starts each process finds the others here:
by the variables that `launch/` sets, by Slurm's, or by what a TPU pod tells JAX. A process that is alone does nothing. All
processes must see the same files under the run's folder (a network disk, or one machine): the first process writes files
that exist once, and the others wait for it. A lost process is noticed by its missing heartbeat.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llmjax.errors import UserError

T = TypeVar("T")

# What launch/ sets; LLMJAX_PROCESS may be missing in an indexed job of Kubernetes, which numbers its pods itself.
COORDINATOR, COUNT, INDEX = "LLMJAX_COORDINATOR", "LLMJAX_PROCESSES", "LLMJAX_PROCESS"
LOCAL = "LLMJAX_LOCAL_PROCESSES"  # processes on this machine, which share its cores
CLUSTER = "LLMJAX_CLUSTER"  # "tpu": a TPU pod, whose hosts JAX finds itself
POD_INDEX = "JOB_COMPLETION_INDEX"
STOPPED = (
    "LLMJAX_STOPPED_STATUS"  # exit status of a run that was told to stop and has saved, for a scheduler; default 0
)
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

POLL_MILLISECONDS = 60_000  # of one request to the coordinator, which is then repeated
BARRIER_SECONDS = 3600  # for all of them to read a checkpoint, or to compile


@dataclass(frozen=True)
class Cluster:
    """The job that this process is part of. `count` and `index` are None where JAX finds them when it starts."""

    kind: str  # explicit, slurm or tpu
    count: int | None = None
    index: int | None = None
    coordinator: str | None = None  # host:port of the first process; None: JAX knows
    local: int = 1  # processes on this machine


class FirstFailed(Exception):  # noqa: N818
    """The first process failed at what the others wait for; the message is its error's."""


_job: Cluster | None = None
_calls = itertools.count()  # all processes make the same calls in the same order, so the number is a name


def detect(env: Mapping[str, str]) -> Cluster | None:
    """The job that the environment describes; None: this process is alone.

    Raises:
        UserError: for variables of which some are missing, or that are no numbers in range.
    """
    if COORDINATOR in env or COUNT in env:
        return _explicit(env)
    if env.get(CLUSTER, "tpu") != "tpu":
        raise UserError(f"{CLUSTER}={env[CLUSTER]!r} is not known: set it to tpu, or unset it")
    if CLUSTER in env or "," in env.get("TPU_WORKER_HOSTNAMES", "") or env.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return Cluster("tpu")
    if all(name in env for name in SLURM) and env["SLURM_NTASKS"] != "1":
        # Inside `srun`: the batch script has SLURM_NTASKS too, but is not one of the processes.
        local = int(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", "1")).split("(")[0])
        return Cluster("slurm", int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]), local=local)
    return None


def _explicit(env: Mapping[str, str]) -> Cluster | None:
    given = {COORDINATOR: env.get(COORDINATOR), COUNT: env.get(COUNT), INDEX: env.get(INDEX, env.get(POD_INDEX))}
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{missing[0]} is not set, but others of {', '.join(given)} are: set all three or none")
    try:
        count, index, local = int(given[COUNT] or ""), int(given[INDEX] or ""), int(env.get(LOCAL, "1"))
    except ValueError:
        raise UserError(f"{COUNT}, {INDEX} and {LOCAL} must be whole numbers, not {given}") from None
    if not 0 <= index < count:
        raise UserError(f"{INDEX}={index} must be from 0 to {COUNT} - 1 = {count - 1}")
    return Cluster("explicit", count, index, given[COORDINATOR], local) if count > 1 else None


def own_gpus(env: Mapping[str, str], *, local: int) -> list[int] | None:
    """The GPUs of a process of Slurm among those that it sees: an equal part of them; None: it does not say.

    JAX takes GPU i in the i-th process of a node. That is not there where Slurm shows each process its own GPU alone, and
    leaves the others idle where a process has several.
    """
    visible = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(visible) == 1:
        return [0]
    each, rest = divmod(len(visible), local)
    first = int(env["SLURM_LOCALID"]) * each
    return list(range(first, first + each)) if each and not rest else None


def start(*, heartbeat_seconds: int, start_seconds: int) -> Cluster | None:
    """Join the job, once, before JAX starts; None where this process is alone.

    Args:
        heartbeat_seconds: a process that sends no heartbeat for so long is lost, and the others end.
        start_seconds: for the processes to find each other.

    Raises:
        UserError: for an environment that `detect` cannot read.
        ConnectionError: when the processes do not find each other.
    """
    global _job
    found = detect(os.environ) if _job is None else None
    if found is None:
        return _job
    import jax

    # JAX's own handler of SIGTERM would swallow the signal until training asks for it; the loop has its own agreement.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            cluster_detection_method="deactivate" if found.kind == "explicit" else None,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
            initialization_timeout=start_seconds,
            local_device_ids=own_gpus(os.environ, local=found.local) if found.kind == "slurm" else None,
        )
    except RuntimeError as error:
        where = found.coordinator or f"the coordinator that {found.kind} names"
        raise ConnectionError(
            f"process {found.index} of {found.count} did not find the others through {where} "
            f"({str(error).strip().splitlines()[0]}): check that all were started within "
            f"parallel.start_seconds={start_seconds} and that the port is free"
        ) from error
    if found.count is None:  # a TPU pod; asking starts JAX on it
        found = Cluster(found.kind, jax.process_count(), jax.process_index())
    _job = found if found.count and found.count > 1 else None
    return _job


def count() -> int:
    """How many processes the job has; 1 where this one is alone."""
    return 1 if _job is None or _job.count is None else _job.count


def index() -> int:
    """The number of this process, from 0."""
    return 0 if _job is None or _job.index is None else _job.index


def is_first() -> bool:
    """Whether this is the process that writes files that exist once."""
    return index() == 0


def cpu_share() -> int:
    """CPU devices of this process where several share a machine: an equal part of its cores, at least 1; 0: alone."""
    if _job is None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // _job.local)


def broadcast_from_first(make: Callable[[], T]) -> T:
    """The value of `make()` in the first process, returned in all of them: only the first calls it, the others wait.

    JSON must be able to hold the value. All processes must call this in the same order.

    Raises:
        FirstFailed: in the others, when `make` raised in the first. There its own error is raised.
    """
    if count() == 1:
        return make()
    name = f"llmjax/first/{next(_calls)}"
    if is_first():
        try:
            value = make()
        except BaseException as error:
            _client().key_value_set(name, json.dumps({"error": str(error) or type(error).__name__}))
            raise
        _client().key_value_set(name, json.dumps({"value": value}))
        return value
    answer = json.loads(_wait_for(name))
    if "error" in answer:
        raise FirstFailed(answer["error"])
    return answer["value"]


def say(text: str) -> None:
    """Print a line once a job, from the first process."""
    if is_first():
        print(text, flush=True)


def failures(message: str | None) -> list[str]:
    """The messages of all processes that give one, returned in all of them: whether something worked everywhere."""
    if count() == 1:
        return [] if message is None else [message]
    name = f"llmjax/all/{next(_calls)}"
    if message is not None:
        _client().key_value_set(f"{name}/{index()}", message)
    _client().wait_at_barrier(f"{name}/barrier", BARRIER_SECONDS * 1000)
    return [text for _, text in sorted(_client().key_value_dir_get(name))]


def barrier() -> None:
    """Wait until all processes are here, however long one of them takes to compile.

    On CPU the first program that talks to other processes must find them within half a minute (Gloo's limit).
    """
    if count() > 1:
        _client().wait_at_barrier(f"llmjax/barrier/{next(_calls)}", BARRIER_SECONDS * 1000)


def _wait_for(name: str) -> str:
    """A value of the coordinator, however long it takes. If the first process is lost, this one ends too."""
    import jax

    while True:
        try:
            return _client().blocking_key_value_get(name, POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _client() -> Any:
    # JAX has no public name for its coordinator's key-value store. Its public broadcast is a collective of devices, which
    # would start JAX before it is set up, and gives up after half a minute on CPU.
    from jax._src import distributed

    return distributed.global_state.client


def explain(error: BaseException) -> str:
    """One line about an error that the end of another process may have caused."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return (
        f"process {index()} of {count()} cannot go on ({type(error).__name__}: {first}). If another process was lost, "
        "that one's output says why; the same command goes on from the last checkpoint"
    )


def end(status: int) -> None:
    """Leave the job. After status 0 all processes end together; after an error this one ends at once, and the others too.

    Without effect where this process is alone. After an error the process does not wait for its threads.
    """
    global _job
    if _job is None:
        return
    import jax

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status:
        os._exit(status)
    jax.distributed.shutdown()
    _job = None
