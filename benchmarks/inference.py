"""The engine against transformers' generate() on the same weights: GPT-2's shape, random, float32, greedy, on this
machine's CPU.

    python benchmarks/inference.py                     124M parameters; about 25 minutes on 2 idle cores
    python benchmarks/inference.py --tiny              a model of 0.2M parameters, to see that it runs

Prompts are of unequal length. `generate()` gets them as one batch, padded on the left with its attention mask, and
runs every row to the last token (no row ends earlier: neither side has an end of text). The arms take turns, round by
round, each in a process of its own that idles meanwhile, so that a busy machine slows both; ratios are of the medians.
"continuous": requests arrive while others are written, `--requests` of them, and up to 8 are written at a time; for
generate(), which cannot take them in, requests wait for the batch before them. Requests always wait, and texts have 32
to 128 tokens, so the case measures whether the engine fills a free slot. Tokens must be identical up to the first
place where the two likeliest logits of the model are closer than float32 rounding (1e-4 of their spread); such places
are counted. No result has peer figures of another machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ask, end, make_parser, start_worker, write

NEW = 128
SIZES = {"full": (12, 768, 12, 50304, 512), "tiny": (2, 64, 4, 512, 256)}  # layers, width, heads, vocabulary, positions


def prompts(count: int, vocab: int, longest: int) -> list[list[int]]:
    """Rows of unequal lengths."""
    rng = np.random.default_rng(count)
    return [rng.integers(0, vocab, int(n)).tolist() for n in rng.integers(longest // 4, longest + 1, count)]


def lengths(count: int, new: int) -> list[int]:
    """How many tokens each of the continuous requests wants."""
    return np.random.default_rng(7).integers(max(new // 4, 1), new + 1, count).tolist()


# ---------------------------------------------------------------------- the two arms, each in a process of its own


def peer(folder: Path) -> Any:
    """A function (rows, tokens for each) -> answers, by transformers."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_grad_enabled(False)
    model = GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=torch.float32).eval()

    def batch(rows: Sequence[Sequence[int]], new: Sequence[int]) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=max(new), min_new_tokens=max(new), do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        return [row[longest : longest + n].tolist() for row, n in zip(made, new, strict=True)]

    def run(rows: Sequence[Sequence[int]], new: Sequence[int], at_a_time: int) -> list[list[int]]:
        found = []
        for start in range(0, len(rows), at_a_time):
            found += batch(rows[start : start + at_a_time], new[start : start + at_a_time])
        return found

    return run


def ours(folder: Path) -> Any:
    """The same by the engine; one engine for each number of slots."""
    import jax

    from llmjax.data.hf_tokenizer import no_tokenizer
    from llmjax.infer.engine import Engine
    from llmjax.infer.request import Request

    module, params = _network(json.loads((folder / "shape.json").read_text()))
    loaded = np.load(folder / "weights.npz")
    leaves = [loaded[str(i)] for i in range(len(jax.tree.leaves(params)))]
    params = jax.tree.map(jax.numpy.asarray, jax.tree.unflatten(jax.tree.structure(params), leaves))
    engines: dict[int, Any] = {}

    def run(rows: Sequence[Sequence[int]], new: Sequence[int], at_a_time: int) -> list[list[int]]:
        if at_a_time not in engines:
            length = max(map(len, rows)) + max(new)
            tokenizer = no_tokenizer(module.c.vocab_size)
            engines[at_a_time] = Engine(module, params, tokenizer, slots=at_a_time, length=length)
            engines[at_a_time].warm_up()
        engine = engines[at_a_time]
        numbers = [engine.submit(Request(tuple(row), n, temperature=0.0)) for row, n in zip(rows, new, strict=True)]
        done = dict(engine.run())
        return [list(done[number].tokens) for number in numbers]

    return run


def _network(shape: Sequence[int]) -> tuple[Any, Any]:
    """The module, and parameters that are only shapes."""
    from llmjax import config
    from llmjax.model import transformer

    layers, width, heads, vocab, positions = shape
    c = config.base().model
    c.update({"layers": layers, "width": width, "heads": heads, "mlp_width": 4 * width, "vocab_size": vocab})
    c.update({"max_length": positions, "position": "learned", "norm": "layer", "activation": "gelu_tanh"})
    c.update({"bias": ("qkv", "out", "mlp", "norm"), "tie_embeddings": True, "kv_heads": heads, "norm_epsilon": 1e-5})
    module = transformer.build(c)
    return module, transformer.param_shapes(module)


