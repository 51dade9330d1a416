"""Peak FLOP/s of devices, the denominator of MFU."""

import functools
import time

import jax
import jax.numpy as jnp

from llmjax.parallel import chips


def peak_flops(device: jax.Device, *, device_count: int) -> tuple[float, str]:
    """Peak FLOP/s of all `device_count` devices together, and the origin of the number.

    The peak of a CPU is measured: the best of a few float32 matrix products on all cores. An accelerator that is not in
    the table gives (0, reason), and no MFU is reported.
    """
    if device.platform == "cpu":
        return _measured_cpu(), "measured: float32 matrix product on all cores"
    chip = chips.of_device_kind(device.device_kind)
    if chip is None:
        return 0.0, f"not known for {device.device_kind}"
    return chip.flops / chip.devices * device_count, f"published bfloat16 peak of {chip.kind}"


@functools.cache  # once for all trainings of a process
def _measured_cpu() -> float:
    size, best = 1536, float("inf")
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
