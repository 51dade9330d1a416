"""Every family: what is imported writes transformers' greedy text; exported again it answers the same, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf import Case, family_of, inputs, make_theirs
from hf_decoders import DECODERS
from hf_encoders import ENCODERS

import llmjax
from llmjax.interop.read import import_model
from llmjax.interop.write import export_model

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
    model, *_ = make_theirs(case, tmp_path / "made", seed=0)
    import_model(tmp_path / "made", tmp_path / "run", tokenizer="none")
    prompt, new = list(range(5, 14)), 12  # longer than the windows of the cases
    model.generation_config.eos_token_id = None
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new)[0, len(prompt) :].tolist()
    ours = llmjax.load(tmp_path / "run").generate([prompt], max_new_tokens=new, temperature=0.0, top_p=1.0)[0].tokens
    assert list(ours) == theirs
