"""Training steps of llmjax against nanoGPT on PyTorch, the same shapes, in turn, on this machine.

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch && torch/bin/pip install torch numpy
    python benchmarks/nanogpt.py --nanogpt nanoGPT --torch-python torch/bin/python [--out results/nanogpt.json]

Each side runs in its own process and steps only while the other waits, in rounds A B A B. The median of a round is
compared with the median of the other side's round beside it, so a drift of the machine's speed does not matter. Both
sides do what their own training loop does to a batch: forward, backward, clipping to a global norm of 1, AdamW,
float32. The breakdown times parts of llmjax's step by compiling them alone.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from common import ask, end, make_parser, start_worker, write

from llmjax.start import HUGE_PAGES

# layers, heads, width, context, rows; 65 characters. small is nanoGPT's documented CPU setting.
SHAPES = {"small": (4, 4, 128, 64, 12), "medium": (6, 6, 384, 256, 8)}
VOCAB = 65

TORCH_WORKER = """
import sys, time, json, io, contextlib
sys.path.insert(0, sys.argv[1])
layers, heads, width, context, rows, vocab = json.loads(sys.argv[2])
import torch, numpy as np
from model import GPT, GPTConfig
torch.set_num_threads(int(sys.argv[3]))
torch.manual_seed(0)
with contextlib.redirect_stdout(io.StringIO()):
    model = GPT(GPTConfig(block_size=context, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width,
                          dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
data = torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (16, rows, context + 1)))
def step(i):
    batch = data[i % 16]
    _, loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
"""

JAX_WORKER = """
import sys, time, json
layers, heads, width, context, rows, vocab = json.loads(sys.argv[2])
import jax, jax.numpy as jnp, numpy as np
from llmjax import config
from llmjax.model import transformer
from llmjax.model.count import flops_per_token
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes, placement
from llmjax.train import hardware, optimizer as optimizers
from llmjax.train.pretrain import work_bytes
from llmjax.train.step import batch_shardings, init_state, make_train_step
c = config.base()
for key, value in {"layers": layers, "heads": heads, "width": width, "activation": "gelu", "norm": "layer",
                   "position": "learned", "max_length": context, "vocab_size": vocab, "scan_unroll": layers}.items():
    c.model[key] = value
c.train.batch_size, c.train.sequence_length, c.optimizer.beta2 = rows, context, 0.99
config.check(c)
meshes.use_cpu_devices(0, batch_size=rows, work_bytes=work_bytes(c))
mesh = meshes.make_mesh("data=-1")
module = transformer.build(c.model)
schedule = lambda step: jnp.float32(1)
optimizer = optimizers.make_optimizer(c.optimizer, schedule)
make_state, _ = init_state(module, optimizer, c, mesh)
state = make_state(jax.random.key(0))
data = np.random.default_rng(0).integers(0, vocab, (16, rows, context + 1)).astype(np.int32)
def batch_of(i):
    tokens, targets = data[i % 16][:, :-1], data[i % 16][:, 1:]
    positions = np.broadcast_to(np.arange(context, dtype=np.int32), tokens.shape)
    arrays = {"tokens": tokens, "targets": targets, "positions": positions, "segments": np.ones_like(tokens),
              "weights": np.ones(tokens.shape, np.float32)}
    return {k: jax.make_array_from_process_local_data(batch_shardings(mesh), np.ascontiguousarray(v))
            for k, v in arrays.items()}
