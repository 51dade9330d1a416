"""Processes that train together decide together: to stop, to save, and who is slow.

A signal reaches one process, a clock strikes in each at another moment, yet a checkpoint is written by all at the same
step. So each step carries the wishes of all processes around: a tiny program of its own behind the step's, whose answer
is read a step later, when it is there without waiting. One process alone has its wish at once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Wishes:
    """What a process wants after a step, or what all together have agreed on."""

    stop: bool = False  # a signal came
    save: bool = False  # the time for a checkpoint has come
    seconds: float = 0.0  # what the host needed for its own part of the step; of all: the most of any
    slowest: int = 0  # the process that needed it


class Agreement:
    """The wishes of all processes, a step late; of one process, at once."""

    def __init__(self, mesh: Mesh) -> None:
        self._processes = np.array([device.process_index for device in mesh.devices.flat])
        self._alone = len(set(self._processes.tolist())) == 1
        self._rows = int(np.sum(self._processes == jax.process_index()))
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))  # a row a device
        self._largest = jax.jit(_largest, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def ask(self, wishes: Wishes) -> Wishes:
        """Tell the others, and return what all wanted a step ago. Every process must call this after every step."""
        if self._alone:
            return wishes
        row = np.array([[wishes.stop, wishes.save, wishes.seconds]], np.float32)
        mine = jax.make_array_from_process_local_data(self._places, np.repeat(row, self._rows, axis=0))
        before, self._asked = self._asked, self._largest(mine)
        return Wishes() if before is None else self._read(before)

    def last(self, wishes: Wishes) -> Wishes:
        """What all want now, waiting for it: once, when no step follows."""
        if self._alone:
            return wishes
        before = self.ask(wishes)
        assert self._asked is not None
        now, self._asked = self._read(self._asked), None
        return Wishes(before.stop or now.stop, before.save or now.save, now.seconds, now.slowest)

    def _read(self, answer: jax.Array) -> Wishes:
        stop, save, seconds, place = np.asarray(answer).tolist()
        return Wishes(bool(stop), bool(save), seconds, int(self._processes[int(place)]))


def _largest(wishes_P3: jax.Array) -> jax.Array:
    """(P devices, 3) float32 -> (4,): the largest of each, and the device of the largest seconds."""
    slowest = jnp.argmax(wishes_P3[:, 2]).astype(jnp.float32)  # exact up to 16 million devices
    return jnp.append(jnp.max(wishes_P3, axis=0), slowest)
