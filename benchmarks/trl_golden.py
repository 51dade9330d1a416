"""Our preference and policy losses, on whole models, beside numbers that TRL gave for the same inputs.

    python benchmarks/trl_golden.py --golden ../shared/data/posttrain/golden_trl/golden.json

FILE.json has settings with "loss" and "grad_norm" under "dpo" and "grpo", and means of a DPO batch under "dpo_metrics";
beside it lie batch.json (ids, masks, advantages, old and reference log-probabilities) and two models, policy/ and
reference/, in Hugging Face's format. A setting is called by its loss and what else is set, in TRL's names or the short
ones of `DPO` and `GRPO`: "sigmoid+sft, loss_weights 1+0.5, beta 0.3" or "grpo, sequence, beta 0.04, epsilon_high 0.28".

For each setting the loss and the norm of its gradient for all parameters are printed with their differences. The exit
status is 1 when a loss differs by more than 1e-5 of itself and 1e-6, or a norm by more than 1e-4 of itself, unless
`reason` says why TRL's number is not the right one; and for a setting that this script does not know, which is named.
Nothing of TRL or PyTorch is needed.
"""

import argparse
import functools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import llmjax
from llmjax import config
from llmjax.data.examples import Example
from llmjax.data.packing import packed, size_of
from llmjax.errors import UserError
from llmjax.interop.read import import_model
from llmjax.objectives import losses, policy, preference
from llmjax.objectives.log_probs import log_probs
from llmjax.post.batches import weigh_length

PREFERENCES = {"exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo"}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
AGGREGATE = {"grpo": "sequence", "sapo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token",
             "dr_grpo": "constant", "luspo": "sequence_sum"}  # fmt: skip
SMOOTHED = {"exo", "robust", "aot", "aot_unpaired"}  # the losses in which TRL looks at label_smoothing


def chosen_from(table: dict[str, str]) -> Callable[[str], str]:
    def find(text: str) -> str:
        if text not in table:
            raise UserError(f"{text!r} is none of {', '.join(table)}")
        return table[text]

    return find


def truth(text: str) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if text.lower() not in known:
        raise UserError("give True or False")
    return known[text.lower()]


# what TRL sets -> our setting, and its value from TRL's
DPO: dict[str, tuple[str, Callable[[str], Any]]] = {
    "beta": ("beta", float),
    "label_smoothing": ("label_smoothing", float),
    "f_divergence": ("divergence", chosen_from(DIVERGENCES)),
    "alpha": ("alpha", lambda text: 1 - float(text)),  # TRL's exponent is ours less 1
    "discopop_tau": ("temperature", float),
    "ld_alpha": ("length_weight", float),
}
DPO |= {"f_divergence_type": DPO["f_divergence"], "f_alpha_divergence_coef": DPO["alpha"]}
GRPO: dict[str, tuple[str, Callable[[str], Any]]] = {
    "importance_sampling_level": ("level", chosen_from({"token": "token", "sequence": "sequence"})),
    "beta": ("kl_weight", float),
    "use_bias_correction_kl": ("kl_estimator", lambda text: "k3" if truth(text) else "k3_uncorrected"),
    "epsilon": ("clip", float),
    "epsilon_high": ("clip_high", float),
    "cispo_epsilon_high": ("ratio_cap", float),
    "delta": ("dual_clip", float),
    "sapo_temperature_pos": ("gate_positive", float),
    "sapo_temperature_neg": ("gate_negative", float),
    "max_completion_length": ("length", int),
    "temperature": ("temperature", float),
    "entropy_coef": ("entropy_weight", float),
}
GRPO |= {"corrected": GRPO["use_bias_correction_kl"]}
ROLLOUTS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages", "old_log_probs",
            "reference_log_probs", "policy_log_probs"}  # fmt: skip
METRICS = {
    "entropy": "entropy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "chosen_log_prob",
    "logps/rejected": "rejected_log_prob",
}
COUNTS = {"num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"}  # of TRL's log alone


