"""The table of chips: every number has a source, and MFU's denominator is read from it."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from llmjax.parallel.chips import CHIPS, of_device_kind
from llmjax.train import hardware


@pytest.mark.parametrize("name", CHIPS)
def test_every_constant_has_a_source(name):
    chip = CHIPS[name]
    numbers = {f.name for f in fields(chip)} - {"name", "kind", "sources", "devices", "node"}
    assert {name for name in numbers if getattr(chip, name)} <= set(chip.sources)
    assert 0 < chip.usable <= 1.01 * chip.memory
    assert chip.torus in (0, 2, 3)


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU7x", "tpu7x", 1153.5e12),  # jax shows each of a chip's two cores
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA B200", "b200", 2250e12),
    ],
)
def test_a_device_is_recognised_by_what_jax_calls_it(kind, name, peak):
    chip = of_device_kind(kind)
    assert chip is not None
    assert chip.flops == CHIPS[name].flops
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    assert hardware.peak_flops(device, device_count=4)[0] == pytest.approx(4 * peak)


def test_an_unknown_device_has_no_peak():
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA T4")
    peak, reason = hardware.peak_flops(device, device_count=1)
    assert peak == 0
    assert "T4" in reason


def test_the_clock_follows_from_the_peak():
    assert CHIPS["v5p"].clock == pytest.approx(1.75e9, rel=0.01)
    assert CHIPS["v4"].clock == pytest.approx(1.05e9, rel=0.01)
    assert CHIPS["h100"].clock == 0
