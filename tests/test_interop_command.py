"""Import and export are whole or not at all, and the command says what it did or what is wrong."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from hf_files import LLAMA, random_tensors, write_model, write_tokenizer

import llmjax
from llmjax import cli, config, storage
from llmjax.errors import UserError
from llmjax.interop import read, tensors, write
from llmjax.interop.generation import OFF, read_generation
from llmjax.interop.read import import_model
from llmjax.interop.stacked import StackedWriter
from llmjax.interop.tensors import Tensor, open_folder
from llmjax.interop.write import export_model
from llmjax.model.positions import rotary_frequencies

BF16 = ml_dtypes.bfloat16
BASE = {name: config.base().generate[name] for name in OFF}


# ---------------------------------------------------------------------- whole or not at all


def break_off(monkeypatch: pytest.MonkeyPatch, owner: type, error: BaseException) -> None:
    """The sixth write of an owner fails."""
    count, real = iter(range(6)), owner.write

    def write(self, *args):
        if next(count) == 5:
            raise error
        return real(self, *args)

    monkeypatch.setattr(owner, "write", write)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch, error):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    with monkeypatch.context() as patch:
        break_off(patch, StackedWriter, error)
        with pytest.raises(type(error)):
            import_model(source, tmp_path / "run", tokenizer="none")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_model(source, tmp_path / "run", tokenizer="none")
    break_off(monkeypatch, tensors.Writer, error)
    with pytest.raises(type(error)):
        export_model(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (tmp_path / ".run.unfinished" / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / ".run.lock").touch()
    import_model(source, tmp_path / "run", tokenizer="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_two_processes_do_not_write_the_same_target(tmp_path):
    with (
        storage.staged(tmp_path / "run", purpose="--to"),
        pytest.raises(ValueError, match="another process"),
        storage.staged(tmp_path / "run", purpose="--to"),
    ):
        pass
    assert (tmp_path / "run").is_dir()


def test_a_target_that_exists_is_never_touched(tmp_path):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ValueError, match="run exists: choose another"):
        import_model(source, tmp_path / "run", tokenizer="none")
    (tmp_path / "run" / "mine").unlink()  # an empty folder is no loss
    import_model(source, tmp_path / "run", tokenizer="none")
    with pytest.raises(ValueError, match="run exists: choose another"):
        export_model(tmp_path / "run", tmp_path / "run")


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert cli.main(["import", "--from", str(source), "--to", str(tmp_path / "run"), "--tokenizer", "none"]) == 1
    output = capsys.readouterr().err
    assert "1 kB are free" in output and "give another --to" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_write_for_which_there_is_no_room_is_an_os_error(tmp_path, monkeypatch):
    writer = StackedWriter(tmp_path, {"x": Tensor(np.dtype("f4"), (4,))}, stacked=())
    writer.write("x", None, np.zeros(4, np.float32))

    class Full:
        def write(self, _, **settings):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: ENOSPC No space left on device]")

    monkeypatch.setitem(writer._open, "x", Full())
    with pytest.raises(OSError, match="No space left"):
        writer.write("x", None, np.zeros(4, np.float32))


@pytest.mark.parametrize("value", ["1e-5", [8], {"a": 1}])
def test_a_number_of_config_json_that_is_none_is_named(tmp_path, value):
    source = write_model(tmp_path / "hf", {**LLAMA}, random_tensors(LLAMA))
    (source / "config.json").write_text(json.dumps({**LLAMA, "rms_norm_eps": value}))
    with pytest.raises(UserError, match=re.escape(f"rms_norm_eps={value!r}, which is no number")):
        import_model(source, tmp_path / "run", tokenizer="none")


def test_a_number_that_is_null_is_one_that_is_not_there(tmp_path):
    tensors = random_tensors(LLAMA)
    for name, theirs in {
        "null": {**LLAMA, "initializer_range": None, "attention_dropout": None},
        "none": LLAMA,
    }.items():
        import_model(write_model(tmp_path / f"{name}-hf", theirs, tensors), tmp_path / name, tokenizer="none")
    assert (tmp_path / "null/config.json").read_text().replace('"null"', '"none"') == (
        tmp_path / "none/config.json"
    ).read_text()
    source = write_model(tmp_path / "hf", LLAMA, tensors)
    (source / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": None}))
    with pytest.raises(UserError, match="config.json lacks hidden_size"):
        import_model(source, tmp_path / "run", tokenizer="none")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "top_k": 0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"temperature": 0.7, "top_k": 20, "do_sample": None}, {"temperature": 0.7, "top_k": 20, "top_p": 1.0}),
        ({"eos_token_id": 257}, {"temperature": 0.8, "top_p": 0.95, "top_k": 0}),
    ],
)  # fmt: skip
def test_a_models_own_generation_defaults_come_and_go_with_it(tmp_path, generation, expected):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (source / "generation_config.json").write_text(json.dumps(generation))
    import_model(source, tmp_path / "run", tokenizer="none")
    found = llmjax.load(tmp_path / "run").config.generate
    assert {name: found[name] for name in expected} == expected
    export_model(tmp_path / "run", tmp_path / "out")
    written = tmp_path / "out" / "generation_config.json"
    again = json.loads(written.read_text()) if written.is_file() else {}
    assert {**BASE, **read_generation(again)} == {name: found[name] for name in BASE}


def test_generation_defaults_that_have_no_setting_are_told(tmp_path):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    fields = {
        "num_beams": 4,
        "no_repeat_ngram_size": 0,
        "do_sample": False,
        "suppress_tokens": [5],
        "max_new_tokens": 9,
    }
    (source / "generation_config.json").write_text(json.dumps(fields))
    told = str(import_model(source, tmp_path / "run", tokenizer="none"))
    assert told.endswith("of its generation_config.json num_beams=4, suppress_tokens=[5] is not used")


def test_a_generation_default_that_is_no_number_is_named(tmp_path):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (source / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(UserError, match="generation_config.json has temperature='hot', which is no number"):
        import_model(source, tmp_path / "run", tokenizer="none")


# ---------------------------------------------------------------------- the command


def test_the_command_imports_generates_and_exports(tmp_path, one_device, capsys):
    pytest.importorskip("tokenizers")
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA, dtype=BF16), tokenizer=True)
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 258], "do_sample": false}')
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["import", "--from", str(source), "--to", str(run), "--dtype", "float32"]) == 0
    assert "llama, 42.5K parameters in float32, a tokenizer of 264 ids" in capsys.readouterr().out
    model = llmjax.load(run)
    assert model.tokenizer.eos_ids == (257, 258)
    assert cli.main(["generate", "--workdir", str(run), "--prompt", "hello", "--config.generate.max_new_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("hello")
    assert (
        cli.main(["generate", "--workdir", str(run), "--chat", "--prompt", "hi", "--config.generate.max_new_tokens=3"])
        == 0
    )
    assert capsys.readouterr().out.startswith("hi\n\n")
    assert cli.main(["export", "--from", str(run), "--to", str(out), "--shard-size", "0.05MB"]) == 0
    assert f"{out}: llama, 170 kB of weights in 4 files" in capsys.readouterr().out
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [257, 258]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [257, 258]
    assert cli.main(["export", "--from", str(run), "--to", str(out / "x"), "--shard-size", "many"]) == 2
    assert "'many' is not understood" in capsys.readouterr().err


PHI3 = {
    **LLAMA, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 4.0, 8.0, 16.0]},
}  # fmt: skip


def test_longrope_has_short_factors_up_to_the_first_length_and_long_ones_when_asked_for_more(tmp_path, capsys):
    source = write_model(tmp_path / "hf", PHI3, random_tensors(PHI3))
    command = ["import", "--from", str(source), "--tokenizer", "none", "--to"]
    assert cli.main([*command, str(tmp_path / "short")]) == 0
    assert "up to 64 tokens, by its short factors (up to 256 with --max-length)" in capsys.readouterr().out
    short = llmjax.load(tmp_path / "short")
    with pytest.raises(UserError, match="more than the 64 longrope positions of the model"):
        short.generate([[1] * 60], max_new_tokens=5)
    assert cli.main([*command, str(tmp_path / "long"), "--max-length", "65"]) == 0
    assert "up to 65 tokens, by its long factors\n" in capsys.readouterr().out
    long = llmjax.load(tmp_path / "long")
    frequencies, factor = rotary_frequencies(long.config.model)
    np.testing.assert_allclose(rotary_frequencies(short.config.model)[0] / frequencies, [1, 4 / 1.2, 8 / 1.5, 8])
    assert factor == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)
    assert cli.main([*command, str(tmp_path / "none"), "--max-length", "257"]) == 2
    assert "--max-length 257 must be from 1 to the 256 tokens" in capsys.readouterr().err
    export_model(tmp_path / "long", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["original_max_position_embeddings"]) == (256, 64)
    assert written["rope_scaling"]["long_factor"] == PHI3["rope_scaling"]["long_factor"]


def test_a_length_is_asked_of_longrope_alone(tmp_path):
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    with pytest.raises(UserError, match="--max-length is for models with longrope positions"):
        import_model(source, tmp_path / "run", tokenizer="none", max_length=32)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [{"0": "LABEL_0"}, {"0": "no", "1": "so", "2": "yes"}])
def test_a_model_that_judges_comes_and_goes_as_it_is(tmp_path, names):
    theirs = {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "id2label": names}
    weights = {name: array for name, array in random_tensors(LLAMA).items() if name != "lm_head.weight"}
    weights["score.weight"] = np.random.default_rng(1).normal(size=(len(names), 32)).astype(np.float32)
    told = import_model(write_model(tmp_path / "hf", theirs, weights), tmp_path / "run", tokenizer="none").told
    assert told == f"; it judges texts: {'no, so, yes' if len(names) == 3 else 'a reward'}"
    model = llmjax.load(tmp_path / "run")
    assert model.config.objective.name == ("classify" if len(names) == 3 else "reward")
    score = model.params["classifier"]["kernel"] if len(names) == 3 else model.params["value"]["kernel"][:, None]
    np.testing.assert_array_equal(score.T, weights["score.weight"])
    export_model(tmp_path / "run", tmp_path / "out")
    written = open_folder(tmp_path / "out")
    assert written.tensors.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(written.read(name), array)
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (again["architectures"], again["id2label"]) == (theirs["architectures"], names)


def test_a_model_without_a_tokenizer_takes_ids_only(tmp_path, one_device):
    import_model(write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA)), tmp_path / "run", tokenizer="none")
    model = llmjax.load(tmp_path / "run")
    assert model.logits(np.array([[1, 2, 3]])).shape == (1, 3, 300)
    assert len(model.generate([[1, 2]], max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(ValueError, match="no tokenizer: give it token ids"):
        model.generate(["text"])


def test_what_is_exported_loads_in_transformers_and_answers_the_same(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA), tokenizer=True)
    import_model(source, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", shard_bytes=50_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = llmjax.load(tmp_path / "run")
    text = "hello <|turn|> w\u00f6rld\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == [*model.tokenizer.prefix_ids, *model.tokenizer.encode(text, specials="parse")]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(model.logits(np.array([ids])), logits, atol=1e-4, rtol=1e-4)


def test_files_beside_the_weights_are_not_needed_where_a_tokenizer_is_given(tmp_path):
    pytest.importorskip("tokenizers")
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (tmp_path / "elsewhere").mkdir()
    write_tokenizer(tmp_path / "elsewhere")
    import_model(source, tmp_path / "run", tokenizer=str(tmp_path / "elsewhere"))
    tokenizer = llmjax.load(tmp_path / "run").tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 264)


def test_the_objective_of_an_imported_run_is_the_one_of_its_kind():
    model = read.FAMILIES["llama"].read_config(dict(LLAMA))
    for change, objective in (
        ({}, "causal"),
        ({"direction": "bidirectional"}, "masked"),
        ({"encoder_layers": 2}, "span"),
    ):
        c = model.copy_and_resolve_references()
        c.update(change)
        assert read.run_config(c, name="x").objective.name == objective
    assert write.choose_family(model, "", "mistral")[1]["model_type"] == "mistral"
    assert write.choose_family(model, "", "")[1]["model_type"] == "llama"
