"""GGUF files of ours in llama.cpp, its own quantized files here, and its server beside ours.

    pip install xllamacpp                       llama.cpp with its server, prebuilt for CPUs
    npm pack @node-llama-cpp/linux-x64          libllama.so, which has llama.cpp's quantizer
    python benchmarks/llama_cpp.py --workdir runs/smollm2 --quantizer libllama.so [--out results/llama_cpp.json]
    python benchmarks/llama_cpp.py --workdir runs/smollm2 --only speed [--out results/llama_cpp.json]

"exported": the run is exported as f16, q8_0 and q4_0. llama.cpp and llmjax read each file, and both continue 8 prompts by
40 tokens, greedily. Ids of the prompts, of odd texts and of a rendered chat must be the same. "parted" lists the texts that
differ: at which token, and by how many nats each side prefers its own token there. llama.cpp rounds activations to f16 or to 8
bits before it multiplies them with such matrices. "in_float32" therefore repeats the comparison with a file that has the same
numbers in float32, where no side rounds: texts must be equal there, but for ties below 0.001 nats.

"quantized": llama.cpp's quantizer makes other files of the f16 file. llmjax imports them, with the same comparisons.
"bytes_as_ours" counts the matrices in f16, q8_0 or q4_0 that have the bytes that our export writes of the same numbers.

"speed": both servers write the same greedy texts, by turns: one request at a time, and all slots at once. Measure it on a
machine that does nothing else. "tokens_per_second" are the least, the median and the most of the requests alone, or of the turns.

Needs the extra [hf]. --python names another interpreter that has xllamacpp. Hardware: any; 5 minutes of a core for
SmolLM2-135M. Results that are not measured in a call stay in --out.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import serving
from common import command, cpu_seconds, make_parser, write

import llmjax
from llmjax.data.chat import chat_ids
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import Completion
from llmjax.interop.gguf_write import FILE_TYPES, export_gguf
from llmjax.interop.read import import_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "In 1969, astronauts",
    "To make a good cup of coffee, first",
    "Le chat est assis sur",
    '{"name": "Alice", "age":',
)
CHAT = (
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Rayleigh."},
    {"role": "user", "content": "Go on\n"},
)
NEW_TOKENS = 40
ODD_TEXTS = 300
TIE = 1e-3  # nats
LIKELIEST = 20
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "BF16")

SERVER = """
import os, sys, xllamacpp as x
file, slots, length, threads, exact = sys.argv[1], *map(int, sys.argv[2:])
p = x.CommonParams()
p.model.path, p.n_parallel, p.n_ctx, p.fit_params = file, slots, slots * length, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
if exact:
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
print("listening", server.listening_address, flush=True)
os.dup2(2, 1)  # nobody reads what is said later
sys.stdin.read()
"""


@contextlib.contextmanager
def llama_cpp(python: str, file: Path, *, slots: int = 1, length: int = 512, exact: bool = True) -> Iterator[int]:
    """The port of llama.cpp's server of a file, on 127.0.0.1.

    `exact`: with keys and values in float32, and one thread, because several wait long for each other on a busy machine.
    """
    numbers = map(str, (slots, length, 1 if exact else os.cpu_count(), int(exact)))
    command_line = [python, "-c", SERVER, str(file), *numbers]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("listening ")), "")
            if not line:
                said.seek(0)
                raise SystemExit(f"llama.cpp did not read {file}: {said.read()[-2000:].decode(errors='replace')}")
            yield int(line.rpartition(":")[2])
        finally:
            process.kill()
            process.wait(60)


def post(port: int, path: str, body: Any) -> Any:
    """The server's answer to a request."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


# ------------------------------------------------------------------ texts


def odd_texts() -> list[str]:
    """Random runs of characters of many scripts, spaces, digits, code and special tokens."""
    draw = random.Random(0)
    ranges = (range(32, 127), range(0xA0, 0x180), range(0x3A9, 0x3B2), range(0x430, 0x440), range(0x627, 0x630))
    ranges += (range(0x660, 0x664), range(0x939, 0x940), range(0xD55C, 0xD560))
    letters = [chr(i) for i in (9, 10, 13, 32, 0x200D, 0x2167, 0x2581, 0x4E2D, 0x6587, 0x1F600)]
    letters += [chr(i) for some in ranges for i in some]
    words = ["<|im_start|>", "<|im_end|>", "<bos>", "<eos>", "  ", "\n\n", " the", "don't", "I'LL", "12345", "    x"]
    texts = []
    for _ in range(ODD_TEXTS):
        parts = [*draw.choices(letters, k=draw.randrange(40)), *draw.choices(words, k=draw.randrange(5))]
        draw.shuffle(parts)
        texts.append("".join(parts))
    return texts


