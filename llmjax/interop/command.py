"""The verbs `import` and `export`. Imports are late: help is quick."""

import argparse
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import human
from llmjax.verb import Verb


def _add_import(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR",
        help="a folder with config.json, safetensors and a tokenizer, or a .gguf file",
    )  # fmt: skip
    verb.add_argument("--to", type=Path, required=True, metavar="RUN", help="the run's folder, which must not exist")
    verb.add_argument(
        "--dtype", default="", choices=("float32", "bfloat16"),
        help="of the parameters (default: as stored; float32 for float16, quantized and mixed weights)",
    )  # fmt: skip
    verb.add_argument(
        "--tokenizer", default="", metavar="PATH",
        help="the tokenizer's folder or file if it is not beside the weights, or none",
    )  # fmt: skip


def _import(args: argparse.Namespace, _: ConfigDict) -> int:
    from llmjax.interop.read import import_model

    print(import_model(args.source, args.to, dtype=args.dtype, tokenizer=args.tokenizer))
    return 0


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="RUN", help="a run, or one of its checkpoint folders"
    )
    verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="the new folder, which must not exist")
    verb.add_argument(
        "--family", default="", metavar="TYPE",
        help="the model_type to write, such as llama (default: as imported, or the first that can say the config)",
    )  # fmt: skip
    verb.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="begin a new file after this much (default: 5GB)"
    )


def _export(args: argparse.Namespace, _: ConfigDict) -> int:
    size = human.parse_size(args.shard_size)
    from llmjax.interop.write import export_model

    print(export_model(args.source, args.to, model_type=args.family, shard_bytes=size))
    return 0


VERBS = {
    "import": Verb("make a run of a Hugging Face model or a GGUF file", _add_import, _import, config="none"),
    "export": Verb(
        "write a run's model as a folder that transformers loads with from_pretrained",
        _add_export,
        _export,
        config="none",
    ),
}
