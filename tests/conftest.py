"""What several test files share: eight fake devices, strict rank promotion, and a tiny run prepared once."""
# ruff: noqa: E402 - the environment must be set before jax is imported

import atexit
import gc
import os
import shutil
import tempfile

from jaxlib.version import __version__ as jaxlib_version

# What is imported stays, and what is traced is mostly kept: the garbage collector need not look so often.
gc.set_threshold(50_000, 20, 100)

# Before jax starts: eight CPU devices, so that meshes can be tested on a laptop; and a compiler that hurries, because
# tests compile far longer than they compute. What is compiled is kept as long as the tests run, in one folder for all
# workers and the commands that they start: workers inherit these settings. `.ci/run` names a folder for all its tests.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jaxlib_version.startswith("0.10."):  # a third of the time to compile; later versions have no other code generator
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = tempfile.mkdtemp(prefix="llmjax-tests-")
        atexit.register(shutil.rmtree, compiled, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # the caller's win
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every command compiles all of jax, 3 s each
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["LLMJAX_CACHE"] = "off"  # what a test keeps between starts lies in a folder of its own

import collections
import functools
import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from browsing import browser  # noqa: F401 - a fixture
from helpers import WORDS, tiny_config

from llmjax import recipe
from llmjax.parallel import mesh, reading
from llmjax.train import hardware

jax.config.update("jax_numpy_rank_promotion", "raise")


# What tests cost, in seconds of a core: unlike pytest's --durations the same on a busy machine.
STARTED = pytest.StashKey[float]()


def _cpu_seconds() -> float:
    """Used by this process, and by those it started that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[STARTED] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append(("cpu", _cpu_seconds() - item.stash[STARTED]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files: collections.Counter[str] = collections.Counter()
    for report in (one for kind in terminalreporter.stats.values() for one in kind):
        files[(getattr(report, "nodeid", "") or "").partition("::")[0]] += dict(
            getattr(report, "user_properties", ())
        ).get("cpu", 0)
    if sum(files.values()) > 60:
        terminalreporter.section(
            f"{sum(files.values()) / 60:.1f} minutes of a core; the twenty files that cost most, in seconds"
        )
        for name, seconds in files.most_common(20):
            terminalreporter.line(f"{seconds:8.1f}  {name}")


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few small text files, every one different."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(24):
        words = (WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(120))
        (folder / f"{i:02}.txt").write_text(f"Text number {i}.\n" + " ".join(words) + "\n")
    return folder


@pytest.fixture(scope="session")
def prepared_run(tiny_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prepare and tokenizer stages are done. Tests change copies of it, never itself."""
    workdir = tmp_path_factory.mktemp("prepared") / "run"
    recipe.run(tiny_config(tiny_sources).lock(), workdir, ("prepare", "tokenizer"))
    return workdir


@pytest.fixture
def tiny_run(prepared_run: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run, the test's own."""
    return shutil.copytree(prepared_run, tmp_path / "run")


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop sees one device of a known speed: what is not about meshes is tested faster so."""
    monkeypatch.setattr(mesh, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setattr(reading, "own_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(hardware, "_measured_cpu", lambda: 1e11)
