"""Our preference and policy losses, on whole models, beside numbers that TRL gave for the same inputs.

    python benchmarks/trl_golden.py --golden ../shared/data/posttrain/golden_trl/golden.json

FILE.json has settings with "loss" and "grad_norm" under "dpo" and "grpo"; beside it lie batch.json (ids, masks,
advantages, old and reference log-probabilities) and two models, policy/ and reference/, in Hugging Face's format. For
each setting the loss and the norm of its gradient for all parameters are printed with their differences. The exit
status is 1 when a loss differs by more than 1e-5 of itself and 1e-6, or a norm by more than 1e-4 of itself, unless
REASONS says why TRL's number is not the right one. Nothing of TRL or PyTorch is needed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llmjax
from llmjax import config
from llmjax.data.examples import Example
from llmjax.data.packing import packed, size_of
from llmjax.interop.read import import_model
from llmjax.objectives import losses, policy, preference
from llmjax.objectives.answers import per_answer
from llmjax.objectives.log_probs import log_probs

REASONS = {
    "sigmoid, label_smoothing": "TRL's sigmoid ignores label_smoothing; conservative DPO (Mitchell 2023) has two terms: "
    "-(1 - e) log sigmoid(x) - e log sigmoid(-x)",
}
PREFERENCES = {"exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo"}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
AGGREGATE = {"grpo": "sequence", "sapo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token",
             "dr_grpo": "constant", "luspo": "sequence_sum"}  # fmt: skip


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example(np.array([*prompt, *answer], np.int32), np.array([0] * len(prompt) + [1] * len(answer), np.float32))


def pairs(rows: list[dict[str, list[int]]], reference: Any) -> dict[str, np.ndarray]:
    """A batch of a pair a row."""
    sides = [[example(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in rows]
    length = max(sum(map(size_of, both)) for both in sides)
    made = [packed(both, length=length) for both in sides]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    tokens = sum(float(both[0].weights.sum()) for both in sides)
    return batch | {
        "reference": np.asarray(summed(reference, batch, answers=2)),
        "pair_weights": np.ones((len(rows), 1), np.float32),
        "token_share": np.full(len(rows), len(rows) / tokens, np.float32),
    }


def summed(model: Any, batch: dict[str, np.ndarray], *, answers: int) -> jax.Array:
    """Log-probabilities of each answer, (B, A)."""
    made = log_probs(losses.predict(model.module, model.params, batch, None), loss_chunks=1)
    return per_answer(made.targets * batch["weights"], batch["segments"], answers)


def rollouts(given: dict[str, Any]) -> dict[str, np.ndarray]:
    """A batch of a sampled text a row. What is given by token is moved to where the row has that token as its target."""
    names = {"old": "old_log_probs", "reference": "reference_log_probs"}
    rows = []
    for i, mask in enumerate(given["completion_mask"]):
        prompt = [token for token, real in zip(given["prompt_ids"][i], given["prompt_mask"][i], strict=True) if real]
        answer = given["completion_ids"][i][: sum(mask)]
        row = packed([example(prompt, answer)], length=len(given["prompt_ids"][i]) + len(mask))
        for name, source in names.items():
            row[name] = np.zeros_like(row["weights"])
            row[name][row["weights"] > 0] = given[source][i][: len(answer)]
        row["advantages"] = np.full_like(row["weights"], given["advantages"][i])
        rows.append(row)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"sampler": batch["old"], "exists": np.ones((len(rows), 1), np.float32)}


def settings_of(kind: str, name: str, given: dict[str, Any]) -> Any:
    """The settings under `objective` that say the same as TRL's."""
    c = config.base().objective.copy_and_resolve_references()
    if kind == "dpo":
        loss, *rest = name.split(", ")
        said = dict(part.rsplit(" ", 1) for part in rest)
        c.preference.loss, c.preference.beta = PREFERENCES.get(loss, loss), float(said.get("beta", 0.1))
        c.preference.label_smoothing = float(said.get("label_smoothing", 0))
        c.preference.divergence = DIVERGENCES[said.get("f_divergence", "reverse_kl")]
        c.preference.alpha = 1 - float(said.get("alpha", 0.5))  # TRL's exponent is ours less 1
        return c
    loss, level, beta, corrected = name.split(", ")
    c.policy.loss, c.policy.level = loss if loss in policy.LOSSES else "clip", level
    c.policy.aggregate, c.policy.length = AGGREGATE[loss], given["max_completion_length"]
    c.policy.clip, c.policy.ratio_cap = given["epsilon"], given["cispo_epsilon_high"]
    c.policy.temperature = 1.0
    c.policy.kl_weight = float(beta.split()[1])
    c.policy.kl_estimator = "k3" if corrected.endswith("True") else "k3_uncorrected"
    return c


def measured(model: Any, objective: Any, batch: dict[str, Any], c: Any) -> tuple[float, float]:
    """The loss and the norm of its gradient."""

    def loss(params: Any) -> jax.Array:
        sums = objective(model.module, params, batch, None, c)
        return sums.objective / sums.weight

    value, gradient = jax.value_and_grad(loss)(jax.tree.map(jnp.float32, model.params))
    return float(value), float(optax.tree.norm(gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, help="the file of TRL's numbers")
    args = parser.parse_args()
    golden, given = (json.loads((args.golden.parent / name).read_text()) for name in (args.golden.name, "batch.json"))
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name in ("policy", "reference"):
            import_model(args.golden.parent / name, Path(folder) / name, dtype="float32", tokenizer="none")
            models[name] = llmjax.load(Path(folder) / name)
        batches = {"dpo": pairs(given["dpo_rows"], models["reference"]), "grpo": rollouts(given["grpo"])}
        objectives = {"dpo": preference.preference_loss, "grpo": policy.policy_loss}
        failed = []
        print(f"{'setting':52}{'loss':>14}{'TRL':>14}{'differs by':>12}{'norm':>12}{'TRL':>12}{'differs by':>12}")
        for kind, objective in objectives.items():
            for name, wanted in golden.get(kind, {}).items():
                loss, norm = measured(
                    models["policy"], objective, batches[kind], settings_of(kind, name, given["grpo"])
                )
                differences = abs(loss - wanted["loss"]), abs(norm / wanted["grad_norm"] - 1)
                print(
                    f"{name:52}{loss:14.7f}{wanted['loss']:14.7f}{differences[0]:12.1e}"
                    f"{norm:12.5f}{wanted['grad_norm']:12.5f}{differences[1]:12.1e}"
                )
                if differences[0] > max(1e-6, 1e-5 * abs(wanted["loss"])) or differences[1] > 1e-4:
                    reason = next(
                        (why for start, why in REASONS.items() if name.startswith(start) and not name.endswith(" 0.0")),
                        None,
                    )
                    failed += [] if reason else [name]
                    print(f"    {reason or 'DIFFERS'}")
    sys.exit(f"{len(failed)} settings differ: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
