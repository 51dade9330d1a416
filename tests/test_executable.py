"""Compiled steps in a file: a run that loads them is the same run, and those of another run are refused."""

import json

import pytest
from helpers import mesh_of, tiny_config, train

from llmjax import config
from llmjax.scaling import compiler
from llmjax.train import executable


def save_steps(c, path, mesh):
    sizes = compiler.stages(c)
    made = {s: compiler.compile_stage(c, mesh, sizes, s) for s in sizes.stages}
    executable.save(
        path, {executable.name_of(s): (m.lowered, m.compiled) for s, m in made.items()}, mesh=mesh, options={}
    )


def test_a_run_with_a_saved_step_is_the_same_run(tmp_path, one_device):
    c = tiny_config(train__duration="4 steps", train__eval_every="0 steps", model__attention="auto")
    mesh = mesh_of("data=1")
    save_steps(c, tmp_path / "steps", mesh)
    losses = {}
    for name, file in (("plain", ""), ("saved", str(tmp_path / "steps"))):
        config.set_key(c, "train.executable", file)
        train(c, tmp_path / name)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert len(losses["plain"]) == 4
    assert losses["plain"] == losses["saved"]


@pytest.mark.slow
def test_a_saved_step_of_another_run_is_refused(tmp_path):
    c = tiny_config(parallel__mesh="fsdp=2")
    mesh, path = mesh_of("fsdp=2"), tmp_path / "steps"
    save_steps(c, path, mesh)
    sizes = compiler.stages(c)
    made = compiler.compile_stage(c, mesh, sizes, sizes.stages[0])
    name = executable.name_of(sizes.stages[0])
    assert executable.load(path, name, made.lowered, mesh=mesh, options={}) is not None
    other = compiler.compile_stage(
        tiny_config(parallel__mesh="fsdp=2", optimizer__learning_rate=5e-3), mesh, sizes, sizes.stages[0]
    )
    with pytest.raises(ValueError, match="of another step"):
        executable.load(path, name, other.lowered, mesh=mesh, options={})
    with pytest.raises(ValueError, match="devices was 2 and is 1"):
        executable.load(path, name, made.lowered, mesh=mesh_of("fsdp=1"), options={})
    with pytest.raises(ValueError, match="no program for 3 rows"):
        executable.load(path, "3 rows in 1", made.lowered, mesh=mesh, options={})
    with pytest.raises(ValueError, match="not there"):
        executable.load(tmp_path / "nothing", name, made.lowered, mesh=mesh, options={})
