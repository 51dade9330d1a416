"""The verbs `import` and `export`. Imports are late: help is quick."""

import argparse
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import human
from llmjax.config.ranges import AT_LEAST_1, number
from llmjax.errors import UserError
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
    verb.add_argument(
        "--max-length", type=number(int, AT_LEAST_1), default=0, metavar="N",
        help="of models with longrope positions (Phi 3 and 4): the most tokens to read, which chooses their factors",
    )  # fmt: skip
    verb.add_argument(
        "--base",
        type=Path,
        metavar="RUN",
        help="the run with the base of adapters in PEFT's format, which --from then has",
    )


def _import(args: argparse.Namespace, _: ConfigDict) -> int:
    from llmjax.interop.peft import import_peft, is_peft
    from llmjax.interop.read import import_model

    if is_peft(args.source) != (args.base is not None):
        raise UserError(
            f"{args.source} has adapters in PEFT's format: give --base RUN, the run with the model that they are of"
            if args.base is None
            else f"{args.source} has no adapter_config.json, so it needs no --base"
        )
    if args.base is not None:
        print(import_peft(args.source, args.to, args.base))
        return 0
    settings = {"dtype": args.dtype, "tokenizer": args.tokenizer, "max_length": args.max_length}
    print(import_model(args.source, args.to, **settings))
    return 0


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="RUN", help="a run, or one of its checkpoint folders"
    )
    verb.add_argument(
        "--to", type=Path, required=True, metavar="DIR",
        help="the new folder, or .gguf file for llama.cpp, which must not exist",
    )  # fmt: skip
    verb.add_argument(
        "--type", default="", choices=("f16", "q8_0", "q4_0"), help="of the matrices of a .gguf file (default: f16)"
    )
    verb.add_argument(
        "--family", default="", metavar="TYPE",
        help="the model_type to write, such as llama (default: as imported, or the first that can say the config)",
    )  # fmt: skip
    verb.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="begin a new file after this much (default: 5GB)"
    )
    verb.add_argument(
        "--peft", action="store_true", help="write a run's adapters alone, in PEFT's format (default: merge them)"
    )


def _export(args: argparse.Namespace, _: ConfigDict) -> int:
    size = human.parse_size(args.shard_size)
    from llmjax.interop.gguf_write import export_gguf
    from llmjax.interop.peft_write import export_peft
    from llmjax.interop.write import export_model

    if args.to.suffix == ".gguf":
        if args.peft:
            raise UserError("--peft writes a folder, not a .gguf file: leave it out to merge the adapters")
        print(export_gguf(args.source, args.to, type_name=args.type or "f16", model_type=args.family))
        return 0
    if args.type:
        raise UserError(f"--type is for .gguf files: give --to FILE.gguf instead of {args.to}")
    if args.peft:
        print(export_peft(args.source, args.to, model_type=args.family))
        return 0
    print(export_model(args.source, args.to, model_type=args.family, shard_bytes=size))
    return 0


VERBS = {
    "import": Verb("make a run of a Hugging Face model or a GGUF file", _add_import, _import, config="none"),
    "export": Verb(
        "write a run's model as a folder for transformers or a GGUF file for llama.cpp",
        _add_export,
        _export,
        config="none",
    ),
}
