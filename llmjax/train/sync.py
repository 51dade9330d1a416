"""Flags that the processes of a job exchange every step: stop, save, and which process is slowest.

A signal reaches one process and clocks differ, yet all processes must write a checkpoint at the same step. Each step
therefore reduces the flags over all processes, in a small program of its own behind the step's. A process reads the
result one step later, when it no longer has to wait for it. A process that is alone has its flags at once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Flags:
    """The flags of one process after a step, or those of all processes reduced to one."""

    stop: bool = False  # a signal came
    save: bool = False  # the time for a checkpoint has come
    seconds: float = 0.0  # host time of this step; reduced: the maximum
    slowest: int = 0  # reduced: the process with that maximum


class Sync:
    """Reduces the flags of all processes of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._processes = np.array([device.process_index for device in mesh.devices.flat])
        self._alone = len(set(self._processes.tolist())) == 1
        self._rows = int(np.sum(self._processes == jax.process_index()))
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))  # a row a device
        self._reduce = jax.jit(_reduce, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def exchange(self, flags: Flags) -> Flags:
        """Send this process's flags and return the reduced flags of the step before, without waiting.

        Every process must call this after every step.
        """
        if self._alone:
            return flags
        row = np.array([[flags.stop, flags.save, flags.seconds]], np.float32)
        mine = jax.make_array_from_process_local_data(self._places, np.repeat(row, self._rows, axis=0))
        before, self._pending = self._pending, self._reduce(mine)
        return Flags() if before is None else self._read(before)

    def wait(self, flags: Flags) -> Flags:
        """Send this process's flags, wait for all processes, and return everything not read yet: when no step follows."""
        if self._alone:
            return flags
        before = self.exchange(flags)
        assert self._pending is not None
        now, self._pending = self._read(self._pending), None
        return Flags(before.stop or now.stop, before.save or now.save, now.seconds, now.slowest)

    def _read(self, reduced: jax.Array) -> Flags:
        stop, save, seconds, device = np.asarray(reduced).tolist()
        return Flags(bool(stop), bool(save), seconds, int(self._processes[int(device)]))


def _reduce(flags_P3: jax.Array) -> jax.Array:
    """(P devices, 3) float32 -> (4,): the maximum of each flag, and the device with the most seconds."""
    slowest = jnp.argmax(flags_P3[:, 2]).astype(jnp.float32)  # exact up to 16 million devices
    return jnp.append(jnp.max(flags_P3, axis=0), slowest)