key = jax.device_put(jax.random.key(1), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
with placement.active(mesh, c):
    compiled = jax.jit(make_train_step(module, OBJECTIVES["causal"], optimizer, schedule, c), donate_argnums=0).lower(
        state, batch_of(0), key).compile()
def step(i):
    global state
    state, metrics = compiled(state, batch_of(i), key)
    return float(metrics["loss"])
def parts():
    objective = OBJECTIVES["causal"]
    loss = lambda p, b: objective(module, p, b, None, c.objective).objective
    with placement.active(mesh, c):
        forward, backward = jax.jit(loss), jax.jit(jax.grad(loss))
        update = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
        batch = batch_of(0)
        grads = jax.block_until_ready(backward(state.params, batch))
        def best(f):
            f()
            times = []
            for _ in range(10):
                t = time.perf_counter(); jax.block_until_ready(f()); times.append(time.perf_counter() - t)
            return sorted(times)[5] * 1e3
        result = {"forward_ms": best(lambda: forward(state.params, batch)),
                  "forward_and_backward_ms": best(lambda: backward(state.params, batch)),
                  "optimizer_ms": best(lambda: update(grads, state.opt_state, state.params))}
    peak = hardware.peak_flops(jax.devices()[0], device_count=mesh.size)[0]
    flops = flops_per_token(c.model, sequence_length=context) * rows * context
    return {**result, "peak_flops": peak, "matrix_products_at_peak_ms": flops / peak * 1e3, "devices": mesh.size}
"""

# The parent writes a number of seconds; the worker steps that long and answers with its times.
ROUNDS = """
step(0)
count = 1
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if line.strip() == "parts":
        print(json.dumps(parts()), flush=True)
        continue
    end, times = time.perf_counter() + float(line), []
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        loss = step(count)
        count += 1
        times.append((time.perf_counter() - began) * 1e3)
    print(json.dumps({"ms": times, "loss": loss}), flush=True)
"""


def main() -> None:
    """Run the comparison and print its tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="an interpreter with PyTorch")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one side's part of a round")
    args = parser.parse_args()
    if not (args.nanogpt / "model.py").is_file():
        parser.error(f"{args.nanogpt} has no model.py: it is not a checkout of nanoGPT")
    results = {}
    for name in SHAPES if args.shape == "all" else (args.shape,):
        results[name] = compare(name, args)
    write(results, args.out)


def compare(name: str, args: argparse.Namespace) -> dict:
    """Interleave the two sides on one shape; the rounds' medians, their ratios and the breakdown."""
    layers, heads, width, context, rows = SHAPES[name]
    shape = json.dumps([layers, heads, width, context, rows, VOCAB])
    given = [str(args.nanogpt), shape, str(len(os.sched_getaffinity(0)))]
    workers = {
        "nanogpt": start_worker([args.torch_python, "-c", TORCH_WORKER + ROUNDS, *given])[0],
        "llmjax": start_worker([sys.executable, "-c", JAX_WORKER + ROUNDS, *given], HUGE_PAGES)[0],
    }
    print(f"\n{name}: {layers} layers, {width} wide, {context} tokens, {rows} rows, float32")
    print(f"{'round':>5}  {'nanoGPT ms':>10}  {'llmjax ms':>10}  {'nanoGPT / llmjax':>16}")
    medians: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(-1, args.rounds):  # the first round warms up
        for side, worker in workers.items():
            median = statistics.median(ask(worker, str(args.seconds))["ms"])
            if number >= 0:
                medians[side].append(median)
        if number >= 0:
            a, b = medians["nanogpt"][-1], medians["llmjax"][-1]
            print(f"{number + 1:>5}  {a:>10.1f}  {b:>10.1f}  {a / b:>15.2f}x", flush=True)
    ratios = [a / b for a, b in zip(medians["nanogpt"], medians["llmjax"], strict=True)]
    parts = ask(workers["llmjax"], "parts")
    for worker in workers.values():
        end(worker)
    tokens = rows * context
    for side, values in medians.items():
        ms = statistics.median(values)
        print(f"{side}: median {ms:.1f} ms a step, {tokens / ms * 1e3:,.0f} tokens/s")
    print(f"llmjax's speed is {statistics.median(ratios):.2f}x nanoGPT's ({min(ratios):.2f} to {max(ratios):.2f})")
    print("  where llmjax's time goes: " + ", ".join(f"{k.removesuffix('_ms').replace('_', ' ')} {v:.1f} ms"
                                                     for k, v in parts.items() if k.endswith("_ms")))  # fmt: skip
    return {"shape": dict(zip(("layers", "heads", "width", "context", "rows"), SHAPES[name], strict=True)),
            "ms": medians, "ratios": ratios, "ratio": statistics.median(ratios), "breakdown": parts}  # fmt: skip


if __name__ == "__main__":
    main()
