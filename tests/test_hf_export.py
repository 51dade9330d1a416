"""Every family: what is imported writes transformers' greedy text; exported again it answers the same, bit for bit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from hf import Case, family_of, greedy_texts, inputs, make_theirs
from hf_decoders import DECODERS
from hf_encoders import ENCODERS

import llmjax
from llmjax import config, storage
from llmjax.interop.read import import_model
from llmjax.interop.write import export_model
from llmjax.model import head, transformer
from llmjax.train import folders

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
FIRST = list({case.family: case for case in reversed([*DECODERS, *ENCODERS])}.values())


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
def test_what_is_exported_loads_in_transformers_and_answers_the_same(case: Case, tmp_path: Path):
    model, theirs, _ = make_theirs(case, tmp_path / "made", seed=0)
    import_model(tmp_path / "made", tmp_path / "run", tokenizer="none")
    exported = export_model(tmp_path / "run", tmp_path / "exported", shard_bytes=100_000)
    assert exported.model_type in family_of(theirs).model_types  # mT5 is written as T5, XLM-RoBERTa as RoBERTa
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    again, info = getattr(transformers, written["architectures"][0]).from_pretrained(
        tmp_path / "exported", attn_implementation=case.attention, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    batch = inputs(vocab=theirs["vocab_size"], length=20, seed=0, more=case.more)
    real = batch["mask"].astype(bool)
    np.testing.assert_array_equal(case.theirs(again.eval(), batch)[real], case.theirs(model, batch)[real])


@pytest.mark.parametrize("case", [case for case in FIRST if case in DECODERS], ids=lambda case: case.name)
def test_what_is_imported_writes_the_same_greedy_text(case: Case, tmp_path: Path):
    ours, theirs = greedy_texts(case, tmp_path, seed=0)
    assert ours == theirs


@pytest.mark.parametrize("task", ["reward", "classify", "number"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_judges_texts_says_the_same_in_transformers(tmp_path: Path, name: str, task: str):
    case = next(case for case in FIRST if case.family == name)
    _, theirs, _ = make_theirs(case, tmp_path / "made", seed=0)
    import_model(tmp_path / "made", tmp_path / "run", tokenizer="none")
    judge_of(tmp_path / "run", tmp_path / "judge", task)
    exported = export_model(tmp_path / "judge", tmp_path / "exported")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    ids = np.random.default_rng(0).integers(5, theirs["vocab_size"] - 5, (1, 12))
    with torch.no_grad():
        said = again.eval()(torch.tensor(ids)).logits.numpy()[0]
    model = llmjax.load(tmp_path / "judge")
    hidden_BLD = model.module.apply({"params": model.params}, ids.astype(np.int32), output="hidden")
    if task == "reward":
        wanted = np.asarray(head.values(model.module, model.params, hidden_BLD))[0, -1:] - 0.25
        assert exported.shift == 0.25 and "its scores are ours less 0.25" in str(exported)
    else:
        wanted = np.asarray(head.classes(model.module, model.params, hidden_BLD))[0, -1]
        assert list(again.config.id2label.values()) == (["no", "so", "yes"] if task == "classify" else ["LABEL_0"])
    np.testing.assert_allclose(said, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_model_that_judges_in_transformers_says_the_same_here(tmp_path: Path, name: str, count: int):
    case = next(case for case in FIRST if case.family == name)
    kind = case.model.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    judge = dataclasses.replace(case, model=kind, fields={**case.fields, "num_labels": count})
    there, theirs, _ = make_theirs(judge, tmp_path / "made", seed=0)
    import_model(tmp_path / "made", tmp_path / "run", tokenizer="none")
    ids = np.random.default_rng(0).integers(5, theirs["vocab_size"] - 5, (1, 12))
    with torch.no_grad():
        said = there(torch.tensor(ids)).logits.numpy()[0]
    model = llmjax.load(tmp_path / "run")
    hidden_BLD = model.module.apply({"params": model.params}, ids.astype(np.int32), output="hidden")
    ours = head.values if count == 1 else head.classes
    found = np.asarray(ours(model.module, model.params, hidden_BLD))[0, -1].reshape(-1)
    np.testing.assert_allclose(found, said, rtol=1e-4, atol=1e-5)


def judge_of(run: Path, folder: Path, task: str) -> None:
    """Make a model that judges texts of an imported one: a checkpoint with a head of random numbers."""
    step = folders.newest(run)
    meta = folders.read_meta(step)
    c = config.from_json(json.dumps(meta["config"]))
    with c.unlocked():
        c.objective.name = "reward" if task == "reward" else "classify"
        c.model.value_head = task == "reward"
        c.model.classes = {"reward": 0, "classify": 3, "number": 1}[task]
        c.objective.classify.labels = ("no", "so", "yes") if task == "classify" else ()
        c.data.format = "conversations"
        c.train.sequence_length = 16
    shapes = transformer.param_shapes(transformer.build(c.model))
    random = np.random.default_rng(1)
    made = {
        name: jax.numpy.full(leaf.shape, 0.25) if name == "value/bias" else jax.numpy.asarray(random.normal(size=leaf.shape), "float32")
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }  # fmt: skip
    made |= traverse_util.flatten_dict(llmjax.load(run).params, sep="/")
    where = folder / "checkpoints" / "1"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((where / "params").absolute(), traverse_util.unflatten_dict(made, sep="/"))
    storage.write_json(where / "meta" / "metadata", {**meta, "config": c.to_dict()})
    storage.write_text(folder / "config.json", config.to_json(c))
