"""Training steps on one accelerator against the best of PyTorch: GPT-2 124M and phi-1 1.3B in bfloat16, by turns.

    python benchmarks/gpu_training.py --torch-python torch/bin/python [--out results/gpu_training.json]
    python benchmarks/gpu_training.py --tiny                  two small shapes, on any machine, to see that it runs

Needs jax with its CUDA plugin here, and PyTorch with CUDA in --torch-python. Both processes share the GPU: each gets
half of its memory, and one steps only while the other waits. Both do what a training loop does to a batch: forward,
backward, clipping to a global norm of 1, AdamW; float32 master weights, bfloat16 products. PyTorch's side is written
here: `scaled_dot_product_attention`, autocast, fused AdamW, TF32 allowed, `torch.compile` in each of --torch-modes.
Ours is `make_train_step` on the configs in configs/models, with each attention kernel of --kernels. Each side's best
variant counts; all are reported. Both sides must have equally many parameters, and both must learn the same batches.

MFU counts the model's FLOPs (causal scores are counted half) against the published peak. `profile`: the share of a
step's time on the device by kind of kernel, from jax.profiler and torch.profiler over five steps.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from common import Worker, WorkerError, ask, end, make_parser, start_worker, write

CONFIGS = Path(__file__).parents[1] / "configs" / "models"
# config, rows, tokens of a row, vocabulary; layers, width and heads are the config's unless they stand here.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-124M": {"config": "gpt2.py:small", "rows": 32, "length": 1024, "vocab": 50_304},
    "phi-1": {"config": "phi.py:phi-1", "rows": 8, "length": 2048, "vocab": 51_200},
}
SMALL: dict[str, Any] = {"rows": 4, "length": 64, "vocab": 512, "layers": 2, "width": 64, "heads": 4}

# Kernels by what their names have in them, the first that fits; names differ between libraries and their versions.
KINDS = {
    "attention": ("fmha", "flash", "sdpa", "attention", "cudnn_generated"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "dot", "wgmma", "addmm", "aten::mm", "bmm"),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset", "copy", "transpose", "convert"),
    "elementwise, norms and loss": ("fusion", "triton", "elementwise", "reduce", "softmax", "norm", "aten::", "loop", "scatter", "gather"),
}  # fmt: skip

TORCH_WORKER = """
import json, sys, time
import numpy as np, torch, torch.nn.functional as F
from torch import nn
job = json.loads(sys.argv[1])
L, D, H, V, T, B = (job[name] for name in ("layers", "width", "heads", "vocab", "length", "rows"))
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_per_process_memory_fraction(0.48)
torch.set_float32_matmul_precision("high")
torch.manual_seed(0)
phi = job["parallel"]
turned = int(D // H * job["rotary"])

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), None if phi else nn.LayerNorm(D)
        self.qkv, self.out, self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
    def attend(self, x, cos, sin):
        q, k, v = (t.view(*x.shape[:2], H, -1).transpose(1, 2) for t in self.qkv(x).split(D, -1))
        if turned:
            q, k = (self.turn(t, cos, sin) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))
    def turn(self, t, cos, sin):
        a, b = t[..., :turned].chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos, t[..., turned:]), -1).to(t.dtype)
    def feed(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))
    def forward(self, x, cos, sin):
        h = self.norm1(x)
        if phi:
            return x + self.attend(h, cos, sin) + self.feed(h)
        x = x + self.attend(h, cos, sin)
        return x + self.feed(self.norm2(x))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        self.places = None if phi else nn.Embedding(T, D)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=phi)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / ((2 * L) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if not phi:
            self.head.weight = self.tokens.weight
        rates = 10000 ** (-torch.arange(0, turned, 2) / max(turned, 1))
        angles = torch.arange(T)[:, None] * rates[None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
    def forward(self, tokens, targets):
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places.weight
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, V).float(), targets.reshape(-1))

model = Model().to(device)
matrices, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=job["rate"],
                              betas=(0.9, 0.95), weight_decay=0.1, fused=True)
