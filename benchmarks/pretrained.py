"""Real pretrained models against transformers on the same files: logits, 200 greedy tokens, sentence similarities, a
chat.

    python benchmarks/pretrained.py --smollm2 FILE.gguf --gemma3 FILE.gguf --minilm DIR [--out results/pretrained.json]

Each model is imported and exported again, and both are compared with the original in transformers:
SmolLM2-135M-Instruct and Gemma 3 270M from GGUF files, all-MiniLM-L6-v2 from safetensors. SmolLM2 also chats, is
fine-tuned for 50 steps (`--steps`, on the Python files of the standard library's json package) and exported. Needs the
extra [hf], torch, transformers and accelerate. Takes about half an hour on 2 cores; models that are not given are left
out.
"""

import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from common import make_parser, write

import llmjax
from llmjax.data.chat import chat_ids
from llmjax.infer.language_model import LanguageModel
from llmjax.interop.read import import_model
from llmjax.interop.write import export_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Q: What is 17 + 25?\nA:",
    "In 1969, astronauts",
    "To make a good cup of coffee, first",
    "import numpy as np\n\n",
    "The mitochondria is",
    "Dear Sir or Madam,\n\n",
    "Water boils at",
    "Roses are red,",
    "The difference between a list and a tuple in Python is",
    "Le chat est assis sur",
    "SELECT name, age FROM",
    "The stock market fell today because",
    "Photosynthesis is the process by which",
    "Shakespeare wrote",
    '{"name": "Alice", "age":',
    "She opened the door and saw",
)
QUESTIONS = ("Who are you?", "Why is the sky blue?", "What is the capital of France, and what is it known for?")
SENTENCES = (
    "The cat sits outside.",
    "A man is playing guitar.",
    "The new movie is awesome!",
    "A feline rests in the garden.",
    "Someone strums a musical instrument, slowly and with feeling, on the old wooden porch behind the house.",
    "I loved the film.",
    "Interest rates were raised by a quarter of a percentage point.",
    "",
)
NEW_TOKENS = 200
VARIED_TEXTS = 1000