def ids_differ(port: int, model: LanguageModel) -> dict[str, Any]:
    """Texts whose ids are not the same; their number, and the first."""
    tokenizer, texts = model.tokenizer, odd_texts()

    def theirs(text: str, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": not special}
        return post(port, "/tokenize", body)["tokens"]

    prompts = [text for text in PROMPTS if theirs(text, True) != [*tokenizer.prefix_ids, *tokenizer.encode(text)]]
    odd = [
        text for text, ids in zip(texts, tokenizer.encode_batch(texts, specials="parse"), strict=True)
        if theirs(text, False) != list(ids)
    ]  # fmt: skip
    found: dict[str, Any] = {"prompts": len(prompts), "odd_texts": len(odd), "of_odd_texts": len(texts)}
    if model.tokenizer.chat_template:
        rendered = post(port, "/apply-template", {"messages": CHAT})["prompt"]
        found["chats"] = int(theirs(rendered, False) != list(chat_ids(tokenizer, list(CHAT))))
    return found | ({"first": (prompts + odd)[0]} if prompts + odd else {})


def continued(model: LanguageModel) -> list[Completion]:
    """Our greedy continuations, with the likeliest tokens of each place."""
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}
    return model.generate(list(PROMPTS), **settings, engine={"likeliest": LIKELIEST})


def compare(port: int, model: LanguageModel, ours: Sequence[Completion]) -> dict[str, Any]:
    """llama.cpp's greedy continuations of the same ids beside ours."""
    parted, differences, compared = [], [0.0], 0
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = [*model.tokenizer.prefix_ids, *model.tokenizer.encode(prompt)]
        body = {"prompt": ids, "n_predict": NEW_TOKENS, "temperature": 0.0, "n_probs": LIKELIEST, "return_tokens": True}
        steps = post(port, "/completion", body)["completion_probabilities"]
        for i, (token, step) in enumerate(zip(completion.tokens, steps, strict=False)):
            if token == step["id"]:
                differences.append(abs(completion.log_probabilities[i] - step["logprob"]))
                continue
            nats = dict(completion.likeliest[i])
            their_nats = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
            parted.append({
                "prompt": prompt, "token": i, "our_gap": nats[token] - nats.get(step["id"], -np.inf),
                "their_gap": step["logprob"] - their_nats.get(token, -np.inf),
            })  # fmt: skip
            break
        else:
            whole = len(completion.tokens)
            if len(steps) not in (whole, whole - (completion.finish == "eos")):  # llama.cpp may leave out <eos>
                parted.append({"prompt": prompt, "token": min(len(steps), whole), "ends": True})
        compared += len(steps)
    return {
        "texts": len(ours), "identical": len(ours) - len(parted), "tokens": compared, "parted": parted,
        "largest_difference_in_nats": max(differences),
        "equal_but_for_ties": all(one.get("our_gap", np.inf) < TIE for one in parted),
    }  # fmt: skip


def in_float32(file: Path, twin: Path) -> None:
    """Write a GGUF file again with every tensor in float32."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(twin, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, array.reshape([int(size) for size in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_by_both(python: str, file: Path, folder: Path) -> dict[str, Any]:
    """The comparisons of one file, as it is and in float32."""
    began = cpu_seconds()
    import_model(file, folder / "run")
    model = llmjax.load(folder / "run")
    ours = continued(model)
    with llama_cpp(python, file) as port:
        found = {"bytes": file.stat().st_size, "ids_differ": ids_differ(port, model), **compare(port, model, ours)}
    in_float32(file, folder / "twin.gguf")
    with llama_cpp(python, folder / "twin.gguf") as port:
        found["in_float32"] = compare(port, model, ours)
    (folder / "twin.gguf").unlink()
    return {**found, "cpu_seconds": round(cpu_seconds() - began, 1)}


# ------------------------------------------------------------------ llama.cpp's quantizer


class Parameters(ctypes.Structure):
    """llama_model_quantize_params: its first fields, and room for those that follow."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int), ("rest", ctypes.c_uint8 * 4096))


