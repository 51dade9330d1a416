"""The mesh of a model that is only read: a few devices hold each copy, and the copies work on different rows."""

import math
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax import human
from llmjax.errors import UserError
from llmjax.parallel import placement
from llmjax.parallel.mesh import make_mesh

SHARE = 0.7  # of a device's memory is for parameters; the rest for caches, activations and logits


def own_devices() -> list[jax.Device]:
    """The devices of this process: each process reads the model for itself."""
    return jax.local_devices()


def memory(device: jax.Device) -> int:
    """Bytes of a device's memory; 0 where it is not known, as on CPU."""
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


def reading_mesh(line: str, shapes: Any, c: ConfigDict) -> Mesh:
    """The mesh that a line asks for over this process's devices; without a line the one with most copies of the model.

    A copy is divided over tensor if that divides its dimensions, else over fsdp, which gathers parameters as they are used.

    Args:
        line: axes and sizes, such as "tensor=4 data=-1"; "": choose by the devices' memory.
        shapes: the parameters' shapes and dtypes.
        c: a whole config.

    Raises:
        UserError: for a line that does not fit the devices or the model, or a model that they cannot hold together.
    """
    devices = own_devices()
    if line:
        return make_mesh(line, devices=devices, key="infer.mesh")
    limit = min(memory(device) for device in devices)
    needs = []
    for ways in (n for n in range(1, len(devices) + 1) if len(devices) % n == 0):
        for axis in ("tensor", "fsdp"):
            try:
                mesh = make_mesh(f"{axis}={ways} data=-1", devices=devices)
                places = placement.parameter_shardings(shapes, mesh, rules=c.parallel.rules)
            except UserError:  # a dimension that the axis does not divide, or a torus that has no such sides
                if ways == 1:  # neither
                    raise
                continue
            pieces = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, places)
            needs.append(sum(jax.tree.leaves(pieces)))
            if not limit or needs[-1] <= SHARE * limit:
                return mesh
    raise UserError(
        f"the parameters take at least {human.size(min(needs))} on each of the {len(devices)} devices of this process, "
        f"which have {human.size(limit)}: read the model where there are more, or larger ones; infer.mesh divides it "
        "otherwise"
    )
