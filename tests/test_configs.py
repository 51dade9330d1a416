"""Configs: every file loads and is complete; mistakes are told with their mend."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from llmjax import config

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SPECS = (
    "quickstart.py", "quickstart.py:hour", "shakespeare.py", "dial.py:d2", "dial.py:d12",
    "data/web.py", "data/web.py:strict", "data/pile.py", "assistant.py", "transfer.py",
)  # fmt: skip


def load(spec: str, *overrides: str):
    return config.load(str(ROOT / "configs" / spec), overrides=overrides)


def flat_of(spec: str):
    """The settings of a config, or of every link of a chain."""
    if not config.is_chain(str(ROOT / "configs" / spec)):
        return config.flatten(load(spec).to_dict())
    return config.flatten({name: c.to_dict() for name, c in config.load_chain(str(ROOT / "configs" / spec)).items()})


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_resolves_to_its_golden_values(spec):
    flat = json.loads(json.dumps(flat_of(spec)))
    path = GOLDEN / f"config-{re.sub('[.:/]', '-', spec.replace('.py', ''))}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(flat, indent=1) + "\n")
    assert path.is_file(), "no golden values yet: run UPDATE_GOLDEN=1 pytest tests/test_configs.py and commit the file"
    golden = json.loads(path.read_text())
    changed = {k: (golden.get(k), flat.get(k)) for k in golden.keys() | flat.keys() if golden.get(k) != flat.get(k)}
    assert not changed, f"{spec} changed; if that is meant, run UPDATE_GOLDEN=1 pytest tests/test_configs.py"


def test_every_config_file_is_among_the_tested():
    files = [*(ROOT / "configs").glob("*.py"), *(ROOT / "configs" / "data").glob("*.py")]
    assert {p.relative_to(ROOT / "configs").as_posix() for p in files} == {spec.partition(":")[0] for spec in SPECS}


def test_the_dial_prints_every_derived_setting_with_formula_source_and_status():
    spec = importlib.util.spec_from_file_location("dial", ROOT / "configs" / "dial.py")
    dial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dial)
    for depth in (1, 2, 4, 12, 32):
        c = load(f"dial.py:d{depth}")
        flat = config.flatten(c.to_dict())
        for row in dial.derive(depth):
            assert str(flat[row.key]) == str(row.value)
            assert row.formula
            assert row.source
            assert "measured" in row.status or "assumed" in row.status or row.status == "given"
            assert row.key in config.derivation(f"{ROOT}/configs/dial.py:d{depth}")
    longer, shorter = load("dial.py:d12"), load("dial.py:d12,tokens_per_parameter=10.0")
    assert int(longer.train.duration.split()[0]) * longer.train.batch_size > (
        1.9 * int(shorter.train.duration.split()[0]) * shorter.train.batch_size
    )
    for depth in range(1, 65):
        load(f"dial.py:d{depth}")  # raises where the rules give a width that the heads do not divide
    with pytest.raises(ValueError, match="not a depth"):
        load("dial.py:12")


def test_reading_a_config_has_no_side_effects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for spec in SPECS:
        flat_of(spec)
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr()
    assert out.out == out.err == ""


def test_every_setting_is_commented_and_survives_json():
    c = config.base()
    assert set(config.comments()) == set(config.flatten(c.to_dict()))
    assert config.to_json(config.from_json(config.to_json(c))) == config.to_json(c)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.batchsize=8", "train.batch_size"),
        ("batch_size=8", "train.batch_size"),
        ("train.batch_size=many", "takes a int"),
        ("train.batch_size=2.5", "takes a int"),
        ("model.qk_norm=1", "takes a bool"),
        ("model.activation=swigl", "did you mean swiglu"),
        ("train.duration=soon", "soon"),
        ("train.duration=10%", "needs a total"),
        ("model.heads=5", "model.heads=5"),
        ("model.scan_unroll=0", "at least 1"),
        ("train.micro_batches=3", "must divide"),
        ("data.sources=[]", "data.sources is empty"),
        ("train.batch_size", "needs a value"),
    ],
)
def test_a_wrong_setting_is_told_with_its_mend(override, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        load("quickstart.py", override)


def test_overrides_are_literals_or_text():
    c = load(
        "quickstart.py", "train.batch_size=1e2", "optimizer.learning_rate=1", "model.qk_norm=true",
        "data.sources=[a.txt,b/]", 'generate.prompts=["x = [", "y"]', "train.duration=50",
    )  # fmt: skip
    assert (c.train.batch_size, c.optimizer.learning_rate, c.model.qk_norm) == (100, 1.0, True)
    assert tuple(c.data.sources) == ("a.txt", "b/")
    assert tuple(c.generate.prompts) == ("x = [", "y")
    assert c.train.duration == "50"
    with pytest.raises((AttributeError, KeyError)):
        c.train.nonsense = 1  # locked


def test_files_that_are_no_configs_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"quickstart\.py"):
        load("quickstat.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="get_config"):
        config.load(str(tmp_path / "empty.py"))
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ValueError, match="damaged"):
        config.load(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="this file takes: full, hour"):
        load("quickstart.py:day")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (7, 7),
        ("7", 7),
        ("500 steps", 500),
        ("1 step", 1),
        ("30M tokens", 7324),
        ("2k tokens", 0),
        ("1.5 epochs", 37),
        ("10%", 20),
    ],
)
def test_durations_have_units(text, steps):
    assert config.duration(text, tokens_per_step=4096, tokens_per_epoch=100_000, total_steps=200) == steps
