"""The generate stage: continues the prompts of the config, prints and keeps the samples."""

import json
import time
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.errors import UserError
from llmjax.infer.language_model import load
from llmjax.objectives import OBJECTIVES
from llmjax.startup.cache import cache_of

SAMPLES = "generate/samples.jsonl"  # in the run's folder


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError if there is no prompt."""
    if not c.generate.prompts:
        raise UserError("generate.prompts is empty: give at least one, such as --config.generate.prompts='[\"def \"]'")


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Continue `c.generate.prompts` with the run's newest checkpoint and write WORKDIR/generate/samples.jsonl.

    Rows: prompt, text (the continuation), finish ("stop", "eos" or "length").

    Raises:
        UserError: if the model cannot be read.
    """
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c))
    if not OBJECTIVES[model.config.objective.name].reads_left_to_right:
        print(
            f"nothing is generated: objective.name={model.config.objective.name} does not teach a model to continue text"
        )
        return {"prompts": 0, "checkpoint_step": model.step}
    settings = c.generate.to_dict()
    prompts = list(settings.pop("prompts"))
    began = time.perf_counter()
    completions = model.generate(prompts, seed=c.seed, **settings)
    seconds = time.perf_counter() - began
    rows = [{"prompt": one.prompt, "text": one.text, "finish": one.finish} for one in completions]
    storage.write_text(workdir / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
    show(workdir)
    tokens = sum(len(one.tokens) for one in completions)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "seconds": seconds,  # compilation included
        "checkpoint_step": model.step,
    }


def show(workdir: Path) -> None:
    """Print the samples of a run."""
    for line in storage.read_lines(workdir / SAMPLES) if (workdir / SAMPLES).exists() else ():
        row = json.loads(line)
        print(f"---- {row['finish']}\n{row['prompt']}{row['text']}")