class Setting(NamedTuple):
    """A setting's name, read: "sigmoid+sft, loss_weights 1+0.5" -> (("sigmoid", "sft"), {"loss_weights": "1+0.5"})."""

    losses: tuple[str, ...]
    said: dict[str, str]


def setting_of(name: str) -> Setting:
    first, *rest = re.split(r",\s*(?![^\[]*\])", name)
    said = {}
    for part in rest:
        key, _, value = part.strip().replace("=", " ", 1).partition(" ")
        if key in ("token", "sequence") and not value:
            key, value = "importance_sampling_level", key
        said[key] = value.strip()
    return Setting(tuple(re.findall(r"[\w-]+", first)), said)


def put(c: ConfigDict, table: dict[str, tuple[str, Callable[[str], Any]]], said: dict[str, Any]) -> None:
    for key, value in said.items():
        if key not in table:
            raise UserError(f"{key!r} is not compared: known are {', '.join(table)}")
        if str(value) == "None":  # as it is without
            continue
        name, read = table[key]
        try:
            c[name] = read(str(value))
        except ValueError as error:
            raise UserError(f"{key} {value!r} cannot be read: {error}") from None


def dpo_settings(name: str) -> ConfigDict:
    """The settings under `objective` that say the same as TRL's."""
    c = config.base().objective.copy_and_resolve_references()
    setting = setting_of(name)
    said = dict(setting.said)
    weights = re.findall(r"[^\s+,;\[\]()]+", said.pop("loss_weights", "")) or ["1"] * len(setting.losses)
    ours = {kind: kind for kind in (*preference.LOSSES, "sft")} | PREFERENCES
    if unknown := [loss for loss in setting.losses if loss not in ours]:
        raise UserError(f"the loss {unknown[0]!r} is not compared: known are {', '.join(ours)}")
    kinds = [ours[loss] for loss in setting.losses]
    if not kinds or len(set(kinds)) < len(kinds) or len(weights) != len(kinds):
        raise UserError(f"{len(kinds)} losses have {len(weights)} weights: give each loss once, and a weight for each")
    put(c.preference, DPO, said)
    try:
        c.preference.loss = " ".join(f"{kind}={float(weight)}" for kind, weight in zip(kinds, weights, strict=True))
    except ValueError:
        raise UserError(f"loss_weights {' '.join(weights)!r} are no numbers") from None
    if c.preference.divergence == "alpha" and c.preference.alpha == 0:
        c.preference.divergence = "reverse_kl"  # the limit
    return c


def grpo_settings(name: str, given: dict[str, Any]) -> ConfigDict:
    """The same of a policy loss; `given` are settings of all, in the batch's file."""
    c = config.base().objective.copy_and_resolve_references()
    losses, said = setting_of(name)
    loss = "+".join(losses)
    if loss not in AGGREGATE:
        raise UserError(f"the loss {loss!r} is not compared: known are {', '.join(AGGREGATE)}")
    if loss == "cispo" and "epsilon_high" in said:
        said["cispo_epsilon_high"] = said.pop("epsilon_high")
    c.policy.temperature = 1.0
    put(c.policy, GRPO, given | said)
    c.policy.loss = loss if loss in policy.LOSSES else "clip"
    c.policy.aggregate = AGGREGATE[loss]
    return c


def reason(kind: str, c: ConfigDict, batch: dict[str, np.ndarray]) -> str:
    """Why TRL's number of these settings is another and not the right one, "" where it must be ours."""
    if kind == "dpo":
        p = c.preference
        ours = preference.weighted_losses(p.loss).keys() & {"sigmoid", "sigmoid_norm"}
        if p.label_smoothing and ours:
            return (
                "TRL's sigmoid ignores label_smoothing; conservative DPO (Mitchell 2023) has two terms: "
                "-(1 - e) log sigmoid(x) - e log sigmoid(-x)"
            )
        return ""
    p = c.policy
    if p.aggregate == "sequence" and not batch["weights"].any(axis=1).all():
        return "TRL's mean over texts counts those without a token that is trained, which are left out here"
    if p.loss == "clip" and 0 < p.dual_clip < 1 + (p.clip_high or p.clip):
        return (
            "TRL's delta below 1 + epsilon_high also cuts tokens of a positive advantage; the dual clip is of negative ones "
            "(Ye et al. 2020)"
        )
    if p.entropy_weight and p.aggregate != "token":
        return "TRL's entropy bonus is a mean over tokens whatever the loss is; here it is a term of each token's loss"
    return ""


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example(np.array([*prompt, *answer], np.int32), np.array([0] * len(prompt) + [1] * len(answer), np.float32))


