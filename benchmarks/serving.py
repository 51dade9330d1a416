"""The server under load on this machine: many streams, clients that leave, slow readers, kills; beside the engine's own loop.

    python benchmarks/serving.py --out results/serving.json                    a tiny model, about 3 minutes of a core
    python benchmarks/serving.py --workdir runs/smollm2 --out results/serving_smollm2.json

"engine": the same requests through `Engine.step` in this process, all known from the start: tokens a second, and seconds
of CPU. "alone": how many of a few texts are the same when nothing else is written. "queued": all streams at once, with
`serve.queue` for all of them; a share of the clients leaves after a few chunks, and a share reads slowly. Every text that
was finished must be the engine's. This load comes twice, and the memory must not grow from the first time to the second.
"default": the same with the default queue and no client that leaves: what was admitted must be whole, the rest answered
with 429. "killed": the server is killed (SIGKILL) amid streams. No client may take a cut text for a whole one, rated
answers must be whole rows, and the server must start again. "checks" says what held. Times to the first token are from the
request's first byte, so with more streams than slots they are mostly the wait in the queue. "engine_share" is the engine's
CPU for a token over the server's in the load without clients that leave. The server's seconds of CPU and its memory are
read from /proc, so this runs on Linux.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import llmjax, make_parser, write

from llmjax import config
from llmjax.infer.command import engine_settings
from llmjax.infer.language_model import load

PROMPT = "Text {}: the model "
ALONE = 4  # texts that are written alone
SLOW_SECONDS = 0.05  # between two reads of a slow reader
CHUNKS = 3  # that a client reads before it leaves
KILLED = 100  # streams that are cut by a kill
GROWTH = 0.05  # of the memory, from one load to the same again
TINY = (
    "--config.tokenizer.kind=byte", "--config.model.layers=2", "--config.model.width=32", "--config.model.heads=2",
    "--config.model.mlp_width=64", "--config.model.vocab_size=320", "--config.model.max_length=512",
    "--config.train.batch_size=8", "--config.train.sequence_length=32", "--config.train.duration=20 steps",
    "--config.train.eval_every=0 steps", "--config.data.min_bytes=1", "--config.data.holdout_percent=20",
    "--config.stages=('prepare','tokenizer','train')",
)  # fmt: skip

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@contextlib.contextmanager
def served_run(workdir: Path | None, more: Sequence[str] = ()) -> Iterator[Path]:
    """The run that is served: the one that is given, without what its server has kept; or a tiny model of bytes.

    `more` are settings of the tiny model.
    """
    with tempfile.TemporaryDirectory() as name:
        if workdir is not None:
            linked = Path(name) / workdir.resolve().name
            linked.mkdir()
            for path in workdir.resolve().iterdir():
                if path.name != "serve":
                    (linked / path.name).symlink_to(path)
            yield linked
            return
        texts = Path(name) / "texts"
        texts.mkdir()
        for i in range(60):
            (texts / f"{i}.txt").write_text(f"Text {i}: the model reads the number {i * 7} and writes it again.\n" * 8)
        given = (f"--config.data.sources=['{texts}']", *TINY, *more, "--workdir", Path(name) / "tiny")
        llmjax("run", "--config", "configs/quickstart.py", *given, log=Path(name) / "log")
        (Path(name) / "tiny" / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
        yield Path(name) / "tiny"


@dataclass
class Stream:
    """What a client saw."""

    status: int = 0
    text: str = ""
    finish: str = ""  # why the text ended, as the server says it
    done: bool = False  # the end of the stream has come
    first: float = float("nan")  # seconds
    whole: float = float("nan")
    left: bool = False


def fields(i: int, tokens: int) -> dict[str, Any]:
    """The request of stream number i. `engine_alone` forbids the end of the text, so all texts have the same length."""
    return {"prompt": PROMPT.format(i), "max_tokens": tokens, "seed": i, "temperature": 1.0, "top_p": 1.0}


async def read(port: int, body: dict[str, Any], *, leave: bool, slow: bool) -> Stream:
    """Ask for a stream, and read it until its end, or until the connection is closed."""
    found, began = Stream(left=leave), time.perf_counter()
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        line = await reader.readline()
        found.status, chunks = int(line.split()[1]) if line else 0, 0
        while found.status == 200 and (line := await reader.readline()):
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                found.done = True
                break
            if not line.endswith(b"\n"):
                break  # cut within an event
            choices = json.loads(line[6:]).get("choices", ())
            text = "".join(choice["text"] for choice in choices)
            if text and not found.text:
                found.first = time.perf_counter() - began
            found.text += text
            found.finish = next((one["finish_reason"] for one in choices if one["finish_reason"]), found.finish)
            chunks += 1
            if leave and chunks >= CHUNKS:
                break
            if slow:
                await asyncio.sleep(SLOW_SECONDS)
        found.whole = time.perf_counter() - began
    except ConnectionError:  # what a client sees of a server that was killed
        pass
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

    def get(self, path: str, body: Any = None) -> Any:
        """The answer to a request: its JSON value, or its text."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read().decode()
            return json.loads(content) if "json" in answer.headers["content-type"] else content

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


