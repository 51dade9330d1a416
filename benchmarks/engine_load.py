"""The engine's cost of many requests, of one constrained text, and of hostile rows: counts, and CPU seconds of this
thread.

    python benchmarks/engine_load.py --out results/engine_load.json       about 2 minutes on 2 idle cores
    python benchmarks/engine_load.py --waiting 1000                       to see that it runs

The model is tiny (two layers of width 64), because the measure is the host's work. "admission": CPU seconds that the
scheduler takes to admit eight requests while many others wait, and to cancel one. Each prompt has 515 tokens, of which
512 are the same (`first`: the request that reads them, `next`: those after it). "one of a given form": calls of the
decoding program until three free texts of 64 tokens are written, alone and beside one that matches [a-z]{60}.
"hostile": rows of wrong types, ranges, encodings and forms between good ones. How many good rows have the text that
they have without the others? "long prompt": the most prompt tokens that are read between two calls of decoding, while
eight texts are written and a prompt of 900 tokens arrives. "decoding by length of prompts": the price, in steps, of
reading long prompts between calls of decoding. If each prompt were read at once, short and long prompts would take
equally many.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import make_parser, write

from llmjax import config
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.infer import batch
from llmjax.infer.engine import Engine
from llmjax.infer.request import Request
from llmjax.infer.scheduler import Read
from llmjax.model import transformer

TOKENIZER = dataclasses.replace(byte_tokenizer(), chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
HOSTILE: tuple[Any, ...] = (
    {"prompt": None}, {"prompt": 5}, {"prompt": "half \ud83d"}, {"prompt": "x" * 5000}, {"ids": ["a"]}, {"ids": []},
    {"messages": "hi"}, {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "user", "content": "\ud83d"}]},
    {"prompt": "x", "temperature": "0.5"}, {"prompt": "x", "temperature": None}, {"prompt": "x", "max_new_tokens": 2.5},
    {"prompt": "x", "max_new_tokens": 10**12}, {"prompt": "x", "seed": "1"}, {"prompt": "x", "stop": None},
    {"prompt": "x", "logit_bias": [1]}, {"prompt": "x", "logit_bias": {str(i): float("-inf") for i in range(288)}},
    {"prompt": "x", "regex": "a{1000000}"}, {"prompt": "x", "regex": "x(a{1000}){1000}"}, {"prompt": "x", "regex": "("},
    {"prompt": "x", "json_schema": {"type": "thing"}}, {"prompt": "x", "grammar": "start: missing"}, [1], None,
    b"{", b"[" * 100_000, b'{"prompt": "caf\xe9"}',
)  # fmt: skip


def engine(**given: Any) -> Engine:
    """An engine of a tiny model with random weights."""
    c = config.base().model
    c.update({"layers": 2, "width": 64, "heads": 4, "mlp_width": 128, "max_length": 1024, "vocab_size": 288})
    module = transformer.build(c)
    params = jax.jit(lambda key: transformer.init_params(module, key))(jax.random.key(0))
    return Engine(module, params, TOKENIZER, **{"slots": 8, "length": 1024, "weight_format": "stored", **given})


def admission(waiting: int) -> dict[str, float]:
    """Seconds of CPU to admit eight of so many."""
    made = engine()
    common = tuple((7 * i) % 250 + 4 for i in range(512))
    began = time.thread_time()
    for i in range(waiting):
        made.submit(Request((*common, 10 + i % 200, 20 + i // 200 % 200, 5), 16))
    submit = (time.thread_time() - began) / waiting
    scheduler = made._scheduler
    seconds: dict[str, float] = {"submit": submit, "first": 0.0, "next": 0.0}
    actions = scheduler.reads()
    admitted = 0
    while True:
        began = time.thread_time()
        action = next(actions, None)
        seconds["next" if admitted else "first"] += time.thread_time() - began
        if action is None:
            break
        made._do(action)
        admitted = sum(live is not None and live.writing for live in scheduler.slots)
    seconds["next"] /= 7
    began = time.thread_time()
    made.cancel(waiting - 1)
    return seconds | {"cancel": time.thread_time() - began}


def calls_beside_a_form() -> dict[str, int]:
    """Calls of decoding until the free texts are written."""
    made = engine()
    counts = {}
    decode, calls = made._decode, []
    made._decode = lambda *given: (calls.append(1), decode(*given))[1]  # type: ignore[method-assign]
    for name, forms in (("alone", 0), ("beside one", 1)):
        calls.clear()
        for _ in range(forms):
            made.submit(Request((5,), 64, regex="[a-z]{60}"))
        left = {made.submit(Request((5 + i,), 64, temperature=0.0, logit_bias={2: -1e9})) for i in range(3)}
        while left:
            left -= {event.number for event in made.step() if event.finish}
        counts[name] = len(calls)
        for _ in made.run():
            pass
    return counts


def hostile(count: int) -> dict[str, int]:
    """So many hostile rows among as many good ones."""
    good = [{"id": f"good {i}", "prompt": f"question {i}"} for i in range(count)]
    bad = [HOSTILE[i % len(HOSTILE)] for i in range(count)]

    def answers(lines: list[Any], folder: Path) -> dict[str, Any]:
        data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "prompts.jsonl").write_bytes(b"\n".join(data))
        rows = list(batch.read_prompts(folder / "prompts.jsonl"))
        # The good ones have the numbers that they have among the others, and so the same random numbers.
        rows = [dataclasses.replace(row, number=int(str(row.id)[5:]) if "good" in str(row.id) else 0) for row in rows]
        rows = batch.with_requests(TOKENIZER, rows, {"max_new_tokens": 8})
        batch.answer_file(engine(length=256), rows, folder / "out.jsonl")
        return {str(row["id"]): row for row in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        alone = answers(list(good), Path(one))
        found = answers([row for pair in zip(good, bad, strict=True) for row in pair], Path(other))
    same = sum(found[str(row["id"])].get("text") == alone[str(row["id"])]["text"] for row in good)
    errors = sum("error" in row for row in found.values())
    return {"good rows": count, "answered the same": same, "hostile rows": count, "errors with their line": errors}


def read_between_calls() -> int:
    """The most tokens of prompts between two calls of decoding while texts are written."""
    made = engine(slots=9)
    for i in range(8):
        made.submit(Request((5 + i,), 400, logit_bias={2: -1e9}))
    made.step()
    most, spent = 0, 0
    do, decode = made._do, made._decode

    def counted(action: Any) -> None:
        nonlocal spent
        spent += action.rows * action.size if isinstance(action, Read) else 0
        do(action)

    def ended(*given: Any) -> Any:
        nonlocal most, spent
        most, spent = max(most, spent), 0
        return decode(*given)

    made._do, made._decode = counted, ended  # type: ignore[method-assign]
    made.submit(Request(tuple(np.random.default_rng(0).integers(4, 260, 900).tolist()), 8))
    for _ in made.run():
        pass
    return most


def decoding_steps(prompt: int) -> dict[str, int]:
    """Calls and steps of decoding for 32 texts of 32 to 128 tokens in eight slots, all waiting, after such prompts."""
    made = engine()
    rng = np.random.default_rng(7)
    for new in rng.integers(32, 129, 32).tolist():
        ids = tuple(rng.integers(4, 260, prompt).tolist())
        made.submit(Request(ids, new, temperature=0.0, logit_bias={2: -1e9}))
    counts = {"calls": 0, "steps": 0}
    decode = made._decode

    def counted(*given: Any) -> Any:
        written = decode(*given)
        counts["calls"] += 1
        counts["steps"] += int(np.any(written.given, axis=1).sum())
        return written

    made._decode = counted  # type: ignore[method-assign]
    for _ in made.run():
        pass
    return counts


def main() -> None:
    """Measure, print and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--waiting", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    results["seconds of CPU by requests that wait"] = {str(n): admission(n) for n in args.waiting}
    results["decoding calls, one of a given form"] = calls_beside_a_form()
    results["hostile"] = hostile(args.rows)
    results["tokens of prompts between two calls of decoding"] = read_between_calls()
    results["decoding by length of prompts"] = {str(n): decoding_steps(n) for n in (100, 350)}
    print(json.dumps(results, indent=1))
    write(results, args.out)


if __name__ == "__main__":
    main()
