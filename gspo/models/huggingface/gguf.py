"""Turns a model's GGUF file into an ordinary folder of transformers.

The weights are read through the library, which undoes their quantisation. Needs ``gspo[gguf]``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo.decoder import unique_state
from gspo.errors import InputError, first_line, require
from gspo.models.huggingface.checkpointer import write_model

_INCOMPLETE = "is no complete GGUF file"
_GET_AGAIN = "delete it and get it again"


def write_folder(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, in float32, and its tokenizer as a folder of transformers.

    The folder is written beside its place and renamed, so that it is whole or not there.

    Args:
        file: a model of an architecture whose GGUF files transformers reads.
        folder: must not exist.

    Raises:
        InputError: The file is cut short or cannot be read, or a package is missing.
    """
    check_complete(file)
    model, tokenizer = _load(file)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what it says of the file is not true of the folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        write_model(config, unique_state(model), part)
        tokenizer.save_pretrained(part)
        part.chmod(0o755)  # a temporary folder is its owner's alone
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_complete(file: Path) -> None:
    """Refuse a GGUF file that ends before its last weight does.

    Raises:
        InputError: It does, or is no GGUF file, or the package gguf is missing.
    """
    require(file.is_file(), "file", str(file), "does not exist", "get the model first")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        remedy = "run `pip install 'gspo[gguf]'`"
        raise InputError("file", str(file), "needs the package gguf", remedy) from error
    try:
        GGUFReader(file)  # maps every weight
    except Exception as error:  # of a cut file: whatever comes of reading beyond its end
        size = file.stat().st_size
        must = f"{_INCOMPLETE}, with {size:,} bytes: {type(error).__name__}: {first_line(error)}"
        raise InputError("file", str(file), must, _GET_AGAIN) from error


def _load(file: Path) -> tuple[Any, Any]:
    """Return the model, in float32, and the tokenizer of a file."""
    folder = file.parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:
        must = f"is a GGUF file that transformers does not take: {first_line(error)}"
        raise InputError("file", str(file), must, "choose a model that it reads") from error
    return model, tokenizer
