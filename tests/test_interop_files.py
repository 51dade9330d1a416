"""Models come in and go out tensor by tensor and bit for bit, and what does not fit is named, all of it at once."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, few, tiny_config
from hf_files import (
    LLAMA,
    assert_equal,
    expected_params,
    flat,
    imported,
    nested,
    random_tensors,
    save_run,
    write_model,
)

import llmjax
from llmjax.interop import stacked, tensors
from llmjax.interop.read import import_model
from llmjax.interop.stacked import StackedReader, StackedWriter
from llmjax.interop.tensors import Safetensors, Tensor, open_folder
from llmjax.interop.write import export_model
from llmjax.train import checkpoint, folders

BF16 = ml_dtypes.bfloat16


# ---------------------------------------------------------------------- safetensors


def test_files_are_those_of_the_safetensors_package_both_ways(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    by_numpy = {code: dtype for code, dtype in tensors.DTYPES.items() if not code.startswith("F8")}
    arrays = {code: rng.normal(size=(3, 5)).astype(dtype) for code, dtype in by_numpy.items()}
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float32)}
    writer = tensors.Writer(tmp_path / "a", {name: Tensor(x.dtype, x.shape) for name, x in arrays.items()})
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close()
    numpy.save_file(arrays, tmp_path / "b")
    for theirs in (
        numpy.load_file(tmp_path / "a"),
        *({n: f.read(n) for n in f.tensors} for f in [Safetensors([tmp_path / "b"])]),
    ):
        assert theirs.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(theirs[name], array, strict=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "ends at byte"),
        (lambda data: data[:40], "header is"),
        (lambda data: b"", "header is"),
        (lambda data: data.replace(b'"F32"', b'"F31"'), "in the type F31; known are F64, F32"),
        (lambda data: data.replace(b"[3,3]", b"[3,4]"), r"shape \(3, 4\) takes 48 bytes and has 36"),
        (lambda data: data[:8] + b"x" + data[9:], "no complete safetensors file"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, damage, message):
    file = tmp_path / "model.safetensors"
    writer = tensors.Writer(file, {"x": Tensor(np.dtype("f4"), (3, 3))})
    writer.write("x", np.ones((3, 3), np.float32))
    writer.close()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"model.safetensors .*{message}" if "no complete" not in message else message):
        open_folder(tmp_path)


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("dtype", "shards"), [(np.float32, 1), (BF16, 3)])
def test_import_fills_every_parameter_from_its_tensor(tmp_path, dtype, shards):
    weights = random_tensors(LLAMA, dtype=dtype)
    source = write_model(tmp_path / "hf", LLAMA, weights, shards=shards)
    assert_equal(imported(source, tmp_path / "run"), expected_params(LLAMA, weights))
    assert_equal(flat(llmjax.load(tmp_path / "run", mesh="tensor=2 data=-1").params), expected_params(LLAMA, weights))


@pytest.mark.parametrize("dtype", few([BF16, np.float32]))
@pytest.mark.parametrize("theirs", ["llama", "tied", "gpt2", "bert", "mixtral"])
def test_import_export_import_gives_the_same_bits(tmp_path, dtype, theirs):
    theirs = {
        "llama": LLAMA,
        "tied": {**LLAMA, "tie_word_embeddings": True},
        "gpt2": {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_embd": 32, "n_layer": 3,
            "n_head": 4, "n_positions": 64,
        },
        "bert": {
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 300, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
        },
        "mixtral": {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    }[theirs]  # fmt: skip
    weights = random_tensors(theirs, dtype=dtype)
    first = imported(write_model(tmp_path / "hf", theirs, weights), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "exported", shard_bytes=20_000)
    written = open_folder(tmp_path / "exported")
    assert_equal({name: written.read(name) for name in written.tensors}, weights)
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    assert_equal(imported(tmp_path / "exported", tmp_path / "again"), first)
    for key in ("model_type", "architectures", "vocab_size"):
        assert json.loads((tmp_path / "exported" / "config.json").read_text())[key] == theirs[key]


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (np.float16, "", np.float32),
        (np.float32, "bfloat16", BF16),
        (BF16, "float32", np.float32),
        ("mixed", "", np.float32),
    ],
)
def test_types_are_kept_widened_or_as_asked(tmp_path, stored, asked, expected):
    weights = random_tensors(LLAMA, dtype=BF16 if stored == "mixed" else stored)
    if stored == "mixed":
        weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    ours = imported(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "run", dtype=asked)
    assert {array.dtype for array in ours.values()} == {np.dtype(expected)}
    np.testing.assert_array_equal(ours["embedding"], weights["model.embed_tokens.weight"].astype(expected))


def test_a_trained_run_is_exported_and_comes_back_the_same(tmp_path, prepared_run):
    c = tiny_config(prepared_run, model__vocab_size=320, model__tie_embeddings=False)
    params = save_run(tmp_path / "run", c, mesh="fsdp=2 tensor=2")
    shutil.copytree(prepared_run / "tokenizer", tmp_path / "run" / "tokenizer")
    exported = export_model(tmp_path / "run", tmp_path / "hf", shard_bytes=30_000)
    assert exported.model_type == "llama"
    assert_equal(imported(tmp_path / "hf", tmp_path / "again"), params)
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (theirs["bos_token_id"], theirs["eos_token_id"], theirs["torch_dtype"]) == (1, 2, "float32")


def test_the_moving_average_is_what_is_exported_where_there_is_one(tmp_path, prepared_run):
    params = save_run(tmp_path / "run", tiny_config(prepared_run), ema=True)
    export_model(tmp_path / "run", tmp_path / "hf")
    assert_equal(imported(tmp_path / "hf", tmp_path / "again"), params)


def test_training_starts_from_imported_weights_of_another_type(tmp_path):
    weights = random_tensors(LLAMA, dtype=BF16)
    ours = imported(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "run")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wide = nested({k: jax.ShapeDtypeStruct(v.shape, np.float32, sharding=place) for k, v in ours.items()})
    folder = folders.newest(tmp_path / "run")
    assert_same_bits(
        flat(checkpoint.read_params(folder, wide, cast=True)), {k: v.astype(np.float32) for k, v in ours.items()}
    )
    with pytest.raises(folders.CheckpointMismatch, match="bfloat16"):
        checkpoint.read_params(folder, wide)


# ---------------------------------------------------------------------- one layer at a time


def test_arrays_are_written_by_layers_and_large_ones_by_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(stacked, "CHUNK_BYTES", 4000)
    weights = random_tensors(LLAMA)
    ours = imported(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "run")
    assert_equal(ours, expected_params(LLAMA, weights))
    params = tmp_path / "run" / "checkpoints" / "0" / "params"
    chunks = {
        path.name: json.loads((path / ".zarray").read_text())["chunks"] for path in params.iterdir() if path.is_dir()
    }
    assert chunks["layers.mlp.up.kernel"] == [1, 20, 48]
    assert chunks["embedding"] == [31, 32]
    assert all(np.prod(shape) * 4 <= 4000 for shape in chunks.values())


def test_training_cuts_large_arrays_by_layers_too(tmp_path, prepared_run, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE_BYTES", 10_000)
    params = save_run(tmp_path / "run", tiny_config(prepared_run))
    reader = StackedReader(folders.newest(tmp_path / "run"))
    chunks = {path: array.chunk_layout.read_chunk.shape for path, array in reader._arrays.items()}
    assert chunks["layers/mlp/up/kernel"] == (1, 32, 64)
    assert chunks["layers/attention_norm/scale"] == (2, 32)
    for path, array in params.items():
        np.testing.assert_array_equal(reader.read(path, None), array)
        np.testing.assert_array_equal(reader.read(path, 1), array[1])


def test_every_tensor_is_read_once_and_never_two_rows_at_a_time(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    real_read, real_write = Safetensors.read, StackedWriter.write

    def reading(self, name):
        events.append(("read", name))
        return real_read(self, name)

    def writing(self, path, layer, array):
        events.append(("write", path))
        real_write(self, path, layer, array)

    monkeypatch.setattr(Safetensors, "read", reading)
    monkeypatch.setattr(StackedWriter, "write", writing)
    weights = random_tensors(LLAMA)
    imported(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "run")
    reads = [name for kind, name in events if kind == "read"]
    assert sorted(reads) == sorted(weights)
    assert [kind for kind, _ in events] == ["read", "write"] * len(weights)


def test_checkpoints_are_described_as_this_version_of_orbax_describes_them(tmp_path, prepared_run):
    """`stacked` writes names of orbax's private classes, which another version may call otherwise."""
    save_run(tmp_path / "trained", tiny_config(prepared_run))
    import_model(write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA)), tmp_path / "run", tokenizer="none")
    theirs, ours = (
        json.loads((folders.newest(tmp_path / run) / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        for run in ("trained", "run")
    )
    assert ours == {item: theirs[item] for item in ("meta", "params")}


def test_layers_of_zeros_are_restored_too(tmp_path):
    weights = {name: np.zeros_like(array) for name, array in random_tensors(LLAMA).items()}
    assert not any(
        array.any() for array in imported(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "r").values()
    )


def test_a_damaged_checkpoint_is_named_by_export(tmp_path):
    import_model(write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA)), tmp_path / "run", tokenizer="none")
    params = tmp_path / "run" / "checkpoints" / "0" / "params"
    (params / "layers.mlp.up.kernel" / "1.0.0").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"layers.mlp.up.kernel/1.0.0 has 8 bytes, and had"):
        export_model(tmp_path / "run", tmp_path / "out")
    (params / "files.json").unlink()  # as an earlier version leaves it
    with pytest.raises(ValueError, match=r"layers/mlp/up/kernel in .* is damaged"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (params / "_METADATA").unlink()
    with pytest.raises(ValueError, match="params is damaged"):
        StackedReader(tmp_path / "run" / "checkpoints" / "0")


# ---------------------------------------------------------------------- what does not fit


def test_everything_that_does_not_fit_is_named_at_once_with_both_shapes(tmp_path):
    weights = random_tensors(LLAMA)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 16), np.float32)
    weights["model.norm.weight"] = np.zeros(31, np.float32)
    weights |= {f"model.layers.{i}.extra.weight": np.zeros((2, i + 1), np.float32) for i in range(3)}
    with pytest.raises(ValueError) as caught:
        import_model(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "run", tokenizer="none")
    message = str(caught.value)
    for part in (
        "model.layers.1.mlp.up_proj.weight (48, 32) for layers/mlp/up/kernel[1] (32, 48)",
        "model.layers.0.self_attn.q_proj.weight (32, 16), must be (32, 32) for layers/attention/query/kernel[0] (32, 4, 8)",
        "model.norm.weight (31,), must be (32,) for final_norm/scale (32,)",
        "model.layers.0.extra.weight (2, 1) (and 2 more like it)",
    ):
        assert part in message, message
    assert not (tmp_path / "run").exists()