def compare_decoder(file: Path, folder: Path) -> dict[str, Any]:
    """Import a GGUF file and compare logits and greedy continuations, ours and those of what we export."""
    began = time.perf_counter()
    imported = import_model(file, folder / "run")
    seconds = time.perf_counter() - began
    model = llmjax.load(folder / "run")
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = [[*model.tokenizer.prefix_ids, *model.tokenizer.encode(prompt)] for prompt in PROMPTS]
    same_ids = [tokenizer(prompt)["input_ids"] == row for prompt, row in zip(PROMPTS, ids, strict=True)]
    varied = varied_texts()
    parsed = model.tokenizer.encode_batch(varied, specials="parse")
    same_varied = [
        tokenizer(t, add_special_tokens=False)["input_ids"] == row for t, row in zip(varied, parsed, strict=True)
    ]
    expected = []
    for prompt, row in zip(PROMPTS, ids, strict=True):
        began = time.perf_counter()
        expected.append(greedy(reference, row))
        print(
            f"{prompt!r}: {len(expected[-1])} tokens of transformers in {time.perf_counter() - began:.0f} s", flush=True
        )
    completions = model.generate(list(PROMPTS), temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    identical = [list(one.tokens) == row for one, row in zip(completions, expected, strict=True)]
    # Over the whole texts that were generated, so that long contexts are compared too.
    logits = [logit_difference(model, reference, [*a, *b]) for a, b in zip(ids, expected, strict=True)]
    export_model(folder / "run", folder / "export")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    exported = transformers.AutoTokenizer.from_pretrained(folder / "export")
    with torch.no_grad():
        row = torch.tensor([[*ids[0], *expected[0]]])
        export_difference = float((again(row).logits - reference(row).logits).abs().max())
    return {
        "model_type": imported.model_type,
        "parameters": imported.parameters,
        "import_seconds": round(seconds, 1),
        "prompts": len(PROMPTS),
        "new_tokens": NEW_TOKENS,
        "prompts_with_the_same_ids": sum(same_ids),
        "varied_texts": VARIED_TEXTS,
        "varied_texts_with_the_same_ids": sum(same_varied),
        "continuations_identical": sum(identical),
        "tokens_compared": sum(map(len, expected)),
        "largest_logit_difference": max(difference for difference, _, _ in logits),
        "largest_logit": max(largest for _, largest, _ in logits),
        "argmax_differs_at": sum(differs for _, _, differs in logits),
        "export_logit_difference": export_difference,
        "export_tokenizer_the_same": [exported(prompt)["input_ids"] for prompt in PROMPTS] == ids,
    }


def varied_texts() -> list[str]:
    """Random runs of characters of all kinds, code, and the special tokens of both models.

    Without digits after several white-space characters, fractions and superscripts: SmolLM2's own tokenizer cuts every
    numeral off before anything else, as ours does; the one that transformers makes of the GGUF file does not.
    """
    rng = np.random.default_rng(0)
    letters = [chr(i) for i in range(32, 127) for _ in range(4)] + [chr(i) for i in range(0xA0, 0x250)]
    letters += [
        *"\t\n\n\n\r   \u2581\ufeff",
        *"\u4e2d\u6587\u65e5\u672c\u8a9e\ud55c\uad6d\u0627\u0644\u0939\u093f",
        *"\U0001f600\U0001f469\u200d\u2764\ufe0f",
    ]
    letters = [letter for letter in letters if not letter.isnumeric() or letter.isdecimal()]
    words = [
        "<|im_start|>",
        "<|im_end|>",
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "  ",
        "\n\n",
        " the",
        "def f(x):\n    return x",
    ]
    texts = []
    for _ in range(VARIED_TEXTS):
        parts = [*rng.choice(letters, rng.integers(0, 60)), *rng.choice(words, rng.integers(0, 4))]
        texts.append(re.sub(r"(\s)\s+(?=\d)", r"\1", "".join(rng.permutation(parts)) if parts else ""))
    return texts


def greedy(reference: Any, ids: Sequence[int]) -> list[int]:
    """What transformers generates."""
    with torch.no_grad():
        row = reference.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return row[0, len(ids) :].tolist()


def logit_difference(model: LanguageModel, reference: Any, ids: Sequence[int]) -> tuple[float, float, int]:
    """The largest difference of logits over a text, the largest logit, and at how many places the argmax differs."""
    padded = np.zeros((1, 256), np.int32)  # one shape for all texts, so that one program is compiled
    padded[0, : len(ids)] = ids
    ours = np.asarray(model.logits(padded))[0, : len(ids)]
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0].numpy()
    differs = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()), differs