run = model if job["variant"] == "eager" else torch.compile(model, mode=job["variant"])
data = torch.from_numpy(np.random.default_rng(0).integers(0, V, (4, B, T + 1))).to(device)
def step(i):
    batch = data[i % 4]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = run(batch[:, :-1], batch[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
def wait(loss):
    return loss.item()
def facts():
    return {"parameters": sum(p.numel() for p in model.parameters()), "version": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None}
def profile():
    from torch.profiler import ProfilerActivity, profile as record
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with record(activities=kinds) as found:
        for i in range(5):
            loss = step(i)
        wait(loss)
    # Of the kernels alone: an operator's own entry repeats the time of those it started.
    on_gpu = device == "cuda"
    return {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 5e3 for e in found.key_averages()
            if not on_gpu or "CUDA" in str(e.device_type)}
"""

JAX_WORKER = """
import glob, json, sys, tempfile, time
job = json.loads(sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from llmjax import config
from llmjax.model import transformer
from llmjax.model.count import flops_per_token
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes, placement
from llmjax.train import hardware, optimizer as optimizers
from llmjax.train.step import batch_shardings, init_state, make_train_step
L, D, H, V, T, B = (job[name] for name in ("layers", "width", "heads", "vocab", "length", "rows"))
c = config.load(job["config"]).unlock()
for key, value in {"layers": L, "width": D, "heads": H, "vocab_size": V, "max_length": T, "dtype": "bfloat16", "dropout": 0.0,
                   "attention_dropout": 0.0, "attention": job["variant"], **job["settings"]}.items():
    c.model[key] = value
c.train.batch_size, c.train.sequence_length, c.train.micro_batches = B, T, 1
c.parallel.mesh, c.optimizer.beta2, c.optimizer.learning_rate = "data=-1", 0.95, job["rate"]
config.check(c)
mesh = meshes.make_mesh("data=-1")
module = transformer.build(c.model)
schedule = lambda step: jnp.float32(1)
optimizer = optimizers.make_optimizer(c.optimizer, schedule)
make_state, _ = init_state(module, optimizer, c, mesh)
state = make_state(jax.random.key(0))
data = np.random.default_rng(0).integers(0, V, (4, B, T + 1)).astype(np.int32)
def batch_of(i):
    tokens, targets = data[i][:, :-1], data[i][:, 1:]
    arrays = {"tokens": tokens, "targets": targets, "segments": np.ones_like(tokens),
              "positions": np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape),
              "weights": np.ones(tokens.shape, np.float32)}
    return {k: jax.make_array_from_process_local_data(batch_shardings(mesh), np.ascontiguousarray(v))
            for k, v in arrays.items()}
batches = [batch_of(i) for i in range(4)]
key = jax.device_put(jax.random.key(1), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
with placement.active(mesh, c):
    compiled = jax.jit(make_train_step(module, OBJECTIVES["causal"], optimizer, schedule, c), donate_argnums=0).lower(
        state, batches[0], key).compile()
def step(i):
    global state
    state, metrics = compiled(state, batches[i % 4], key)
    return metrics["loss"]
def wait(loss):
    return float(loss)
def facts():
    device, memory = jax.devices()[0], compiled.memory_analysis()
    peak, source = hardware.peak_flops(device, device_count=mesh.size)
    return {"parameters": sum(x.size for x in jax.tree.leaves(state.params)), "version": jax.__version__,
            "device": device.device_kind, "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
            "flops_per_token": flops_per_token(c.model, sequence_length=T), "peak_flops": peak, "peak_source": source}
def profile():
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(5):
                loss = step(i)
            wait(loss)
        file, = glob.glob(folder + "/plugins/profile/*/*.xplane.pb")
        found = jax.profiler.ProfileData.from_file(file)
        gpu = [plane for plane in found.planes if plane.name.startswith("/device:")]
        times = {}
        for plane in gpu or found.planes:
            for line in plane.lines:
                if line.name.startswith("Stream") if gpu else "XLA" in line.name:
                    for event in line.events:
                        times[event.name] = times.get(event.name, 0) + event.duration_ns / 5e6
        return times
"""

# The parent writes a number of seconds; the worker steps that long, waits for the last and answers.
ROUNDS = """
first = wait(step(0))
count = 1
print(json.dumps({"ready": True, "first_loss": first}), flush=True)
for line in sys.stdin:
    if line.strip() == "facts":
        print(json.dumps(facts()), flush=True)
        continue
    if line.strip() == "profile":
        print(json.dumps(profile()), flush=True)
        continue
    seconds, steps = float(line), 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or steps < 3:
        loss = step(count)
        count, steps = count + 1, steps + 1
        if steps % 4 == 0:
            wait(loss)  # not too far ahead of the device
    last = wait(loss)
    print(json.dumps({"ms": (time.perf_counter() - began) / steps * 1e3, "loss": last}), flush=True)
"""


def main() -> None:
    """Run the comparison and print its tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="an interpreter with PyTorch")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", help="values of model.attention; as they come: cudnn dot_product")
    parser.add_argument("--torch-modes", nargs="+", metavar="MODE",
                        help="of torch.compile, or eager; as they come: default max-autotune-no-cudagraphs")  # fmt: skip
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help='ours: {"remat": "selective"}')
    parser.add_argument("--rows", type=int, default=0, help="rows of a batch; 0: the shape's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one side's part of a round")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64; kernel dot_product; eager")
    args = parser.parse_args()
    if shutil.which(args.torch_python) is None:
        parser.error(f"--torch-python {args.torch_python} is no program")
    args.kernels = args.kernels or (["dot_product"] if args.tiny else ["cudnn", "dot_product"])
    args.torch_modes = args.torch_modes or (["eager"] if args.tiny else ["default", "max-autotune-no-cudagraphs"])
    if args.tiny:
        args.rounds, args.seconds = 2, 0.5
    results: dict[str, Any] = {}
    for name in args.shapes:
        results[name] = compare(name, args)
        write(results, args.out)  # after each shape: a time limit must not take what is measured


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Each side's variants on one shape, then the best of both by turns, and where their time goes."""
    job = shape(name, args)
    print(f"\n{name}: {job['layers']} layers, {job['width']} wide, {job['rows']} rows of {job['length']} tokens")
    tried: dict[str, dict[str, Any]] = {"llmjax": {}, "pytorch": {}}
    for side, variants in (("llmjax", args.kernels), ("pytorch", args.torch_modes)):
        for variant in variants:
            tried[side][variant] = alone(side, {**job, "variant": variant}, args)
            print(f"  {side} {variant}: " + said(tried[side][variant]), flush=True)
    best: dict[str, str] = {}
    for side, found in tried.items():
        ran = {variant: facts["ms"] for variant, facts in found.items() if "ms" in facts}
        if not ran:
            return {"shape": job, "tried": tried, "failed": f"no variant of {side} ran"}
        best[side] = min(ran, key=lambda variant: ran[variant])
    counts = {side: tried[side][best[side]]["parameters"] for side in best}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the two models are not the same: {counts} parameters")
    facts = tried["llmjax"][best["llmjax"]]
    tokens = job["rows"] * job["length"]
    workers = {side: start(side, {**job, "variant": best[side]}, args)[0] for side in best}
    medians: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(args.rounds):
        for side in sorted(workers, reverse=bool(number % 2)):
            medians[side].append(ask(workers[side], str(args.seconds))["ms"])
    result: dict[str, Any] = {
        "shape": job,
        "device": facts["device"],
        "parameters": facts["parameters"],
        "tried": tried,
    }
    for side, values in medians.items():
        per_second = tokens / statistics.median(values) * 1e3
        done = per_second * facts["flops_per_token"]
        times = ask(workers[side], "profile")
        result[side] = {
            "variant": best[side], "ms": values, "tokens_per_second": per_second, "tflops": done / 1e12,
            "mfu": done / facts["peak_flops"] if facts["peak_flops"] else None, "profile": shares(times), "longest": longest(times),
        }  # fmt: skip
        mfu = f", MFU {result[side]['mfu']:.1%}" if facts["peak_flops"] else ""
        print(f"  {side} ({best[side]}): {per_second:,.0f} tokens/s, {done / 1e12:,.2f} TFLOP/s{mfu}")
        print("    " + ", ".join(f"{kind} {share:.0%}" for kind, share in result[side]["profile"].items()))
        end(workers[side])
    pairs = zip(medians["pytorch"], medians["llmjax"], strict=True)
    result["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    print(f"  llmjax's speed is {result['ratio']:.2f}x PyTorch's")
    return result


def shape(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All that both sides need to know about a model and its batches."""
    from llmjax import config

    job = {**SHAPES[name], **(SMALL if args.tiny else {})}
    job["config"] = str(CONFIGS / job["config"])
    m = config.load(job["config"]).model
    job = {"layers": m.layers, "width": m.width, "heads": m.heads, **job, "rate": 1e-3 if args.tiny else 1e-4}
    job["parallel"] = m.block == "parallel"
    job["rotary"] = m.rotary_fraction if m.position == "rotary" else 0.0
    return {**job, "rows": args.rows or job["rows"], "settings": args.settings}


def alone(side: str, job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One variant's time of a step, its memory and its losses; a variant that fails says so and does not count."""
    try:
        worker, ready = start(side, job, args)
        ask(worker, "0")  # three steps, to warm up
        measured = ask(worker, str(args.seconds))
        found = {**measured, **ask(worker, "facts"), "first_loss": ready["first_loss"]}
        end(worker)
        return found
    except WorkerError as error:
        return {"failed": str(error)}


def said(found: dict[str, Any]) -> str:
    """A line about a variant."""
    if "failed" in found:
        return found["failed"]
    memory = f", {found['peak_gib']:.1f} GiB" if found["peak_gib"] else ""
    return f"{found['ms']:.1f} ms a step{memory}, loss {found['first_loss']:.2f} -> {found['loss']:.2f}"


def shares(times: dict[str, float]) -> dict[str, float]:
    """The share of all time by kind of kernel, the largest first."""
    kinds: dict[str, float] = {}
    for name, ms in times.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "other")
        kinds[kind] = kinds.get(kind, 0) + ms
    total = sum(kinds.values()) or 1
    return {kind: ms / total for kind, ms in sorted(kinds.items(), key=lambda pair: -pair[1])}


def longest(times: dict[str, float], count: int = 20) -> dict[str, float]:
    """The kernels that take the most, in ms of a step."""
    return {name[:120]: round(ms, 3) for name, ms in sorted(times.items(), key=lambda pair: -pair[1])[:count]}


def start(side: str, job: dict[str, Any], args: argparse.Namespace) -> tuple[Worker, dict[str, Any]]:
    """A side's worker, and its first loss."""
    code, python = (JAX_WORKER, sys.executable) if side == "llmjax" else (TORCH_WORKER, args.torch_python)
    return start_worker([python, "-c", code + ROUNDS, json.dumps(job)], {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.48"})


if __name__ == "__main__":
    main()
