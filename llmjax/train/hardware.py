"""Peak arithmetic of devices, the denominator of MFU."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device as JAX counts devices, from the makers' data sheets and documentation.
PEAK_FLOPS = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU7x": 1153.5e12,  # Ironwood, half a chip: 2,307 a chip of two cores
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device, *, device_count: int) -> tuple[float, str]:
    """Peak FLOP/s of all `device_count` devices together, and where the number is from.

    A CPU's is measured: the best of a few float32 matrix products that use all cores. An accelerator that is not in the
    table gives (0, reason), and MFU is then not reported.
    """
    if device.platform == "cpu":
        return _measured_cpu(), "measured: float32 matrix product on all cores"
    best = max((name for name in PEAK_FLOPS if device.device_kind.startswith(name)), key=len, default="")
    if not best:
        return 0.0, f"not known for {device.device_kind}"
    return PEAK_FLOPS[best] * device_count, f"published bfloat16 peak of {best}"


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