def chat(run: Path) -> list[dict[str, str]]:
    """What the model answers, greedily."""
    model = llmjax.load(run)
    prompts = [chat_ids(model.tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    answers = model.generate(prompts, temperature=0.0, top_p=1.0, max_new_tokens=160)
    return [{"question": q, "answer": a.text, "finish": a.finish} for q, a in zip(QUESTIONS, answers, strict=True)]


def finetune(folder: Path, *, steps: int) -> dict[str, Any]:
    """Train the imported run on with the command, export it, and load that in transformers."""
    tuned = folder / "tuned"
    sources = Path(json.__file__).parent
    settings = {
        "train.init_from": folder / "run",
        "tokenizer.path": folder / "run" / "tokenizer",
        "data.sources": f"[{str(sources)!r}]",
        "train.duration": f"'{steps} steps'",
        "train.batch_size": 2,
        "train.sequence_length": 128,
        "optimizer.learning_rate": 2e-5,
        "train.eval_every": "'50%'",
        "train.eval_batches": 2,
        "checkpoint.every": "'100%'",
        "data.holdout_percent": 20.0,
        "stages": "('prepare', 'tokenizer', 'train')",
    }
    given = (f"--config.{name}={value}" for name, value in settings.items())
    common.llmjax("run", "--config", folder / "run" / "config.json", "--workdir", tuned, *given)
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    export_model(tuned, folder / "tuned-export")
    model = llmjax.load(tuned)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned-export", dtype=torch.float32)
    difference, _, differs = logit_difference(model, again, model.tokenizer.encode(PROMPTS[2] * 8)[:64])
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "steps": steps,
        "mean_loss_of_the_first_10_steps": round(float(np.mean(losses[:10])), 4),
        "mean_loss_of_the_last_10_steps": round(float(np.mean(losses[-10:])), 4),
        "heldout_loss": [row["heldout_loss"] for row in rows if "heldout_loss" in row],
        "export_logit_difference": difference,
        "export_argmax_differs_at": differs,
        "export_class": type(again).__name__,
    }


def compare_encoder(source: Path, folder: Path) -> dict[str, Any]:
    """Import a sentence encoder; similarities of all pairs of sentences: mean over tokens, normalised, cosine."""
    import_model(source, folder / "run")
    model = llmjax.load(folder / "run")
    reference = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    theirs_inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    t = model.tokenizer
    rows = [[*t.prefix_ids, *ids, *t.suffix_ids] for ids in t.encode_batch(SENTENCES)]
    length = max(map(len, rows))
    tokens_BL = np.zeros((len(rows), length), np.int32)
    segments_BL = np.zeros_like(tokens_BL)
    for i, row in enumerate(rows):
        tokens_BL[i, : len(row)], segments_BL[i, : len(row)] = row, 1
    assert (tokens_BL == theirs_inputs["input_ids"].numpy()).all()
    hidden_BLD: Any = jax.jit(
        lambda params: model.module.apply({"params": params}, tokens_BL, segments_BL=segments_BL, output="hidden")
    )(model.params)
    with torch.no_grad():
        theirs_BLD = reference(**theirs_inputs).last_hidden_state.numpy()
    ours, theirs = similarities(hidden_BLD, segments_BL), similarities(jnp.asarray(theirs_BLD), segments_BL)
    return {
        "sentences": len(SENTENCES),
        "largest_similarity_difference": float(np.abs(ours - theirs).max()),
        "largest_hidden_difference": float(np.abs((np.asarray(hidden_BLD) - theirs_BLD)[segments_BL > 0]).max()),
        "similarities": [
            [SENTENCES[i], SENTENCES[j], round(float(ours[i, j]), 4)] for i, j in ((0, 3), (1, 4), (2, 5), (0, 6))
        ],
    }


def similarities(hidden_BLD: jax.Array, segments_BL: np.ndarray) -> np.ndarray:
    """Cosines of the mean hidden states of all pairs of rows, (B, B)."""
    weights_BL1 = segments_BL[..., None].astype(np.float32)
    mean_BD = np.asarray((hidden_BLD * weights_BL1).sum(1) / weights_BL1.sum(1))
    unit_BD = mean_BD / np.linalg.norm(mean_BD, axis=1, keepdims=True)
    return unit_BD @ unit_BD.T


def main() -> None:
    parser = make_parser(__doc__, out=Path("results/pretrained.json"))
    parser.add_argument("--smollm2", type=Path, metavar="FILE.gguf")
    parser.add_argument("--gemma3", type=Path, metavar="FILE.gguf")
    parser.add_argument("--minilm", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}

    def keep(name: str, found: Any) -> None:
        results[name] = found
        write(results, args.out)
        print(json.dumps({name: found}, indent=1, ensure_ascii=False), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if args.minilm:
            keep("minilm", compare_encoder(args.minilm, Path(folder) / "minilm"))
        if args.smollm2:
            keep("smollm2", compare_decoder(args.smollm2, Path(folder) / "smollm2"))
            keep("smollm2_chat", chat(Path(folder) / "smollm2" / "run"))
            if args.steps:
                keep("smollm2_finetuned", finetune(Path(folder) / "smollm2", steps=args.steps))
        if args.gemma3:
            keep("gemma3", compare_decoder(args.gemma3, Path(folder) / "gemma3"))


if __name__ == "__main__":
    main()
