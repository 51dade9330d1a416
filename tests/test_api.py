"""`llmjax.load` gives back the model that was saved, and says what is missing when it cannot."""

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, mesh_of, prepare_steps, tiny_config

import llmjax
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.parallel import reading
from llmjax.parallel.mesh import row_ways
from llmjax.train import checkpoint

TEXT = "import os\n\ndef read(path):\n    return path\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of which two checkpoints and the tokenizer were saved; the model is not trained."""
    folder = tmp_path_factory.mktemp("api") / "run"
    (folder / "tokenizer").mkdir(parents=True)
    byte_tokenizer().save(folder / "tokenizer")
    c = tiny_config(train__ema=0.9)
    state, _, _ = prepare_steps(c, mesh_of("data=1"))
    checkpoints = checkpoint.manager(folder / "checkpoints", keep=2)
    for step in (4, 8):
        changed = state.replace(ema=jax.tree.map(lambda x, by=step: x * by, state.params))
        checkpoint.save(checkpoints, changed, step=step, meta={"step": step, "config": c.to_dict()})
    checkpoints.wait_until_finished()
    checkpoints.close()
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def test_a_loaded_model_gives_the_logits_of_the_saved_moving_average(run):
    model = llmjax.load(run)
    state, _, _ = prepare_steps(tiny_config(train__ema=0.9), mesh_of("data=1"))
    saved = jax.tree.map(lambda x: x * 8, state.params)
    assert model.step == 8
    assert model.config.train.ema == 0.9
    assert_same_bits(model.params, saved)
    tokens_BL = np.arange(24).reshape(2, 12)
    logits_BLV = model.logits(tokens_BL)
    assert (logits_BLV.shape, logits_BLV.dtype) == ((2, 12, model.config.model.vocab_size), np.float32)
    wanted = model.module.apply({"params": jax.device_get(saved)}, tokens_BL)
    np.testing.assert_allclose(logits_BLV, wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_can_be_chosen_by_its_step_or_its_folder(run):
    earlier = llmjax.load(run, step=4)
    assert earlier.step == 4
    assert_same_bits(earlier.params, llmjax.load(run / "checkpoints" / "4").params)


@pytest.mark.slow  # test_engine.py writes on a mesh, and a model too large for a device is divided below
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4 tensor=2"])
def test_every_mesh_gives_the_same_loss_and_text(run, mesh, request):
    many = llmjax.load(run, mesh=mesh)
    request.getfixturevalue("one_device")
    one = llmjax.load(run)
    assert many.mesh.size == 8
    assert math.isclose(many.loss(TEXT).nats, one.loss(TEXT).nats, rel_tol=1e-5)
    prompts = ["def f", "", "import a lot of things"]
    texts = [[c.text for c in m.generate(prompts, max_new_tokens=12, temperature=0.0)] for m in (one, many)]
    assert texts[0] == texts[1]


def test_a_model_larger_than_a_device_is_divided_over_as_few_as_hold_it(run, monkeypatch):
    whole = llmjax.load(run)
    assert row_ways(whole.mesh) == 8
    bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    monkeypatch.setattr(reading, "memory", lambda device: bytes)  # of which only a part is for parameters
    divided = llmjax.load(run)
    assert dict(divided.mesh.shape)["tensor"] == 2 and row_ways(divided.mesh) == 4
    assert math.isclose(divided.loss(TEXT).nats, whole.loss(TEXT).nats, rel_tol=1e-5)


def test_a_mesh_that_does_not_fit_is_the_settings_fault(run):
    with pytest.raises(ValueError, match="infer.mesh='tensor=3' asks for 3 devices"):
        llmjax.load(run, mesh="tensor=3")


def test_the_loss_of_a_text_counts_every_token_and_its_end_once(run, one_device):
    model = llmjax.load(run)
    score = model.loss(TEXT[:14])
    ids = [1, *model.tokenizer.encode(TEXT[:14]), 2]
    log_p_BLV = jax.nn.log_softmax(model.logits(np.array([ids[:-1]])))
    nats = -sum(float(log_p_BLV[0, i, target]) for i, target in enumerate(ids[1:]))
    assert (score.tokens, score.bytes) == (15, 14)
    assert math.isclose(score.nats, nats, rel_tol=1e-5)
    assert math.isclose(score.bits_per_byte, nats / math.log(2) / 14, rel_tol=1e-5)
    assert math.isclose(score.perplexity, math.exp(nats / 15), rel_tol=1e-5)
    long = model.loss(TEXT)  # longer than the training length: several windows
    assert (long.tokens, long.bytes) == (len(TEXT) + 1, len(TEXT))


def test_generate_takes_its_defaults_from_the_config(run, one_device):
    model = llmjax.load(run)
    default = model.generate(["def "])[0]
    assert 1 <= len(default.tokens) <= model.config.generate.max_new_tokens
    given = model.generate(["def "], max_new_tokens=9, seed=1)[0]
    assert len(given.tokens) == 9 or given.finish == "eos"


def test_windows_longer_than_the_learned_positions_are_refused(run, one_device):
    model = llmjax.load(run)
    c = tiny_config(model__position="learned", model__max_length=16)
    with pytest.raises(ValueError, match="sequence_length=17 is more than the model's 16 learned positions"):
        dataclasses.replace(model, config=c).score([np.array([1, 5, 2])], sequence_length=17)


def test_logits_take_only_ids_of_the_vocabulary(run, one_device):
    model = llmjax.load(run)
    for tokens, message in (([1, 2], r"\(batch, length\)"), ([[0.5]], "integers"), ([[320]], "from 0 to 319")):
        with pytest.raises(ValueError, match=message):
            model.logits(tokens)


def test_what_is_missing_is_named(copied, tmp_path):
    with pytest.raises(ValueError, match=r"there is no run or checkpoint .*nowhere"):
        llmjax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="5"):
        llmjax.load(copied, step=5)
    (copied / "tokenizer").rename(copied / "aside")
    with pytest.raises(ValueError, match="tokenizer"):
        llmjax.load(copied)
    (copied / "checkpoints").rename(copied / "aside2")
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        llmjax.load(copied)


def test_a_truncated_checkpoint_is_named(copied):
    files = [p for p in (copied / "checkpoints" / "8" / "ema").rglob("*") if p.is_file() and p.stat().st_size > 2000]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoint .*8 cannot be read"):
        llmjax.load(copied)
    assert llmjax.load(copied, step=4).step == 4


def test_importing_llmjax_imports_nothing_heavy():
    code = "import sys, llmjax; assert llmjax.load; print(sorted({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
