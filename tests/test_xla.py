"""The installed jaxlib computes right: programs that some versions get wrong on CPUs, as a user's process runs them."""

import json
import os
import subprocess
import sys

import jax
import pytest

from llmjax.startup import xla

CANARIES = """
import json
import llmjax
import jax, jax.numpy as jnp, numpy as np

jax.config.update("jax_enable_x64", True)
wrong = {}
for dtype, rows in (("float64", 16385), ("float32", 32769), ("float32", 100000)):  # jax issue 39103
    x_BD = np.zeros((rows, 3), dtype)
    x_BD[:, 0] = np.arange(rows)
    squares_B = jax.jit(jax.vmap(lambda x_D: jnp.sum((jnp.eye(3, dtype=dtype) @ x_D) ** 2)))(x_BD)
    wrong[f"{rows} rows in {dtype}"] = int(np.sum(np.abs(squares_B - x_BD[:, 0] ** 2) > 1e-6 * x_BD[:, 0] ** 2))
a, b = np.random.default_rng(0).normal(size=(2, 3, 1, 2, 2, 8, 8, 8)).astype("float32")  # jax issue 40412
products = jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(a, b)
wrong["seven dimensions"] = int(np.sum(np.abs(products - np.sum(a * b, axis=3)) > 1e-5))
x_BLD = np.random.default_rng(0).normal(size=(129, 16, 16)).astype("float32")
sums_BL = jax.jit(lambda x_BLD, c: jnp.sum((x_BLD @ jnp.full_like(x_BLD, c)) * x_BLD, axis=-1))(x_BLD, 1.5)
wrong["a constant matrix"] = int(np.sum(~(np.abs(sums_BL - 1.5 * np.sum(x_BLD, -1) ** 2) < 1e-3)))
print(json.dumps(wrong))
"""


def test_programs_that_some_versions_of_jaxlib_get_wrong_are_right():
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", CANARIES], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    wrong = json.loads(done.stdout)
    assert len(wrong) == 5
    assert not any(wrong.values()), wrong


@pytest.fixture
def version(monkeypatch):
    """Have jaxlib say that it is another version; XLA_FLAGS is as before afterwards."""
    jax.devices()  # JAX reads its flags when it starts: not while they are changed here
    monkeypatch.setenv("XLA_FLAGS", "")
    return lambda version: monkeypatch.setattr("jaxlib.version.__version__", version)


@pytest.mark.parametrize("affected", ["0.10.2", "0.10.2.dev20260601", "0.11.2", "0.12.0.1"])
@pytest.mark.filterwarnings("ignore:JAX started before")
def test_flags_of_the_user_stay_beside_ours(version, affected, monkeypatch, tmp_path):
    version(affected)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    xla.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type=-reduce"
    xla.configure()
    assert os.environ["XLA_FLAGS"].count("ynn") == 1
    monkeypatch.setenv("XLA_FLAGS", own := "--xla_cpu_experimental_ynn_fusion_type=-dot")
    xla.configure()
    assert os.environ["XLA_FLAGS"] == own
    (tmp_path / "flags").write_text("--xla_cpu_max_isa=AVX2\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    xla.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type=-reduce"


@pytest.mark.parametrize("other", ["0.10.1", "0.13.0", "1.0"])
def test_versions_that_may_not_know_the_flag_are_told_nothing(version, other):
    """A flag that XLA does not know would end the process."""
    version(other)
    xla.configure()
    assert os.environ["XLA_FLAGS"] == ""


def test_flags_that_come_too_late_are_said_loudly(version):
    jax.devices()
    version("0.10.2")
    with pytest.warns(RuntimeWarning, match="import llmjax before the first computation"):
        xla.configure()
