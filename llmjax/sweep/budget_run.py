"""The run that a budget buys: a shape, batch and rates by published rules, a mesh that fits on paper, a config file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmjax import config, human
from llmjax.errors import UserError
from llmjax.model.count import param_count
from llmjax.parallel.chips import CHIPS
from llmjax.scaling import analytic, compiler
from llmjax.scaling.search import changed
from llmjax.scaling.topology import Topology
from llmjax.sweep import published
from llmjax.sweep.published import Rule

VOCABULARY = 32_768
LENGTH = 2048  # tokens of a row
HEAD = 128
ASPECT = 100.0  # width over layers: 64 to 128 in LLaMA, GPT-3 and Chinchilla
MOST_LAYERS = 160


@dataclass(frozen=True)
class Fit:
    """A mesh and settings that fit the memory, by formula."""

    settings: dict[str, Any]
    memory: float  # bytes of a device
    available: float
    seconds: float  # of a step, a lower bound
    mfu: float  # an upper bound


def shape(parameters: float) -> tuple[int, int]:
    """(layers, width) of a model of about so many parameters, embeddings included: 12 N D^2 + V D, D about 100 N."""

    def worth(layers: int, width: int) -> float:
        size = 12 * layers * width**2 + VOCABULARY * width
        return abs(math.log(size / parameters)) + 0.05 * abs(math.log(width / layers / ASPECT))

    widths = [*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 8192, 256), *range(8192, 40_960, 512)]
    return min(((n, d) for n in range(1, MOST_LAYERS) for d in widths), key=lambda one: worth(*one))


def topology(chip: str, count: int) -> Topology:
    """So many chips, a TPU's in a torus that is as round as can be."""
    sizes = [1] * (CHIPS[chip].torus or 1)
    left = count
    for factor in sorted(_factors(left), reverse=True):
        sizes[sizes.index(min(sizes))] *= factor
    return Topology(chip, tuple(sorted(sizes)))


def _factors(number: int) -> Iterator[int]:
    factor = 2
    while number > 1:
        while number % factor == 0:
            yield factor
            number //= factor
        factor += 1


def make_config(parameters: float, tokens: float, *, rule: Rule, devices: int = 1) -> config.ConfigDict:
    """The config of a run of about that size and length, with the rate and batch of a rule.

    Args:
        devices: over which rows are divided: a batch has a row for each at least.
    """
    layers, width = shape(parameters)
    c = config.base()
    c.name = f"budget-{human.count(parameters).lower()}"
    c.model.layers, c.model.width = layers, width
    c.model.heads = width // HEAD if width % HEAD == 0 else width // 64
    c.model.max_length = LENGTH
    c.model.scan_unroll = 1
    rows = published.round_batch(rule.batch_tokens or 0.0, length=LENGTH)
    rows = -(-rows // devices) * devices
    config.large_run(c, vocab_size=VOCABULARY, sequence_length=LENGTH, batch_size=rows, micro_batches=1)
    c.optimizer.learning_rate = float(f"{rule.rate:.3g}")
    c.schedule.final = 0.0
    c.train.duration = f"{max(round(tokens / (rows * LENGTH)), 1)} steps"
    config.check(c)
    return c.lock()


def fit(c: config.ConfigDict, pods: Topology) -> tuple[config.ConfigDict, Fit | None]:
    """The config with the fastest mesh of those that fit by formula, or as it is and None."""
    platform = "tpu" if pods.chip.torus else "gpu"
    available = pods.chip.usable / pods.chip.devices
    best: tuple[config.ConfigDict, Fit] | None = None
    for settings in _candidates(c, pods.devices):
        try:
            made = changed(c, settings)
            resolved = compiler.resolve(made, platform=platform)
            stage = compiler.stages(resolved).stages[-1]
            paper = analytic.plan(resolved, pods, stage)
        except UserError:  # heads that tensor does not divide, rows that the devices do not
            continue
        if paper.memory["peak"] > available:
            continue
        ideal = (
            analytic.token_flops(resolved).model
            * stage.rows
            * LENGTH
            / pods.devices
            / (pods.chip.flops / pods.chip.devices)
        )
        found = Fit(settings, paper.memory["peak"], available, paper.seconds["step"], ideal / paper.seconds["step"])
        if best is None or found.seconds < best[1].seconds:
            best = made, found
    return best if best is not None else (c, None)


def _candidates(c: config.ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    for tensor in (1, 2, 4, 8):
        if devices % tensor or c.model.heads % tensor:
            continue
        ways = devices // tensor
        for remat in ("selective", "full"):
            for micro in (1, 4, 16):
                if c.train.batch_size % (micro * ways) == 0:
                    for axis in ("fsdp", "data") if c.model.width % ways else ("fsdp",):
                        mesh = f"{axis}={ways}" + (f" tensor={tensor}" if tensor > 1 else "")
                        yield {"parallel.mesh": mesh, "model.remat": remat, "train.micro_batches": micro}


def counted(c: config.ConfigDict) -> int:
    """The exact parameters of a config."""
    return param_count(c.model)


def config_file(c: config.ConfigDict, why: list[str]) -> str:
    """A config as a Python file whose docstring says where the numbers are from."""
    changes = {key: now for key, (_, now) in config.differences(config.base(), c).items()}
    head = "\n".join(f"    {line}" for line in why)
    lines = "\n".join(f"    config.set_key(c, {key!r}, {value!r})" for key, value in changes.items())
    return f'''"""A run that `llmjax budget` planned.

{head}
"""

from llmjax import config


def get_config(arg: str = "") -> config.ConfigDict:
    c = config.base()
{lines}
    return c
'''