def test_transposed_square_looking_tensors_are_refused_not_reshaped(tmp_path):
    weights = random_tensors(LLAMA)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].T.copy()
    with pytest.raises(ValueError, match=r"\(32, 48\), must be \(48, 32\)"):
        import_model(write_model(tmp_path / "hf", LLAMA, weights), tmp_path / "run", tokenizer="none")


def test_a_head_that_config_json_calls_tied_must_be_the_embedding_once_more(tmp_path):
    config = {**LLAMA, "tie_word_embeddings": True}
    weights = random_tensors(config)
    head = weights["model.embed_tokens.weight"].copy()
    import_model(
        write_model(tmp_path / "same", config, {**weights, "lm_head.weight": head}), tmp_path / "run", tokenizer="none"
    )
    head[3, 7] += 1
    other = write_model(tmp_path / "other", config, {**weights, "lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head.weight repeats model.embed_tokens.weight, but .* must be false"):
        import_model(other, tmp_path / "refused", tokenizer="none")
    assert not (tmp_path / "refused").exists()


def test_a_checkpoint_with_more_layers_than_its_config_is_refused(tmp_path):
    weights = random_tensors(LLAMA)
    with pytest.raises(ValueError, match=r"model.layers.2.input_layernorm.weight \(32,\)"):
        import_model(
            write_model(tmp_path / "hf", {**LLAMA, "num_hidden_layers": 2}, weights), tmp_path / "run", tokenizer="none"
        )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text('{"model_type": "mamba9"}'), r"'mamba9'.*known are .*llama"),
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "lacks 1 of 3 shards: model-00002-of-00003"),
        (lambda f: os.truncate(f / "model-00001-of-00003.safetensors", 5000), "00001-of-00003.safetensors is no complete"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is damaged"),
        (lambda f: [*map(Path.unlink, f.glob("model*")), (f / "pytorch_model.bin").touch()], "convert it once"),
        (lambda f: [*map(Path.unlink, f.glob("model*")), (f / "x.gguf").touch()], "--from .*x.gguf"),
        (lambda f: [*map(Path.unlink, f.glob("model*"))], "neither model.safetensors nor"),
        (lambda f: [*map(Path.unlink, f.glob("tokenizer*"))], "--tokenizer none"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "tokenizer.json cannot be used"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_way_out(tmp_path, spoil, message):
    pytest.importorskip("tokenizers")
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA), shards=3, tokenizer=True)
    spoil(source)
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    theirs = {**LLAMA, "vocab_size": 260}
    source = write_model(tmp_path / "hf", theirs, random_tensors(theirs), tokenizer=True)
    with pytest.raises(ValueError, match="ids up to 263 and the model has only 260"):
        import_model(source, tmp_path / "run")


def test_a_model_that_no_family_can_say_is_refused_with_the_reasons(tmp_path, prepared_run):
    save_run(tmp_path / "run", tiny_config(prepared_run, model__norm="none"))
    with pytest.raises(ValueError, match=r"(?s)no model type.*\n  llama: .*norm='none'"):
        export_model(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="norm='none'"):
        export_model(tmp_path / "run", tmp_path / "out", model_type="llama")
    with pytest.raises(ValueError, match="--family gpt9 is not known; known are .*gpt2"):
        export_model(tmp_path / "run", tmp_path / "out", model_type="gpt9")
