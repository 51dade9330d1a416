"""Options of the compiler are chosen by chip, refused by name, part of what a program is, and exact unless they say otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh_of, tiny_config, train

from llmjax import config
from llmjax.errors import UserError
from llmjax.parallel import compiler_options
from llmjax.report import facts
from llmjax.train import check, executable

ROOT = Path(__file__).parent.parent
HARMLESS = "xla_cpu_enable_concurrency_optimized_scheduler=false"


def device(kind, platform="tpu"):
    return SimpleNamespace(device_kind=kind, platform=platform)


def test_a_set_has_the_options_of_the_chip_and_later_entries_win():
    v5p, v4, cpu = device("TPU v5"), device("TPU v4"), device("cpu", "cpu")
    assert "xla_tpu_enable_async_collective_fusion" in compiler_options.choose(["overlap"], v5p)
    assert "xla_tpu_enable_async_collective_fusion" not in compiler_options.choose(["overlap"], v4)
    assert compiler_options.choose(["vmem", "xla_tpu_scoped_vmem_limit_kib=1"], v5p) == {
        "xla_tpu_scoped_vmem_limit_kib": "1"
    }
    assert compiler_options.choose(["overlap"], cpu) == {}
    assert "none for cpu" in compiler_options.describe(["overlap"], cpu)
    assert all("gpu" in name for name in compiler_options.choose(["overlap"], device("NVIDIA H100 80GB HBM3", "gpu")))


def test_sets_that_may_change_numbers_say_so_and_no_config_names_one():
    v5p = device("TPU v5")
    assert "may change numbers" not in compiler_options.describe(["overlap", "gathers"], v5p)
    for risky in ("vmem", "data_parallel", "xla_tpu_scoped_vmem_limit_kib=1"):
        assert f"{risky} may change numbers" in compiler_options.describe(["overlap", risky], v5p)
    for path in (ROOT / "configs" / "runs").glob("*.py"):
        chosen = config.load(str(path)).parallel.compiler
        assert all(compiler_options.SETS[name].exact for name in chosen), path


@pytest.mark.parametrize(
    ("entry", "message"),
    [("overlaps", "did you mean overlap?"), ("tpu_x=1", "xla_NAME=VALUE"), ("xla_x", "xla_NAME=VALUE")],
)
def test_an_entry_that_is_nothing_is_refused_before_anything_is_read(entry, message):
    with pytest.raises(UserError, match=message):
        check.check(tiny_config(parallel__compiler=(entry,)), None, fresh=True)


@pytest.mark.parametrize("option", ["xla_no_such_option=true", "xla_cpu_enable_fast_math=perhaps"])
def test_what_the_compiler_does_not_take_is_refused_by_name(option):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(2))
    name, _, value = option.partition("=")
    with pytest.raises(UserError, match=f"does not take {option}"):
        compiler_options.compile_with(lowered, {name: value})


# Of libtpu 0.0.52, for Llama 2 70B on v5p with the set `overlap`.
REFUSED = (
    "FAILED_PRECONDITION: Continuation fusion for AllGather is enabled on platform viperfish (variant: ), but it is not "
    "supported/recommended on platforms other than TPU v5e, and this might lead to many errors including but not limited to: "
    "incorrect results, hang, SDC, etc. Please disable it with xla_tpu_enable_async_collective_fusion=false "
)


def test_an_option_of_a_set_that_a_newer_compiler_refuses_is_named_and_can_be_turned_off():
    class Lowered:
        def compile(self, compiler_options):
            if compiler_options["xla_tpu_enable_async_collective_fusion"]:
                raise jax.errors.JaxRuntimeError(REFUSED)
            return "compiled"

    v5p, entries = device("TPU v5"), ["overlap"]
    with pytest.raises(
        UserError, match=r"does not take xla_tpu_enable_async_collective_fusion=true .*incorrect"
    ) as refused:
        compiler_options.compile_with(Lowered(), compiler_options.choose(entries, v5p))
    advised = re.search(r"add '(\S+)' behind the set", str(refused.value))[1]
    assert compiler_options.compile_with(Lowered(), compiler_options.choose([*entries, advised], v5p)) == "compiled"


def test_a_program_compiled_with_other_options_is_another_program():
    mesh, lowered = mesh_of("data=1"), jax.jit(lambda x: x - 1).lower(jnp.zeros(3))
    plain, same, other = (
        executable.compile_once(lowered, mesh=mesh, options=options)
        for options in ({}, {}, dict([HARMLESS.split("=")]))
    )
    assert plain is same
    assert plain is not other


def test_a_run_says_its_options_and_keeps_them_in_its_results_and_report(tmp_path, capsys, one_device):
    c = tiny_config(train__duration="2 steps", train__eval_every="0 steps", parallel__compiler=("overlap", HARMLESS))
    results = train(c, tmp_path)
    assert results["compiler_options"] == HARMLESS
    assert f"compiler options: overlap {HARMLESS}: {HARMLESS}" in capsys.readouterr().out
    run = SimpleNamespace(stages={"train": results}, manifest={}, config=None, curves=None)
    assert f"with the compiler's options {HARMLESS}" in facts.sentence(run)


TPU = """
import sys
import jax, jax.numpy as jnp
from llmjax.parallel import compiler_options
from llmjax.scaling.topology import compiler_lock, devices, parse_topology
with compiler_lock():
    for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
        device = devices(parse_topology(topology))[0]
        where = jax.sharding.SingleDeviceSharding(device)
        lowered = jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=where))
        for name in compiler_options.SETS:
            compiler_options.compile_with(lowered, compiler_options.choose([name], device))
"""


@pytest.mark.slow
def test_the_tpu_compiler_takes_every_option_of_the_table():
    pytest.importorskip("libtpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", TPU], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
