"""A run written as a GGUF file is the same model and the same tokenizer; what GGUF cannot say is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import few
from hf_files import LLAMA, assert_equal, flat, random_tensors, write_model, write_tokenizer
from test_gguf import GEMMA2, GEMMA3, QWEN2, QWEN3

import llmjax
from llmjax import cli, config
from llmjax.data.hf_tokenizer import load
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.errors import UserError
from llmjax.interop import tokenizer_json
from llmjax.interop.fields import meaning
from llmjax.interop.gguf_tokenizer import to_gguf
from llmjax.interop.gguf_write import export_gguf
from llmjax.interop.read import import_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
KINDS = {
    "llama": {**LLAMA, "rope_theta": 500_000.0, "rope_scaling": SCALED},
    "gemma3": {**GEMMA3, "sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "qwen3": {**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen2": QWEN2,
    "gemma2": GEMMA2,
}
TEXTS = (
    "hello world",
    "It's 12345, isn't IT'S?\n\n\n  x\t",
    "caf\u00e9\u4e2d\u6587 \U0001f600",
    "def f(x):\n    return\n        x",
)


def run_of(folder: Path, theirs: Mapping[str, Any]) -> Path:
    """An imported run whose numbers half precision holds, with a tokenizer."""
    tensors = {
        name: (array / 8).astype(np.float16).astype(np.float32) for name, array in random_tensors(theirs).items()
    }
    tensors = {
        k: np.round(v * 64) / 64 if v.ndim == 1 else v for k, v in tensors.items()
    }  # 1 is added to Gemma's norms
    import_model(write_model(folder / "hf", theirs, tensors, tokenizer=True), folder / "run")
    return folder / "run"


def changed(run: Path, folder: Path, **theirs: Any) -> Path:
    """The run imported with other fields in config.json."""
    hf = run.parent / "hf"
    said = {**json.loads((hf / "config.json").read_text()), **theirs}
    (hf / "config.json").write_text(json.dumps(said))
    import_model(hf, folder)
    return folder


@pytest.mark.parametrize("arch", few(KINDS))
def test_a_run_in_half_precision_comes_back_exactly(tmp_path, arch):
    run = run_of(tmp_path, KINDS[arch])
    exported = export_gguf(run, tmp_path / "m.gguf")
    assert exported.architecture == arch
    import_model(tmp_path / "m.gguf", tmp_path / "again")
    before, after = llmjax.load(run), llmjax.load(tmp_path / "again")
    assert_equal(flat(after.params), flat(before.params))
    first, second = (config.from_json((run / "config.json").read_text()).model for run in (run, tmp_path / "again"))
    assert meaning(first) == meaning(second)
    for text in TEXTS:
        assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    assert after.tokenizer.eos_ids == before.tokenizer.eos_ids
    assert after.tokenizer.prefix_ids == before.tokenizer.prefix_ids


def test_the_packages_reader_finds_the_metadata_and_greedy_texts_are_the_same(tmp_path):
    run = run_of(tmp_path, LLAMA)
    export_gguf(run, tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    said = {
        "general.architecture": "llama", "general.file_type": 1, "llama.block_count": 3, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8, "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: fields[name] for name in said} == said
    assert len(fields["tokenizer.ggml.tokens"]) == 300  # as many as embeddings: llama.cpp takes its size from them
    assert fields["tokenizer.ggml.token_type"][255:258] == [1, 3, 3] and fields["tokenizer.ggml.token_type"][-1] == 5
    import_model(tmp_path / "m.gguf", tmp_path / "again")
    models = [llmjax.load(run), llmjax.load(tmp_path / "again")]
    ids = np.arange(20)[None]
    np.testing.assert_array_equal(*(np.asarray(model.logits(ids)) for model in models))
    texts = [model.generate(["hello"], max_new_tokens=6, temperature=0.0)[0].tokens for model in models]
    assert list(texts[0]) == list(texts[1])


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 254), ("q4_0", 16)])
def test_quantized_weights_are_within_half_a_step_of_their_block(tmp_path, kind, steps):
    theirs = {**LLAMA, "intermediate_size": 64, "num_hidden_layers": 1}
    run = run_of(tmp_path, theirs)
    export_gguf(run, tmp_path / "f16.gguf")
    export_gguf(run, tmp_path / "m.gguf", type_name=kind)
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "f16.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        wanted = gguf.quants.dequantize(exact[tensor.name].data, exact[tensor.name].tensor_type)
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        outer = tensor.name in ("token_embd.weight", "output.weight")
        name = "F32" if wanted.ndim == 1 else "Q8_0" if outer else kind.upper()
        assert tensor.tensor_type.name == name
        if name == "F32":
            np.testing.assert_array_equal(found, wanted)
            continue
        blocks = np.abs(wanted).reshape(-1, 32).max(axis=1, keepdims=True)
        # Q4_0 has as many steps below zero as above, but for one: the largest of the other sign is a whole step off.
        allowed = (
            blocks * 2 / (254 if outer else steps) * (1.0 if name == "Q4_0" else 0.5) * 1.15 + 1e-6
        )  # scales are in half precision
        assert (np.abs(found - wanted).reshape(-1, 32) <= allowed).all()
    import_model(tmp_path / "m.gguf", tmp_path / "again")
    ids = np.arange(20)[None]
    before, after = (np.asarray(llmjax.load(one).logits(ids)) for one in (run, tmp_path / "again"))
    error = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert 0 < error < (0.02 if kind == "q8_0" else 0.3)


# Of `block_rows`, by ggml_quantize_chunk of llama.cpp 0.5.0.
LLAMA_CPPS = {
    "q8_0": "4d1e81df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc"
    "08200020c05f8100e040a17f0020c05f8100e040a17f0020c05f8100e040a17f0020" + "00" * 34,
    "q4_0": "402ee046acf258bd1379df358be046acf268003068ca24fe80a846ec028f68ca24fe80a80080" + "88" * 16,
}


def block_rows() -> np.ndarray:
    """A row of many numbers, one with as much above zero as below, and one of zeros, (3, 32)."""
    i = np.arange(32)
    return np.stack([(i * 37 % 101 - 50) / 64, np.where(i % 2, 1, -1) * (i % 5) / 4, np.zeros(32)]).astype(np.float32)


def test_blocks_have_the_bytes_that_llama_cpps_quantizer_writes(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][:3] = block_rows()
    import_model(write_model(tmp_path / "hf", LLAMA, tensors, tokenizer=True), tmp_path / "run")
    for kind, stored in LLAMA_CPPS.items():
        export_gguf(tmp_path / "run", tmp_path / f"{kind}.gguf", type_name=kind)
        reader = gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        written = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
        assert written.data[:3].tobytes().hex() == stored


def test_rows_that_are_no_multiple_of_a_block_are_in_half_precision(tmp_path):
    export_gguf(run_of(tmp_path, LLAMA), tmp_path / "m.gguf", type_name="q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"  # 48 and 32 columns


# ---------------------------------------------------------------------- tokenizers


def read_back(metadata: Mapping[str, Any], folder: Path, *, gemma: bool = False) -> Tokenizer:
    for name, data in tokenizer_json.from_gguf(metadata, gemma=gemma).items():
        (folder / name).write_bytes(data)
    return load(folder / "tokenizer.json")


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_every_cut_of_bytes_keeps_its_name(tmp_path, cut):
    write_tokenizer(tmp_path, pre=cut, eot_token_id=258)
    assert to_gguf(load(tmp_path / "tokenizer.json"), 300, gemma=False)["tokenizer.ggml.pre"] == cut


@pytest.mark.parametrize("gemma", [False, True])
def test_a_tokenizer_trained_here_gives_the_same_ids(tmp_path, gemma):
    ours = train_tokenizer([*TEXTS, "hello hello world the model"] * 4, kind="bpe", vocab_size=320)
    again = read_back(to_gguf(ours, 330, gemma=gemma), tmp_path, gemma=gemma)
    for text in (*TEXTS, " hello", "a  b\n            c", ""):
        assert again.encode(text) == ours.encode(text)
        assert again.decode(again.encode(text)) == text
    assert (again.bos_id, again.eos_id, again.prefix_ids) == (ours.bos_id, ours.eos_id, ours.prefix_ids)


def edited(folder: Path, **parts: Any) -> Tokenizer:
    """A tokenizer of bytes with other parts in its tokenizer.json."""
    write_tokenizer(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**described, **parts}))
    return load(folder / "tokenizer.json")


def test_a_tokenizer_that_gguf_cannot_say_is_refused_by_name(tmp_path):
    unigram = train_tokenizer(TEXTS * 9, kind="unigram", vocab_size=304)
    with pytest.raises(UserError, match="is of the kind Unigram"):
        to_gguf(unigram, 304, gemma=False)
    with pytest.raises(UserError, match="has no merges"):
        to_gguf(byte_tokenizer(), 300, gemma=False)
    cut = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    with pytest.raises(
        UserError, match=r"cuts text in a way that has no name here .*add_prefix_space.*export to a folder"
    ):
        to_gguf(edited(tmp_path, pre_tokenizer=cut), 300, gemma=False)
    with pytest.raises(UserError, match="changes text in another way .*Lowercase"):
        to_gguf(edited(tmp_path, pre_tokenizer=None, normalizer={"type": "Lowercase"}), 300, gemma=False)


# ---------------------------------------------------------------------- refusals


def test_what_gguf_cannot_say_is_refused_before_anything_is_written(tmp_path, capsys):
    run = run_of(tmp_path, LLAMA)
    file = tmp_path / "m.gguf"

    def refused(message: str, *options: str, source: Path = run) -> None:
        assert cli.main(["export", "--from", str(source), "--to", str(file), *options]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
        assert not file.exists() and not list(tmp_path.glob(".m.gguf*"))

    refused("--family mixtral has no GGUF architecture here; known are gemma2", "--family", "mixtral")
    refused("--peft writes a folder", "--peft")
    import_model(tmp_path / "hf", tmp_path / "bare", tokenizer="none")
    refused("has no tokenizer, which a GGUF file needs", source=tmp_path / "bare")
    scaled = {**SCALED, "low_freq_factor": 2.0}
    other = changed(run, tmp_path / "scaled", rope_scaling=scaled)
    refused("are not Llama 3's", source=other)
    assert cli.main(["export", "--from", str(run), "--to", str(tmp_path / "out"), "--type", "q8_0"]) == 2
    assert "--type is for .gguf files" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["export", "--from", str(run), "--to", str(file), "--type", "q8_0"]) == 0
    assert "m.gguf: llama, " in capsys.readouterr().out
    written = file.read_bytes()
    assert cli.main(["export", "--from", str(run), "--to", str(file)]) == 2
    assert "m.gguf exists: choose another --to file" in capsys.readouterr().err and file.read_bytes() == written


def test_numbers_that_half_precision_cannot_hold_leave_no_file(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    import_model(write_model(tmp_path / "hf", LLAMA, tensors, tokenizer=True), tmp_path / "run")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has numbers beyond 65504.*--type q8_0"):
        export_gguf(tmp_path / "run", tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
