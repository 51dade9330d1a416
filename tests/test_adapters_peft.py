"""PEFT's format: what `peft` saved is read and answers the same, and what is written loads in `peft`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import few
from hf import GOLDEN, weights

import llmjax
from llmjax.errors import UserError
from llmjax.interop.peft import import_peft, read_peft
from llmjax.interop.peft_places import CONFIG, WEIGHTS
from llmjax.interop.peft_write import export_peft
from llmjax.interop.read import import_model
from llmjax.interop.tensors import Safetensors, Tensor, Writer
from llmjax.interop.write import export_model

R, TOKENS = 3, np.arange(24).reshape(2, 12) * 7 % 61
# name -> (stored model, modules of layer i, settings of adapter_config.json, ranks of modules that have another)
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any], dict[str, int]]] = {
    "lora": ("llama-llama3", "model.layers", LLAMA, {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"k_proj": 4}}, {"self_attn.k_proj": 5}),
    "fused": ("gpt2-plain", "transformer.h", ("attn.c_attn", "mlp.c_proj"), {"fan_in_fan_out": True}, {}),
    "dora": ("llama-llama3", "model.layers", LLAMA, {"use_dora": True, "use_rslora": True}, {}),
}  # fmt: skip


def save(file: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = Writer(file, {name: Tensor(array.dtype, array.shape) for name, array in tensors.items()})
    for name, array in tensors.items():
        writer.write(name, array)
    writer.close()


def make(folder: Path, name: str) -> dict[str, Any]:
    """FOLDER/base, a model for transformers, and FOLDER/peft, random adapters of it; what adapter_config.json says."""
    model, layers, modules, more, ranks = CASES[name]
    stored = json.loads((GOLDEN / f"{model}.json").read_text())
    tensors = {n: weights(n, tuple(shape), seed=0) for n, shape in stored["tensors"].items()}
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(stored["config"]))
    save(folder / "base" / "model.safetensors", tensors)
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [module.rpartition(".")[2] if "llama" in model else module for module in modules], **more,
    }  # fmt: skip
    adapters = {}
    for layer in range(3):
        for module in modules:
            at, rank = f"{layers}.{layer}.{module}", ranks.get(module, R)
            out, inner = tensors[f"{at}.weight"].shape[:: -1 if model.startswith("gpt2") else 1]
            adapters[f"base_model.model.{at}.lora_A.weight"] = weights(f"{at}.A", (rank, inner), seed=1)
            adapters[f"base_model.model.{at}.lora_B.weight"] = weights(f"{at}.B", (out, rank), seed=1)
            if more.get("use_dora"):
                magnitude = np.abs(weights(f"{at}.m", (out,), seed=1)) + np.float32(0.5)
                adapters[f"base_model.model.{at}.lora_magnitude_vector"] = magnitude
    (folder / "peft").mkdir()
    (folder / "peft" / CONFIG).write_text(json.dumps(said))
    save(folder / "peft" / WEIGHTS, adapters)
    return said


def theirs(folder: Path, adapters: Path) -> np.ndarray:
    """The logits of `peft`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapters).eval()
    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.tensor(TOKENS)).logits.numpy()
    return found


def runs(folder: Path, name: str) -> Path:
    make(folder, name)
    import_model(folder / "base", folder / "model", tokenizer="none")
    import_peft(folder / "peft", folder / "run", folder / "model")
    return folder / "run"


