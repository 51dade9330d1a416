"""muP and CompleteP: what changes with width and depth, so that settings tuned on a small model hold for a large one.

`scales` is the table below for one parameter. Initialisation, multipliers and the optimizer go by it, and a run prints it
beside its parameters. Everything is relative to the same model with `model.init=gpt2` at the base:

    m = width / model.mup_base_width
    l = layers / model.mup_base_layers    with model.init=completep; with mup l is 1
    a = model.mup_depth_power             1 is CompleteP

| parameter | std | multiplier | rate: AdamW, Lion | Muon | Adafactor | epsilon |
|---|---|---|---|---|---|---|
| embeddings, positions, vectors | 1 | 1 | 1 | AdamW's | 1 | 1/m |
| kernels | m^-1/2 | 1 | 1/m | 1 | m^-1/2 | 1/m |
| router and gate of shared experts | 1/m | 1 | 1/m | m^-1/2 | 1 | 1/m |
| head (or the embedding that it is tied to) | 0 (1) | 1/m | 1 | AdamW's | 1 | 1/m |
| classifier, value head | 0 | 1 | 1/m | AdamW's | 1/m | 1/m |
| in the layers, times | 1 | l^-a where a branch ends | l^(a-1) | l^(a-1) | l^(a-1) | l^-a |

Attention scores are times 1/K. Weight decay is times 1 / rate, so that its product with the rate stays (Dey et al. 2025);
under Muon it goes with the rate. The start of kernels at the ends of branches follows the base's depth in CompleteP, and the model's own in muP.

It is assumed that heads x head size, key and value heads, experts' and MLPs' widths grow as the width does. AdamW's rates
hold for a fixed number of key and value heads too; Muon's then want optimizer.rates. `llmjax coordcheck` measures it.

Sources: Yang et al. 2021, Tensor Programs V, Table 8 (muP); Dey et al. 2025, Don't be lazy, Table 1 (CompleteP, epsilon,
decay); Bernstein and Newhouse 2024 (an orthogonal update has the right size where both sides grow).
"""

import re
from dataclasses import dataclass

from ml_collections import ConfigDict

from llmjax import config
from llmjax.model.stacks import IN_LAYERS

SCHEMES = ("mup", "completep")
# Kind of parameter -> powers of m: of the std, of the rate by AdamW and Lion, by Muon, by Adafactor.
POWERS = {
    "vector": (0.0, 0.0, 0.0, 0.0),
    "kernel": (-0.5, -1.0, 0.0, -0.5),
    "narrow": (-1.0, -1.0, -0.5, 0.0),  # from the width to a number of outputs that stays
    "head": (0.0, 0.0, 0.0, 0.0),
    "readout": (0.0, -1.0, -1.0, -1.0),
}
COLUMN = {"muon": 2, "adafactor": 3}  # of POWERS; other optimizers: 1
ENDS = re.compile(r"/(out|down)/kernel$")


@dataclass(frozen=True)
class Scales:
    """Factors of one parameter, relative to the base."""

    std: float = 1.0
    multiplier: float = 1.0  # of what is made with it, in the forward pass
    rate: float = 1.0
    decay: float = 1.0  # of optimizer.weight_decay, which is also times the rate
    epsilon: float = 1.0  # AdamW's


def scales(c: ConfigDict, name: str, *, optimizer: str = "adamw") -> Scales:
    """The factors of a parameter by its path, such as layers/attention/query/kernel; all 1 in other schemes.

    Args:
        c: the model's settings.
        optimizer: the rule that updates the parameter; under Muon embeddings, heads and vectors have "adamw".
    """
    if c.init not in SCHEMES:
        return Scales()
    m, depth, power = width_ratio(c), depth_ratio(c), c.mup_depth_power
    kind, inside = _kind(name), IN_LAYERS.match(name) is not None
    powers = POWERS[kind]
    to_logits = kind == "head" or (c.tie_embeddings and name == "embedding")
    ends_branch = inside and ENDS.search(name) is not None
    rate = m ** powers[COLUMN.get(optimizer, 1)] * (depth ** (power - 1.0) if inside else 1.0)
    return Scales(
        std=0.0 if kind in ("head", "readout") else m ** powers[0],
        multiplier=1 / m if to_logits else depth**-power if ends_branch else 1.0,
        rate=rate,
        decay=1.0 if optimizer == "muon" else 1 / rate,
        epsilon=1 / m / (depth**power if inside else 1.0),
    )


def _kind(name: str) -> str:
    if name == "head/kernel":
        return "head"
    if name in ("classifier/kernel", "value/kernel"):
        return "readout"
    if not name.endswith("kernel") or name.endswith("conv/kernel"):
        return "vector"
    return "narrow" if re.search(r"/(router|shared_gate)/kernel$", name) else "kernel"


def width_ratio(c: ConfigDict) -> float:
    """m: the width relative to that at which settings were chosen; 1 in other schemes."""
    return float(c.width / c.mup_base_width) if c.init in SCHEMES else 1.0


def depth_ratio(c: ConfigDict) -> float:
    """l: the layers relative to those at which settings were chosen; 1 in other schemes than CompleteP."""
    return float(c.layers / c.mup_base_layers) if c.init == "completep" else 1.0


def is_base(c: ConfigDict) -> bool:
    """Whether all rates, decays and epsilons are as set: another scheme, or the base itself."""
    return width_ratio(c) == 1 and depth_ratio(c) == 1


def attention_scale(c: ConfigDict) -> float:
    """The factor on attention scores: as set, or 1/sqrt(K); in these schemes 1/K, because queries and keys are correlated."""
    size = config.head_size(c)
    return float(c.attention_scale or (1 / size if c.init in SCHEMES else size**-0.5))


def logit_scale(c: ConfigDict) -> float:
    """The factor on the logits: as set, and in these schemes divided by m."""
    return float(c.logit_scale / width_ratio(c))


def branch_scale(c: ConfigDict) -> float:
    """The factor on what a branch adds to the residual stream: as set, and in CompleteP times l^-a."""
    return float(c.branch_scale * depth_ratio(c) ** -c.mup_depth_power)
