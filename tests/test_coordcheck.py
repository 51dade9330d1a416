"""The coordinate check: the standard parametrisation fails it, muP and CompleteP pass; what it measures is right."""

import json
import math

import jax
import numpy as np
import pytest
from helpers import few, make_batch, tiny_config

from llmjax import cli
from llmjax.model import transformer
from llmjax.sweep import coordcheck

BASE = {
    "model__activation": "gelu", "model__tie_embeddings": False, "model__mup_base_width": 32, "model__mup_base_layers": 2,
    "optimizer__learning_rate": 2e-3, "optimizer__weight_decay": 0.0, "optimizer__clip_norm": 0.0, "train__batch_size": 4,
}  # fmt: skip
PLACES = {"attention logits", "attention", "MLP", "residual stream", "logits"}


def checked(scheme, *, over="width", sizes=(32, 128), steps=4, seeds=1, **changes):
    c = tiny_config(**{**BASE, **changes}, model__init=scheme)
    return coordcheck.check(c, [make_batch(c, k) for k in range(steps + 1)], over=over, sizes=sizes, seeds=seeds)


def slopes(found):
    return {place.name: round(place.slope, 2) for place in found.places}


@pytest.mark.slow
def test_over_the_width_the_standard_parametrisation_fails_and_mup_passes():
    standard, mup = (checked(scheme, model__layers=1) for scheme in ("gpt2", "mup"))
    print(slopes(standard), slopes(mup))
    assert {place.name for place in mup.places} == PLACES
    assert {place.verdict for place in standard.places} == {"grows"} and not standard.holds
    assert mup.holds, slopes(mup)


@pytest.mark.parametrize(
    "changes",
    few(
        [
            {"optimizer__name": "muon"},
            {"model__tie_embeddings": True},
            {"optimizer__name": "lion", "optimizer__learning_rate": 1e-3},
            {"model__activation": "swiglu", "model__kv_heads": 2, "model__qk_norm": True},
            {"model__moe__experts": 4, "model__pattern": ("local", "global")},
        ],
        0,
        1,
    ),
    ids=["muon", "tied", "lion", "gated, grouped", "experts"],
)
def test_mup_holds_where_the_standard_parametrisation_grows(changes):
    standard, mup = (checked(scheme, seeds=2, **changes) for scheme in ("gpt2", "mup"))
    print(slopes(standard), slopes(mup))
    assert "grows" in {place.verdict for place in standard.places}
    assert mup.holds, slopes(mup)


@pytest.mark.parametrize("name", few(["adamw", "muon"], 0, 1))
def test_over_the_depth_completep_holds_and_mup_does_not(name):
    sizes = (2, 4, 8, 16)
    mup, complete = (
        checked(scheme, over="layers", sizes=sizes, optimizer__name=name) for scheme in ("mup", "completep")
    )
    print(slopes(mup), slopes(complete))
    assert not mup.holds
    assert complete.holds, slopes(complete)


# ---------------------------------------------------------------- what is measured


def test_every_place_of_every_layer_is_measured():
    c = tiny_config(model__pattern=("global", "rnn"), model__layers=4)
    module, batch = transformer.build(c.model), make_batch(c, 0)
    params = transformer.param_shapes(module)
    found = jax.eval_shape(lambda params: coordcheck.activations(module, params, batch), params)
    assert found.keys() == {*PLACES, "rnn"}
    B, L = batch["tokens"].shape
    assert [x.shape for x in found["logits"]] == [(B, L, 320)]
    assert [x.shape for x in found["residual stream"]] == [(2, B, L, 32)] * 2  # two places of the pattern, twice each
    assert [x.shape[:2] for x in found["attention logits"]] == [(2, B)]


def test_slopes_and_verdicts():
    widths = (64, 128, 256)
    assert coordcheck.slope(widths, [w**0.5 for w in widths]) == pytest.approx(0.5)
    assert math.isnan(coordcheck.slope(widths, [1.0, 0.0, 1.0])) and math.isnan(
        coordcheck.slope(widths, [1, math.inf, 1])
    )
    said = [coordcheck.verdict(x) for x in (0.0, 0.1, -0.1, 0.5, -0.5, math.nan)]
    assert said == ["holds", "holds", "holds", "grows", "vanishes", "grows"]


def test_everything_that_should_grows_with_the_width():
    c = tiny_config(model__kv_heads=2, model__moe__experts=4, model__moe__width=48, model__head_size=16)
    (wide,) = coordcheck.resized(c, over="width", sizes=(128,))
    m = wide.model
    assert (m.width, m.heads, m.kv_heads, m.head_size, m.mlp_width, m.moe.width) == (128, 16, 8, 16, 256, 192)
    narrow, wide = coordcheck.resized(c, over="width", sizes=(8, 64))  # 8: half a key head
    assert (narrow.model.heads, narrow.model.head_size, wide.model.heads, wide.model.head_size) == (4, 4, 4, 32)
    assert [one.model.layers for one in coordcheck.resized(c, over="layers", sizes=(1, 6))] == [1, 6]
    with pytest.raises(ValueError, match="no whole number"):
        coordcheck.resized(tiny_config(model__mlp_width=65), over="width", sizes=(48,))


@pytest.mark.slow
def test_the_command_prints_and_writes_what_it_found_and_its_status_says_whether_it_holds(tiny_run, tmp_path, capsys):
    file = tmp_path / "tiny.py"
    sources = json.loads((tiny_run / "config.json").read_text())["data"]["sources"][0]
    file.write_text(
        "import sys\nfrom helpers import tiny_config\n\ndef get_config(arg=''):\n"
        f"    return tiny_config({sources!r}, model__init=arg or 'mup', model__mup_base_width=32)\n"
    )
    words = ["--workdir", str(tiny_run), "--widths", "32,64,128", "--steps", "3", "--seeds", "2"]
    assert cli.main(["coordcheck", "--config", f"{file}:gpt2", *words]) == 1
    out = capsys.readouterr().out
    assert "prepare: done already" in out and "model.init=gpt2 under adamw does not hold over width" in out
    folder = tiny_run / "gpt2-adamw-width"
    found = json.loads((folder / "results.json").read_text())
    assert found["sizes"] == [32, 64, 128] and not found["holds"] and np.shape(found["places"][0]["change"]) == (3, 4)
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == len(found["places"]) == len(PLACES)
    (tiny_run / "checkpoints").mkdir()
    assert cli.main(["coordcheck", "--config", str(file), *words]) == 2
    assert "give another --workdir" in capsys.readouterr().err
