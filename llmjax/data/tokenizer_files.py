"""The tokenizer that a file or a folder holds, trained here or imported."""

import dataclasses
from pathlib import Path

from llmjax.data import hf_tokenizer
from llmjax.data.tokenizer import BYTE_FILE, BYTE_MODEL, MODEL_FILE, Tokenizer, byte_tokenizer, from_model
from llmjax.errors import UserError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds tokenizer.model or tokenizer.json.

    A tokenizer.json of Hugging Face needs the `tokenizers` package (pip install llmjax[hf]). A SentencePiece model with
    a tokenizer_config.json beside it is that of an imported model and is taken as it is.

    Raises:
        UserError: if there is none, or for any other SentencePiece model that has other special ids than ours, has no
            bytes to fall back on, or does not give a text back exactly.
    """
    path = Path(path)
    names = (BYTE_FILE, MODEL_FILE, *hf_tokenizer.SENTENCEPIECE_FILES)
    files = [path / name for name in names] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"there is no tokenizer at {path}: run `llmjax tokenizer` first, or set tokenizer.path to a SentencePiece "
            ".model file, a tokenizer.json or a folder with either"
        )
    model = file.read_bytes()
    if model == BYTE_MODEL:
        return _with_template(byte_tokenizer(), file.parent)
    try:
        if file.suffix == ".json":
            return hf_tokenizer.load(file)
        if (file.parent / hf_tokenizer.CONFIG_FILE).is_file():
            return hf_tokenizer.load_sentencepiece(file)
        return _with_template(from_model(model), file.parent)
    except UserError as error:
        raise UserError(f"{file} cannot be used: {error}") from error


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with another chat template, which `save` writes beside it."""
    files = {**tokenizer.files, hf_tokenizer.TEMPLATE_FILE: template.encode()}
    return dataclasses.replace(tokenizer, chat_template=template, files=files)


def _with_template(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer with the chat template that lies beside it, if one does."""
    file = folder / hf_tokenizer.TEMPLATE_FILE
    return with_template(tokenizer, file.read_text(encoding="utf-8")) if file.is_file() else tokenizer