def pairs(rows: list[dict[str, list[int]]], reference: Any, *, length_weight: float = 1.0) -> dict[str, np.ndarray]:
    """A batch of a pair a row."""
    sides = [[example(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in rows]
    length = max(sum(map(size_of, both)) for both in sides)
    made = [packed(both, length=length) for both in sides]
    for row in made:
        if length_weight != 1:
            weigh_length(row, 2, length_weight)
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    tokens = sum(float(both[0].weights.sum()) for both in sides)
    return batch | {
        "reference": np.asarray(reference_of(reference, batch)),
        "pair_weights": np.ones((len(rows), 1), np.float32),
        "token_share": np.full(len(rows), len(rows) / tokens, np.float32),
    }


def reference_of(model: Any, batch: dict[str, np.ndarray]) -> jax.Array:
    """Log-probabilities of both answers of each pair, (B, 2)."""

    @jax.jit
    def of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        made = log_probs(losses.predict(model.module, params, batch, None), loss_chunks=1)
        return preference.summed(made.targets, batch, answers=2)

    return of(model.params, batch)


def rollouts(given: dict[str, Any]) -> dict[str, np.ndarray]:
    """A batch of a sampled text a row. What is given by token is moved to where the row has that token as its target."""
    count, width = len(given["completion_ids"]), len(given["completion_ids"][0])
    mask = np.array(given["completion_mask"], np.float32)
    lengths = mask.sum(axis=1).astype(int)
    if (mask != (np.arange(width) < lengths[:, None])).any():
        raise UserError("completion_mask has gaps: what tools wrote has 0 in tool_mask, and 1 in completion_mask")
    trained = np.array(given.get("tool_mask", np.ones_like(mask)), np.float32) * mask
    advantages = np.broadcast_to(np.array(given["advantages"], np.float32).reshape(count, -1), mask.shape)
    by_token = {
        "weights": trained,
        "advantages": advantages,
        "old": np.array(given["old_log_probs"], np.float32),
        "reference": np.array(given["reference_log_probs"], np.float32),
    }
    rows = []
    for i, n in enumerate(lengths):
        prompt = [token for token, real in zip(given["prompt_ids"][i], given["prompt_mask"][i], strict=True) if real]
        row = packed([example(prompt, given["completion_ids"][i][:n])], length=len(given["prompt_ids"][i]) + width)
        places = row["weights"] > 0
        for name, values in by_token.items():
            row[name] = np.zeros(row["weights"].shape, np.float32)
            row[name][places] = values[i, :n]
        rows.append(row)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"sampler": batch["old"], "exists": np.ones((len(rows), 1), np.float32)}


def measured(
    model: Any, objective: Any, batch: dict[str, Any], c: ConfigDict
) -> tuple[float, float, dict[str, losses.Mean]]:
    """The loss, the norm of its gradient, and the metrics."""

    def loss(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        sums = objective(model.module, params, batch, None, c)
        return sums.objective / sums.weight, sums.metrics

    # Each setting is a program that runs once, so it is compiled without optimisation, in half of the time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(params: Any, batch: Any) -> Any:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return value, optax.tree.norm(gradient), metrics

    value, norm, metrics = both(jax.tree.map(jnp.float32, model.params), batch)
    return float(value), float(norm), metrics


def compared(golden: dict[str, Any], given: dict[str, Any], models: dict[str, Any]) -> Iterator[str]:
    """The names of what differs, while all lines are printed."""
    length_weighted = functools.cache(
        lambda weight: pairs(given["dpo_rows"], models["reference"], length_weight=weight)
    )
    common = {key: value for key, value in given.get("grpo", {}).items() if key not in ROLLOUTS}
    print(f"{'setting':52}{'loss':>14}{'TRL':>14}{'differs by':>12}{'norm':>12}{'TRL':>12}{'differs by':>12}")
    for kind, settings in golden.items():
        if kind == "versions":
            continue
        if kind == "dpo_metrics":
            yield from compared_metrics(settings, measured(
                models["policy"], preference.preference_loss, length_weighted(1.0), dpo_settings("sigmoid")
            )[2])  # fmt: skip
            continue
        if kind not in ("dpo", "grpo"):
            print(f"    {kind}: not compared: known are dpo, dpo_metrics and grpo")
            yield kind
            continue
        for name, wanted in settings.items():
            try:
                if kind == "dpo":
                    c = dpo_settings(name)
                    batch, objective = length_weighted(c.preference.length_weight), preference.preference_loss
                else:
                    c = grpo_settings(name, common)
                    batch, objective = rollouts(given["grpo"]), policy.policy_loss
            except UserError as error:
                print(f"{name:52} {error}")
                yield name
                continue
            loss, norm, _ = measured(models["policy"], objective, batch, c)
            near = math.isclose(loss, wanted["loss"], rel_tol=1e-5, abs_tol=1e-6)
            same = math.isclose(norm, wanted["grad_norm"], rel_tol=1e-4, abs_tol=1e-7)
            by = abs(loss - wanted["loss"]), abs(norm - wanted["grad_norm"]) / max(abs(wanted["grad_norm"]), 1e-30)
            print(
                f"{name:52}{loss:14.7f}{wanted['loss']:14.7f}{by[0]:12.1e}"
                f"{norm:12.5f}{wanted['grad_norm']:12.5f}{by[1]:12.1e}"
            )
            if not (near and same):
                why = reason(kind, c, batch)
                print(f"    {why or 'DIFFERS'}")
                if not why:
                    yield name


def compared_metrics(wanted: dict[str, float], metrics: dict[str, losses.Mean]) -> Iterator[str]:
    for name, value in wanted.items():
        if name in COUNTS:
            continue
        if name not in METRICS:
            print(f"    {name}: not compared: known are {', '.join(METRICS)}")
            yield name
            continue
        mean = metrics[METRICS[name]]
        ours = float(mean.total / mean.weight)
        print(f"{name:52}{ours:14.7f}{value:14.7f}{abs(ours - value):12.1e}")
        if not math.isclose(ours, value, rel_tol=1e-5, abs_tol=2e-6):
            print("    DIFFERS")
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, help="the file of TRL's numbers")
    args = parser.parse_args()
    try:
        differs = run(args.golden)
    except UserError as error:
        sys.exit(str(error))
    sys.exit(f"{len(differs)} settings differ: {', '.join(differs)}" if differs else 0)


def read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is no JSON object")
    return found


def run(file: Path) -> list[str]:
    """The names of what differs. Raises UserError for files that are not there, or of another form."""
    golden, given = read(file), read(file.with_name("batch.json"))
    for kind, settings in golden.items():
        needed = {"dpo": "dpo_rows", "dpo_metrics": "dpo_rows", "grpo": "grpo"}.get(kind)
        if needed and needed not in given:
            raise UserError(f"{file.with_name('batch.json')} has no {needed}, which the settings of {kind} need")
        for name, wanted in settings.items() if isinstance(settings, dict) and kind in ("dpo", "grpo") else ():
            if not isinstance(wanted, dict) or not all(
                isinstance(wanted.get(key), int | float) for key in ("loss", "grad_norm")
            ):
                raise UserError(f"{file}: {kind}: {name!r} is {wanted!r}: give numbers for loss and grad_norm")
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name in ("policy", "reference"):
            import_model(file.parent / name, Path(folder) / name, dtype="float32", tokenizer="none")
            models[name] = llmjax.load(Path(folder) / name)
        return list(compared(golden, given, models))


if __name__ == "__main__":
    main()