@pytest.mark.parametrize("name", few(CASES, keep=2))
def test_A1_adapters_of_peft_answer_as_peft_once_did_and_are_written_as_they_were(name, tmp_path, one_device):
    run, golden = runs(tmp_path, name), GOLDEN / f"peft-{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        logits = theirs(tmp_path / "base", tmp_path / "peft")[:, ::4]
        golden.write_text(json.dumps([[[round(float(x), 6) for x in row] for row in rows] for rows in logits]) + "\n")
    stored, logits = np.array(json.loads(golden.read_text()), np.float32), np.asarray(llmjax.load(run).logits(TOKENS))
    np.testing.assert_allclose(logits[:, ::4], stored, atol=1e-4)
    plain = np.asarray(llmjax.load(tmp_path / "model").logits(TOKENS))
    assert np.abs(plain - logits).max() > 0.1  # the adapters do something

    export_peft(run, tmp_path / "again")
    one, two = (read_peft(tmp_path / made, llmjax.load(tmp_path / "model").config.model) for made in ("peft", "again"))
    assert one.settings == two.settings
    assert one.arrays.keys() == two.arrays.keys()
    for path, array in one.arrays.items():
        np.testing.assert_allclose(array, two.arrays[path], rtol=1e-6, err_msg=path)

    exported = export_model(run, tmp_path / "merged")
    assert exported.merged == 3 * len({path.rpartition("/")[0] for path in one.arrays})
    import_model(tmp_path / "merged", tmp_path / "whole", tokenizer="none")
    np.testing.assert_allclose(llmjax.load(tmp_path / "whole").logits(TOKENS), logits, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_loads_in_peft_and_answers_the_same(name, tmp_path, one_device):
    pytest.importorskip("peft")
    run = runs(tmp_path, name)
    export_peft(run, tmp_path / "again")
    ours = np.asarray(llmjax.load(run).logits(TOKENS))
    for adapters in ("peft", "again"):
        np.testing.assert_allclose(theirs(tmp_path / "base", tmp_path / adapters), ours, atol=1e-4)


def test_A1_a_config_without_alpha_and_files_that_are_not_of_it_are_refused_and_change_nothing(tmp_path):
    said = make(tmp_path, "lora")
    import_model(tmp_path / "base", tmp_path / "model", tokenizer="none")
    for change, told in (
        ({"lora_alpha": None}, "lora_alpha=None: without it the adapters' scale is not known"),
        ({"peft_type": "IA3"}, "adapters of the type IA3"),
        ({"r": 4}, "says rank 4 of"),
        ({"lora_bias": True}, "lora_bias=True, which is not supported"),
        ({"bias": "all"}, "bias='all'"),
    ):
        (tmp_path / "peft" / CONFIG).write_text(json.dumps({**said, **change}))
        with pytest.raises(UserError, match=told):
            import_peft(tmp_path / "peft", tmp_path / "run", tmp_path / "model")
        assert not (tmp_path / "run").exists()
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(said))
    tensors = Safetensors([tmp_path / "peft" / WEIGHTS])
    extra = {name: tensors.read(name) for name in tensors.tensors}
    extra["base_model.model.model.embed_tokens.lora_embedding_A"] = np.ones((3, 61), np.float32)
    save(tmp_path / "peft" / WEIGHTS, extra)
    with pytest.raises(UserError, match=r"embed_tokens\.lora_embedding_A, which is no adapter of a linear map"):
        import_peft(tmp_path / "peft", tmp_path / "run", tmp_path / "model")


@pytest.mark.slow
def test_A4_a_head_that_was_trained_beside_a_tied_embedding_is_kept_apart(tmp_path, one_device):
    make(tmp_path, "fused")  # GPT-2's head is tied
    tensors = Safetensors([tmp_path / "peft" / WEIGHTS])
    whole = {name: tensors.read(name) for name in tensors.tensors}
    whole["base_model.model.lm_head.weight"] = weights("lm_head", (61, 32), seed=3)
    save(tmp_path / "peft" / WEIGHTS, whole)
    import_model(tmp_path / "base", tmp_path / "model", tokenizer="none")
    import_peft(tmp_path / "peft", tmp_path / "run", tmp_path / "model")
    model = llmjax.load(tmp_path / "run")
    assert not model.config.model.tie_embeddings
    np.testing.assert_array_equal(model.params["head"]["kernel"], whole["base_model.model.lm_head.weight"].T)
    exported = export_model(tmp_path / "run", tmp_path / "merged")
    assert exported.merged == 12
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    import_model(tmp_path / "merged", tmp_path / "whole", tokenizer="none")
    np.testing.assert_allclose(llmjax.load(tmp_path / "whole").logits(TOKENS), model.logits(TOKENS), atol=3e-5)