def make_weights(folder: Path, shape: Sequence[int]) -> None:
    """Random weights for both: GPT-2's in transformers' layout, and ours, from the same numbers."""
    import jax
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, vocab, positions = shape
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=None,
        eos_token_id=None, initializer_range=0.06,
    )  # fmt: skip
    model = GPT2LMHeadModel(settings).float()
    with torch.no_grad():  # norms and biases too, which start at one and zero
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(folder / "hf")
    found = {name: value.detach().numpy() for name, value in model.transformer.state_dict().items()}

    def stack(name: str, *size: int) -> np.ndarray:
        return np.stack([found[f"h.{i}.{name}"].reshape(*size) for i in range(layers)])

    K = width // heads
    query, key, value = np.split(stack("attn.c_attn.weight", width, 3, heads, K), 3, axis=2)
    biases = np.split(stack("attn.c_attn.bias", 3, heads, K), 3, axis=1)
    attention = {
        name: {"kernel": kernel[:, :, 0], "bias": bias[:, 0]}
        for name, kernel, bias in zip(("query", "key", "value"), (query, key, value), biases, strict=True)
    }
    attention["out"] = {
        "kernel": stack("attn.c_proj.weight", heads, K, width),
        "bias": stack("attn.c_proj.bias", width),
    }

    def pair(name: str, *size: int) -> dict[str, np.ndarray]:
        return {"kernel": stack(f"{name}.weight", *size), "bias": stack(f"{name}.bias", size[-1])}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stack(f"{name}.weight", width), "bias": stack(f"{name}.bias", width)}

    params = {
        "embedding": found["wte.weight"],
        "position_embedding": found["wpe.weight"],
        "final_norm": {"scale": found["ln_f.weight"], "bias": found["ln_f.bias"]},
        "layers": {
            "attention": attention,
            "attention_norm": norm("ln_1"),
            "mlp": {"up": pair("mlp.c_fc", width, 4 * width), "down": pair("mlp.c_proj", 4 * width, width)},
            "mlp_norm": norm("ln_2"),
        },
    }
    _, shapes = _network(shape)
    jax.tree.map(lambda a, b: None if a.shape == b.shape else sys.exit(f"{a.shape} is not {b.shape}"), params, shapes)
    np.savez(folder / "weights.npz", **{str(i): leaf for i, leaf in enumerate(jax.tree.leaves(params))})
    (folder / "shape.json").write_text(json.dumps(list(shape)))


def serve(arm: str, folder: Path) -> None:
    """Answer jobs from standard input, one JSON line each: seconds and tokens."""
    run = {"ours": ours, "peer": peer}[arm](folder)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        answers = run(job["rows"], job["new"], job["at_a_time"])
        print(json.dumps({"seconds": time.perf_counter() - began, "answers": answers}), flush=True)


# ---------------------------------------------------------------------- what is compared


def compare(rows: list[list[int]], a: list[list[int]], b: list[list[int]], folder: Path) -> dict[str, int]:
    """Rows that are the same to the end, and those that part where two logits are too close to tell."""
    counts = {"rows": len(rows), "identical": 0, "ties": 0, "different": 0}
    for prompt, x, y in zip(rows, a, b, strict=True):
        place = next((i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q), None)
        if place is None:
            counts["identical"] += 1
        else:
            counts["ties" if _tie([*prompt, *x[:place]], x[place], y[place], folder) else "different"] += 1
    return counts


def _tie(ids: list[int], first: int, second: int, folder: Path) -> bool:
    import torch
    from transformers import GPT2LMHeadModel

    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(folder / "hf").double().eval()(torch.tensor([ids])).logits[0, -1]
    return bool(abs(logits[first] - logits[second]) < 1e-4 * logits.std())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=NEW, help="tokens written for each prompt")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="of the continuous case")
    parser.add_argument("--serve", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folder)
        return
    shape = SIZES["tiny" if args.tiny else "full"]
    vocab, longest = shape[3], min(128, shape[4] - args.new)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(folder, shape)
        arms = {
            arm: start_worker([sys.executable, __file__, "--serve", arm, "--folder", str(folder)])[0]
            for arm in ("ours", "peer")
        }
        cases: dict[str, dict[str, Any]] = {
            f"batch {n}": {"rows": prompts(n, vocab, longest), "new": [args.new] * n, "at_a_time": n}
            for n in args.batches
        }
        cases["continuous, 8 at a time"] = {
            "rows": prompts(args.requests, vocab, longest), "new": lengths(args.requests, args.new), "at_a_time": 8,
        }  # fmt: skip
        results: dict[str, Any] = {"shape": list(shape), "cases": {}}
        for case, job in cases.items():
            warm = {**job, "new": [min(2, n) for n in job["new"]]}
            seconds: dict[str, list[float]] = {arm: [] for arm in arms}
            answers: dict[str, Any] = {}
            ask(arms["ours"], json.dumps(job))  # compiles for these lengths
            ask(arms["peer"], json.dumps(warm))
            for turn in range(args.rounds):
                for arm in sorted(arms, reverse=bool(turn % 2)):
                    made = ask(arms[arm], json.dumps(job))
                    seconds[arm].append(made["seconds"])
                    answers[arm] = made["answers"]
            tokens = sum(job["new"])
            speed = {arm: tokens / statistics.median(times) for arm, times in seconds.items()}
            same = compare(job["rows"], answers["ours"], answers["peer"], folder)
            results["cases"][case] = {
                "tokens": tokens, "seconds": seconds, "tokens_per_second": speed, "ratio": speed["ours"] / speed["peer"], **same,
            }  # fmt: skip
            print(
                f"{case}: {speed['ours']:,.1f} tokens/s, generate() {speed['peer']:,.1f}: {speed['ours'] / speed['peer']:.2f}x; "
                f"{same['identical']} of {same['rows']} rows identical, {same['ties']} part at ties, {same['different']} differ",
                flush=True,
            )
        for one in arms.values():
            end(one)
    write(results, args.out)


if __name__ == "__main__":
    main()
