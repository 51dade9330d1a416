"""Part of a model can be trained: the rest has no gradient and no state, is written once, and comes back in every way."""

import functools
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import (
    abstract_state,
    assert_same_bits,
    make_batch,
    mesh_of,
    prepare_steps,
    stopping_at,
    tiny_config,
    train,
)

import llmjax
from llmjax.interop.stacked import StackedReader
from llmjax.parallel import mesh as meshes
from llmjax.train import checkpoint
from llmjax.train.frozen import combine, split

SETTINGS = {"optimizer__train": "mlp/|final_norm", "train__ema": 0.9, "train__duration": "4 steps",
            "checkpoint__every": "2 steps"}  # fmt: skip


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared_run):
    """A run of which the MLPs were trained, stopped in the middle and continued."""
    workdir, c = tmp_path_factory.mktemp("frozen") / "run", tiny_config(**SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", functools.partial(meshes.make_mesh, devices=jax.devices()[:1]))
        with pytest.raises(KeyError, match="stop here"):
            train(c, workdir, batch=stopping_at(c, 3))
        train(c, workdir)
    shutil.copytree(prepared_run / "tokenizer", workdir / "tokenizer")
    return workdir


def test_only_what_is_trained_moves_and_has_state(run):
    state, abstract, _ = prepare_steps(tiny_config(**SETTINGS), mesh_of("data=1"))
    end = checkpoint.restore_step(run / "checkpoints" / "4", abstract).state
    before, after = flat(combine(state.params, state.frozen)), flat(combine(end.params, end.frozen))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "mlp/" in name or "final_norm" in name}
    assert flat(end.params).keys() == flat(end.ema).keys() == moved
    moments = [leaf for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(before[name].size for name in moved)


@pytest.mark.slow
def test_stopped_and_continued_it_ends_in_the_same_bits(run, tmp_path, one_device):
    c = tiny_config(**SETTINGS)
    train(c, tmp_path / "whole")
    abstract = abstract_state(c, mesh_of("data=1"))
    assert_same_bits(
        *(checkpoint.restore_step(w / "checkpoints" / "4", abstract)[0] for w in (run, tmp_path / "whole"))
    )


def test_what_is_frozen_is_written_once_and_read_with_every_checkpoint(run, one_device):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "frozen"]
    abstract = abstract_state(tiny_config(**SETTINGS), mesh_of("data=1"))
    state = checkpoint.restore_step(run / "checkpoints" / "4", abstract).state
    expected = flat(combine(state.ema, state.frozen))
    reader = StackedReader(run / "checkpoints" / "4", "ema")  # as an export reads
    model = llmjax.load(run)
    loaded = flat(model.params)
    assert expected.keys() == reader.params.keys() == loaded.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(reader.read(name, None), array, err_msg=name)
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    assert model.loss("a line").loss > 0


def test_the_gradient_of_a_part_is_that_of_the_whole():
    """One step of plain SGD moves what is trained exactly as a step of everything does."""
    plain = {"optimizer__name": "sgd", "optimizer__weight_decay": 0.0, "optimizer__clip_norm": 0.0}
    whole, _, step_whole = prepare_steps(tiny_config(**plain), mesh_of("data=1"))
    part, _, step_part = prepare_steps(tiny_config(**plain, optimizer__train="attention"), mesh_of("data=1"))
    batch = make_batch(tiny_config(), 0)
    after_whole, after_part = flat(step_whole(whole, batch)[0].params), flat(step_part(part, batch)[0].params)
    assert all("attention" in name for name in after_part)
    for name, array in after_part.items():
        np.testing.assert_allclose(array, after_whole[name], rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_pattern_that_is_wrong_is_named():
    with pytest.raises(llmjax.errors.UserError, match=r"optimizer\.train='\(' is no regular expression"):
        tiny_config(optimizer__train="(")
    with pytest.raises(llmjax.errors.UserError, match=r"optimizer\.train='lora_' is in the path of no parameter"):
        split({"embedding": np.ones(1)}, tiny_config(optimizer__train="lora_"))
