"""The server under load on this machine: many streams, clients that leave, slow readers; beside the engine's own loop.

    python benchmarks/serving.py --workdir runs/smollm2 --streams 1000 --out results/serving.json    about 10 minutes
    python benchmarks/serving.py --workdir runs/quickstart --streams 40                              to see that it runs

"engine": the same requests through `Engine.step` in this process, all known from the start: tokens a second, and seconds
of CPU. "alone": how many of a few texts are the same when nothing else is written. "queued": all streams at once, with
`serve.queue` for all of them; a share of the clients leaves after a few chunks, and a share reads slowly. Every text that
was finished must be the engine's. "default": the same with the default queue and no client that leaves: what was
admitted must be whole, the rest answered with 429. Times to the first token are from the request's first byte, so with
more streams than slots they are mostly the wait in the queue. The server's seconds of CPU and its memory are read from
/proc, so this runs on Linux.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, write

from llmjax import config
from llmjax.infer.command import engine_settings
from llmjax.infer.language_model import load

PROMPT = "Text {}: the model "
ALONE = 4  # texts that are written alone
SLOW_SECONDS = 0.05  # between two reads of a slow reader
CHUNKS = 3  # that a client reads before it leaves


@dataclass
class Stream:
    """What a client saw."""

    status: int = 0
    text: str = ""
    done: bool = False
    first: float = float("nan")  # seconds
    whole: float = float("nan")
    left: bool = False


def fields(i: int, tokens: int, eos: Sequence[int]) -> dict[str, Any]:
    """The request of stream number i; every text has the same length."""
    bias = {str(one): -100 for one in eos}
    return {
        "prompt": PROMPT.format(i),
        "max_tokens": tokens,
        "seed": i,
        "temperature": 1.0,
        "top_p": 1.0,
        "logit_bias": bias,
    }


async def read(port: int, body: dict[str, Any], *, leave: bool, slow: bool) -> Stream:
    """Ask for a stream, and read it."""
    found, began = Stream(left=leave), time.perf_counter()
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        found.status = int((await reader.readline()).split()[1])
        chunks = 0
        while found.status == 200 and (line := await reader.readline()):
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                found.done = True
                break
            text = "".join(choice["text"] for choice in json.loads(line[6:]).get("choices", ()))
            if text and not found.text:
                found.first = time.perf_counter() - began
            found.text += text
            chunks += 1
            if leave and chunks >= CHUNKS:
                break
            if slow:
                await asyncio.sleep(SLOW_SECONDS)
        found.whole = time.perf_counter() - began
    finally:
        writer.close()
    return found


async def load_of(port: int, bodies: Sequence[dict[str, Any]], *, leave: float, slow: float, seed: int) -> list[Stream]:
    """All streams at once."""
    rng = random.Random(seed)
    plans = [(rng.random() < leave, rng.random() < slow) for _ in bodies]
    tasks = [read(port, body, leave=one[0], slow=one[1]) for body, one in zip(bodies, plans, strict=True)]
    return await asyncio.gather(*tasks)


class Process:
    """`llmjax serve` of a run."""

    def __init__(self, workdir: Path, slots: int, length: int, more: Sequence[str]) -> None:
        command = [sys.executable, "-m", "llmjax", "serve", "--workdir", str(workdir), "--port", "0"]
        command += [f"--config.infer.slots={slots}", f"--config.infer.length={length}", *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("serving ")), "")
        if not line:
            raise SystemExit("the server did not start: run llmjax serve by itself to see why")
        self.port = int(line.rpartition(":")[2])

    def memory(self) -> int:
        """Bytes that are resident."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def cpu(self) -> float:
        """Seconds of CPU that were used."""
        parts = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """End it; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def times(streams: Sequence[Stream], name: str) -> dict[str, float]:
    """Percentiles in seconds."""
    values = np.array([getattr(one, name) for one in streams if one.done])
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (50, 99)} if len(values) else {}


def measure(
    args: Any, bodies: Sequence[dict[str, Any]], expected: Sequence[str], length: int, *, queue: int, leave: float, slow: float
) -> dict[str, Any]:  # fmt: skip
    """The server under one load."""
    made = Process(args.workdir, args.slots, length, [f"--config.serve.queue={queue}", "--config.serve.seconds=0"])
    try:
        asyncio.run(load_of(made.port, bodies[: args.slots], leave=0, slow=0, seed=0))  # warm
        memory, cpu, began = made.memory(), made.cpu(), time.perf_counter()
        streams = asyncio.run(load_of(made.port, bodies, leave=leave, slow=slow, seed=args.seed))
        seconds, cpu = time.perf_counter() - began, made.cpu() - cpu
        again = asyncio.run(load_of(made.port, bodies[: args.slots], leave=0, slow=0, seed=0))  # nothing holds a slot
        after = made.memory()
    finally:
        status = made.end()
    done = [i for i, one in enumerate(streams) if one.done]
    written = sum(args.new_tokens for _ in done)
    return {
        "streams": len(streams), "finished": len(done), "left": sum(one.left and not one.done for one in streams),
        "refused_429": sum(one.status == 429 for one in streams),
        "lost": sum(one.status == 200 and not one.done and not one.left for one in streams),
        "different": sum(streams[i].text != expected[i] for i in done),
        "slots_free_afterwards": all(one.done for one in again), "exit_status": status,
        "tokens_per_second": round(written / seconds, 1), "cpu_seconds": round(cpu, 2), "seconds": round(seconds, 2),
        "first_token_seconds": times(streams, "first"), "whole_seconds": times(streams, "whole"),
        "memory_before": memory, "memory_after": after,
    }  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="the run to serve")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each text")
    parser.add_argument("--leave", type=float, default=0.1, help="the share of clients that leave")
    parser.add_argument("--slow", type=float, default=0.05, help="the share of slow readers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    c = config.load(str(args.workdir / "config.json"))
    model = load(args.workdir)
    tokenizer = model.tokenizer
    bodies = [fields(i, args.new_tokens, tokenizer.eos_ids) for i in range(args.streams)]
    ids = [[*tokenizer.prefix_ids, *tokenizer.encode(body["prompt"])] for body in bodies]
    length = max(map(len, ids)) + args.new_tokens
    if length > model.config.model.max_length:
        parser.error(
            f"prompts and texts have {length} tokens, and the model reads {model.config.model.max_length}: lower --new-tokens"
        )
    requests = [
        {"ids": row, "max_new_tokens": args.new_tokens, "seed": body["seed"], "logit_bias": body["logit_bias"]}
        for row, body in zip(ids, bodies, strict=True)
    ]  # the settings that are left out are those of the bodies: the model's own distribution
    engine = model.engine(length=length, likeliest=20, **{**engine_settings(c), "slots": args.slots})
    engine.warm_up()

    def run(some: Sequence[dict[str, Any]]) -> list[str]:
        numbers = [engine.submit(one) for one in some]
        done = dict(engine.run())
        return [done[number].text for number in numbers]

    began, cpu = time.perf_counter(), time.process_time()
    expected = run(requests)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    results: dict[str, Any] = {
        "engine": {
            "tokens_per_second": round(args.new_tokens * len(requests) / seconds, 1),
            "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
        },
        "alone": sum(run([one])[0] == text for one, text in zip(requests[:ALONE], expected, strict=False)) / ALONE,
        "queued": measure(args, bodies, expected, length, queue=args.streams, leave=args.leave, slow=args.slow),
        "default": measure(args, bodies, expected, length, queue=0, leave=0.0, slow=0.0),
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    write(results, args.out)


if __name__ == "__main__":
    main()