def quantize(library: Path, file: Path, to: Path, kind: str) -> None:
    """Write `file` with llama.cpp's quantizer. Raises RuntimeError if it does not."""
    llama = ctypes.CDLL(str(library.resolve()))
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters))
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    settings = llama.llama_model_quantize_default_params()
    settings.file_type = getattr(gguf.LlamaFileType, f"MOSTLY_{kind}").value
    settings.threads = os.cpu_count() or 1
    if llama.llama_model_quantize(str(file).encode(), str(to).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp did not quantize {file} to {kind}")


def same_bytes(file: Path, exact: Path) -> dict[str, int]:
    """How many matrices of llama.cpp's file have the bytes that our export makes of the same numbers, by their types."""
    numbers = {tensor.name: tensor.data for tensor in gguf.GGUFReader(exact).tensors}
    found = {"matrices": 0, "same": 0}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name.lower() in FILE_TYPES:
            ours = gguf.quants.quantize(numbers[tensor.name].astype(np.float32), tensor.tensor_type)
            found["matrices"] += 1
            found["same"] += np.array_equal(tensor.data, ours)
    return found


# ------------------------------------------------------------------ speed


def speed(args: argparse.Namespace, file: Path, run: Path) -> dict[str, Any]:
    """Time to the first token and tokens a second of both servers, by turns."""
    model = llmjax.load(run)
    draw, tokenizer = random.Random(0), model.tokenizer
    words = " ".join(PROMPTS).split()
    bodies = []
    for _ in range(args.streams):
        prompt = " ".join(draw.choices(words, k=args.words))
        bias = {str(one): -100 for one in tokenizer.eos_ids}
        bodies.append({"prompt": prompt, "max_tokens": args.new_tokens, "temperature": 0.0, "logit_bias": bias})
    longest = max(len(tokenizer.encode(body["prompt"])) for body in bodies) + args.new_tokens + 8
    seen: dict[str, dict[str, list[Any]]] = {
        name: {"alone": [], "streams": [], "rates": []} for name in ("llmjax", "llama.cpp")
    }

    def load(port: int, some: Sequence[dict[str, Any]]) -> list[serving.Stream]:
        return asyncio.run(serving.load_of(port, some, leave=0.0, slow=0.0, seed=0))

    with llama_cpp(args.python, file, slots=args.slots, length=longest, exact=False) as port:
        ours = serving.Process(run, args.slots, longest, ["--config.serve.seconds=0", "--config.serve.queue=1000"])
        try:
            ports = [("llmjax", ours.port), ("llama.cpp", port)]
            for _, one in ports:
                load(one, bodies[: args.slots])  # warm
            for turn in range(args.turns):
                for name, one in ports[:: -1 if turn % 2 else 1]:
                    # A number in front keeps caches of prompts from answering.
                    for body in bodies[: args.slots]:
                        seen[name]["alone"] += load(one, [{**body, "prompt": f"{turn} {body['prompt']}"}])
                    began = time.perf_counter()
                    numbered = [{**body, "prompt": f"{turn}: {body['prompt']}"} for body in bodies]
                    seen[name]["streams"] += load(one, numbered)
                    seen[name]["rates"].append(args.new_tokens * len(bodies) / (time.perf_counter() - began))
        finally:
            ours.end()
    figures: dict[str, Any] = {}
    for name, found in seen.items():
        rates = {
            "alone": [args.new_tokens / one.whole for one in found["alone"] if one.done],
            "streams": found["rates"],
        }
        figures[name] = {
            kind: {
                "first_token_seconds": serving.times(found[kind], "first"),
                "tokens_per_second": [round(float(rate), 1) for rate in np.percentile(rates[kind], (0, 50, 100))],
                "unfinished": sum(not one.done for one in found[kind]),
            }
            for kind in rates
        }
    settings = {name: getattr(args, name) for name in ("slots", "streams", "turns", "words", "new_tokens")}
    return {**settings, **figures}


def main() -> int:
    parser = make_parser(__doc__, out=Path("results/llama_cpp.json"))
    parser.add_argument("--workdir", type=Path, required=True, help="the run to export")
    parser.add_argument("--quantizer", type=Path, metavar="LIBLLAMA.so", help="the library with llama.cpp's quantizer")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=QUANTIZED,
        choices=QUANTIZED,
        metavar="TYPE",
        help="of llama.cpp's quantizer (default: %(default)s)",
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter with xllamacpp (default: this one)")
    parser.add_argument(
        "--only", choices=("exported", "quantized", "speed"), help="measure this alone (default: all but speed)"
    )
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--streams", type=int, default=32, help="requests at once on the slots")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=64, help="of a prompt of --only speed")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    if args.only == "quantized" and not args.quantizer:
        parser.error("--only quantized needs --quantizer LIBLLAMA.so")
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    name = args.workdir.resolve().name
    row = results.setdefault("models", {}).setdefault(name, {})
    row["package"] = subprocess.run(
        [args.python, "-c", "from importlib.metadata import version; print('xllamacpp', version('xllamacpp'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def keep(part: str, kind: str, found: dict[str, Any]) -> None:
            row.setdefault(part, {})[kind] = found
            row.setdefault("commands", {})[part] = command()
            print(json.dumps({kind: found}, indent=1, ensure_ascii=False), flush=True)
            write({key: value for key, value in results.items() if key not in ("command", "machine")}, args.out)

        files = {kind: folder / f"{kind}.gguf" for kind in FILE_TYPES}
        for kind in FILE_TYPES if args.only != "speed" else ("f16",):
            export_gguf(args.workdir, files[kind], type_name=kind)
            if args.only in (None, "exported"):
                keep("exported", kind, read_by_both(args.python, files[kind], folder / kind))
        if args.quantizer and args.only in (None, "quantized"):
            for kind in args.kinds:
                file = folder / f"theirs-{kind}.gguf"
                quantize(args.quantizer, files["f16"], file, kind)
                found = read_by_both(args.python, file, folder / file.stem)
                found["bytes_as_ours"] = same_bytes(file, files["f16"])
                keep("quantized", kind, found)
                file.unlink()
        if args.only == "speed":
            import_model(files["f16"], folder / "run")
            keep("speed", "f16", speed(args, files["f16"], folder / "run"))
    parts = [one for part in ("exported", "quantized") for one in row.get(part, {}).values()]
    return 0 if all(one["in_float32"]["equal_but_for_ties"] for one in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