def counts(streams: Sequence[Stream], expected: Sequence[str]) -> dict[str, int]:
    """What became of the streams."""
    done = [i for i, one in enumerate(streams) if one.done]
    return {
        "streams": len(streams), "finished": len(done), "left": sum(one.left and not one.done for one in streams),
        "refused_429": sum(one.status == 429 for one in streams),
        "other_refusals": sum(one.status not in (200, 429) for one in streams),
        "lost": sum(one.status == 200 and not one.done and not one.left for one in streams),
        "different": sum(streams[i].text != expected[i] for i in done),
    }  # fmt: skip


def measure(
    args: argparse.Namespace, bodies: Sequence[dict[str, Any]], expected: Sequence[str], length: int, *,
    queue: int, leave: float = 0.0, slow: float = 0.0, times_over: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The server under one load, which comes so many times."""
    made = Process(args.workdir, args.slots, length, [f"--config.serve.queue={queue}", "--config.serve.seconds=0"])
    loads: list[dict[str, Any]] = []
    try:
        asyncio.run(load_of(made.port, bodies[: args.slots], leave=0, slow=0, seed=0))  # warm
        for number in range(times_over):
            cpu, began = made.cpu(), time.perf_counter()
            streams = asyncio.run(load_of(made.port, bodies, leave=leave, slow=slow, seed=args.seed + number))
            seconds, cpu = time.perf_counter() - began, made.cpu() - cpu
            again = asyncio.run(
                load_of(made.port, bodies[: args.slots], leave=0, slow=0, seed=0)
            )  # nothing holds a slot
            found: dict[str, Any] = counts(streams, expected)
            loads.append({
                **found, "slots_free_afterwards": all(one.done for one in again),
                "tokens_per_second": round(found["finished"] * args.new_tokens / seconds, 1), "cpu_seconds": round(cpu, 2),
                "seconds": round(seconds, 2), "first_token_seconds": times(streams, "first"),
                "whole_seconds": times(streams, "whole"), "memory": made.memory(),
            })  # fmt: skip
    finally:
        status = made.end()
    return {**loads[-1], "memory_of_each_time": [one["memory"] for one in loads], "exit_status": status,
            "of_all_times": {name: sum(one[name] for one in loads) for name in counts([], [])}}  # fmt: skip


def killed(
    args: argparse.Namespace, bodies: Sequence[dict[str, Any]], expected: Sequence[str], length: int
) -> dict[str, Any]:
    """Streams whose server is killed, and the server that starts again."""
    more = [f"--config.serve.queue={len(bodies)}", "--config.serve.seconds=0"]
    made, rated = Process(args.workdir, args.slots, length, more), 0
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes " * 500, "rejected": "no"}

    async def talk() -> list[Stream]:
        nonlocal rated
        tasks = [asyncio.ensure_future(read(made.port, body, leave=False, slow=False)) for body in bodies]
        while sum(task.done() for task in tasks) < len(tasks) // 4:  # some are whole, some have begun, some wait
            await asyncio.to_thread(made.get, "/feedback", row)
            rated += 1
        made.process.kill()
        return await asyncio.gather(*tasks)

    streams = asyncio.run(talk())
    made.process.wait(60)
    kept = (args.workdir / "serve" / "preferences.jsonl").read_text().splitlines()
    again = Process(args.workdir, args.slots, length, more)
    try:
        ready = again.get("/ready")["status"] == "ready"
        streams_again = asyncio.run(load_of(again.port, bodies, leave=0, slow=0, seed=0))
        again.get("/feedback", row)
    finally:
        status = again.end()
    after = (args.workdir / "serve" / "preferences.jsonl").read_text().splitlines()
    whole = [i for i, one in enumerate(streams) if one.done or one.finish]
    return {
        "streams": len(streams), "whole": len(whole), "cut": len(streams) - len(whole),
        "cut_with_text": sum(bool(one.text) and not one.done for one in streams),
        "taken_for_whole": sum(streams[i].text != expected[i] for i in whole),
        "rated": rated, "kept_rows": sum(json.loads(one)["rejected"][0]["content"] == "no" for one in kept),
        "ready_again": ready, "rows_after": len(after), "again": counts(streams_again, expected), "exit_status": status,
    }  # fmt: skip


def engine_alone(args: argparse.Namespace, bodies: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str], int]:
    """The engine's own loop: its figures, the texts, and the tokens of a slot. Raises ValueError if they do not fit."""
    c = config.load(str(args.workdir / "config.json"))
    model = load(args.workdir)
    tokenizer = model.tokenizer
    ids = [[*tokenizer.prefix_ids, *tokenizer.encode(body["prompt"])] for body in bodies]
    length = max(map(len, ids)) + args.new_tokens
    if length > model.config.model.max_length:
        raise ValueError(
            f"prompts and texts have {length} tokens, and the model reads {model.config.model.max_length}: lower --new-tokens"
        )
    bias = {str(one): -100 for one in tokenizer.eos_ids}
    for body in bodies:
        body["logit_bias"] = bias
    # The settings that are left out are those of the bodies: the model's own distribution.
    requests = [
        {"ids": row, "max_new_tokens": args.new_tokens, "seed": body["seed"], "logit_bias": bias}
        for row, body in zip(ids, bodies, strict=True)
    ]
    engine = model.engine(length=length, likeliest=20, **{**engine_settings(c), "slots": args.slots})
    engine.warm_up()

    def run(some: Sequence[dict[str, Any]]) -> list[str]:
        numbers = [engine.submit(one) for one in some]
        done = dict(engine.run())
        return [done[number].text for number in numbers]

    began, cpu = time.perf_counter(), time.process_time()
    expected = run(requests)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    alone = sum(run([one])[0] == text for one, text in zip(requests[:ALONE], expected, strict=False)) / ALONE
    figures = {
        "tokens_per_second": round(args.new_tokens * len(requests) / seconds, 1), "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2), "same_alone": alone,
    }  # fmt: skip
    return figures, expected, length


def checks(found: dict[str, Any], slots: int) -> dict[str, bool]:
    """What must hold."""
    every = [found[name] for name in ("queued", "all", "default")]
    first, *_, last = found["queued"]["memory_of_each_time"]
    cut = found["killed"]
    return {
        "a text is the same alone and beside others": found["engine"]["same_alone"] == 1,
        "every finished text is the one that is written alone": not any(one["of_all_times"]["different"] for one in every),
        "none is lost": not any(one["of_all_times"]["lost"] + one["of_all_times"]["other_refusals"] for one in every),
        "nobody is refused with a queue for all": found["queued"]["of_all_times"]["refused_429"] == 0,
        "at the default queue some are refused and all others written": found["default"]["finished"] >= slots
        and found["default"]["finished"] + found["default"]["refused_429"] == found["default"]["streams"],
        "slots are free afterwards": all(one["slots_free_afterwards"] for one in every),
        "memory is flat": last <= first * (1 + GROWTH),
        "a cut text is not taken for a whole one": cut["taken_for_whole"] == 0 and cut["cut"] > 0,
        "rated answers are whole rows": cut["kept_rows"] in (cut["rated"], cut["rated"] + 1)
        and cut["rows_after"] == cut["kept_rows"] + 1,
        "a killed server starts again": cut["ready_again"] and cut["again"]["different"] + cut["again"]["lost"] == 0,
        "servers end by themselves": all(one["exit_status"] == 0 for one in [*every, cut]),
    }  # fmt: skip


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, help="the run to serve (default: a tiny model)")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each text")
    parser.add_argument("--leave", type=float, default=0.1, help="the share of clients that leave")
    parser.add_argument("--slow", type=float, default=0.05, help="the share of slow readers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bodies = [fields(i, args.new_tokens) for i in range(args.streams)]
    with served_run(args.workdir) as args.workdir:
        engine, expected, length = engine_alone(args, bodies)
        load_of_all = {"queue": args.streams, "leave": args.leave, "slow": args.slow}
        results: dict[str, Any] = {
            "engine": engine,
            "queued": measure(args, bodies, expected, length, **load_of_all, times_over=3),
            "all": measure(args, bodies, expected, length, queue=args.streams),
            "default": measure(args, bodies, expected, length, queue=0),
            "killed": killed(args, bodies[:KILLED], expected, length),
        }
    results["engine_share"] = round(engine["cpu_seconds"] / results["all"]["cpu_seconds"], 3)
    results["checks"] = checks(results, args.slots)
    print(json.dumps(results, indent=1))
    write(results, args.out)
    return 0 if all(results["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
