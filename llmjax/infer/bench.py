"""The speed of an engine: time to the first token, time per token, tokens a second, and the share of memory bandwidth."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import storage
from llmjax.infer.engine import Engine
from llmjax.infer.request import Request


def bandwidth(device: jax.Device) -> float:
    """Bytes a second that a device reads, measured with a large matrix times a vector, as in decoding. The best of five."""
    size, width = 1 << (26 if device.platform == "cpu" else 28), 1024
    matrix, vector = (jax.device_put(jnp.ones(shape), device) for shape in ((size // width, width), (width,)))
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(matrix, vector).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 4 * size / best


def measure(engine: Engine, *, prompt: int, new: int, rounds: int = 3, peak: float = 0.0) -> dict[str, float]:
    """Let all slots write `new` tokens after prompts of `prompt` tokens; medians over rounds.

    Returns:
        seconds_to_first_token: of one request to an idle engine.
        seconds_per_token: of a step for all slots, without the first step and the prompts.
        decoded_tokens_per_second, tokens_per_second: without and with the time of the prompts.
        bytes_per_step: parameters and half-filled caches, which a step must read.
        bandwidth_share: of `peak`; not with drafts, where a step writes several tokens.
    """
    engine.warm_up()
    rng = np.random.default_rng(0)
    V = engine.tokenizer.vocab_size

    def ids() -> tuple[int, ...]:
        return tuple(rng.integers(min(4, V - 1), V, prompt).tolist())

    def seconds(count: int, new: int) -> float:
        for _ in range(count):
            engine.submit(Request(ids(), new, temperature=0.0))
        began, before = time.perf_counter(), engine.written
        for _ in engine.run():
            pass
        counted.append(engine.written - before)
        return time.perf_counter() - began

    first, prompts, whole, counted = [], [], [], list[int]()
    for _ in range(rounds):
        first.append(seconds(1, 1))
        prompts.append(seconds(engine.count, 1))
        whole.append(seconds(engine.count, new))
    # A text may end early by chance, so steps are counted by the tokens of a slot.
    steps = counted[-1] / engine.count - 1
    step = max(statistics.median(whole) - statistics.median(prompts), 0.0) / max(steps, 1.0)
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.slots.caches))
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)) + cache / 2
    found = {
        "slots": engine.count,
        "seconds_to_first_token": statistics.median(first),
        "seconds_per_token": step,
        "decoded_tokens_per_second": engine.count / step if step else 0.0,
        "tokens_per_second": counted[-1] / statistics.median(whole),
        "bytes_per_step": read,
    }
    return found | ({"bandwidth_share": read / step / peak} if peak and step and not engine.ahead else {})


def table(rows: Sequence[dict[str, float]]) -> str:
    """The results as a table of text."""
    heads = ("slots", "first token", "per token", "tokens/s decoding", "tokens/s in all", "of bandwidth")
    lines = [" ".join(f"{head:>18}" for head in heads)]
    for r in rows:
        cells = (
            f"{r['slots']:.0f}", f"{1e3 * r['seconds_to_first_token']:.1f} ms", f"{1e3 * r['seconds_per_token']:.2f} ms",
            f"{r['decoded_tokens_per_second']:,.0f}", f"{r['tokens_per_second']:,.0f}",
            f"{100 * r['bandwidth_share']:.0f}%" if "bandwidth_share" in r else "-",
        )  # fmt: skip
        lines.append(" ".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path) -> None:
    """FOLDER/infer.json and FOLDER/infer.png: tokens a second and time per token over the number of slots."""
    from matplotlib.figure import Figure

    storage.write_json(folder / "infer.json", results)
    rows = results["rows"]
    slots = [row["slots"] for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    speed, delay = figure.subplots(1, 2)
    speed.plot(slots, [row["decoded_tokens_per_second"] for row in rows], "o-", label="decoding")
    speed.plot(slots, [row["tokens_per_second"] for row in rows], "o--", label="prompts included")
    speed.set(xlabel="texts at a time", ylabel="tokens a second", ylim=(0, None))
    speed.legend()
    delay.plot(slots, [1e3 * row["seconds_per_token"] for row in rows], "o-", label="per token")
    delay.plot(slots, [1e3 * row["seconds_to_first_token"] for row in rows], "o--", label="first token, alone")
    delay.set(xlabel="texts at a time", ylabel="milliseconds", ylim=(0, None))
    delay.legend()
    figure.savefig(folder / "infer.png", dpi=120)
