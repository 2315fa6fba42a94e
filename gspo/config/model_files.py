"""The JSON files of a model folder, looked at before the libraries that read them say less.

Not here: weights; what the files say about the model (:mod:`gspo.policy.checkpoint_config`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gspo.config.value_types import is_number, is_path
from gspo.errors import NO_VALUE, DataError

_REMEDY = "get the file again"


def check_model_files(component: Mapping[str, Any]) -> None:
    """Refuse the files that a tokenizer or a checkpointer names where they are broken.

    Args:
        component: a section of the config. A file that is not there is left to the component.

    Raises:
        DataError: It names the first such file, and the cause.
    """
    for path in _json_files(component):
        content = _read(path)
        if path.name == "config.json":
            _check_config(path, content)
        elif path.name == "vocab.json":
            _check_vocabulary(path, content)


def _json_files(component: Mapping[str, Any]) -> Iterator[Path]:
    for name, value in component.items():
        if not is_path(value):
            continue
        candidates = [Path(value)]
        if name == "checkpoint_dir":
            candidates = [Path(value, "config.json"), *sorted(Path(value).glob("*.index.json"))]
        for path in candidates:
            if path.suffix == ".json" and path.is_file():
                yield path


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
        raise DataError(str(path), NO_VALUE, problem, _REMEDY) from error


def _check_config(path: Path, content: Any) -> None:
    """Refuse numbers that no float holds, and a text in the place of the positions' scaling."""
    if not isinstance(content, dict):
        raise DataError(str(path), content, "is no JSON object", _REMEDY)
    for name, value in content.items():
        if type(value) is int and not is_number(value):
            raise DataError(str(path), value, f"is {name}, and no number of a model", _REMEDY)
    for name in ("rope_scaling", "rope_parameters"):
        value = content.get(name)
        if value is not None and not isinstance(value, dict):
            raise DataError(str(path), value, f"is {name}, which must be a mapping", _REMEDY)


def _check_vocabulary(path: Path, content: Any) -> None:
    """Refuse a vocabulary whose ids are no whole numbers."""
    if not isinstance(content, dict):
        raise DataError(str(path), content, "is no JSON object of tokens and ids", _REMEDY)
    for token, number in content.items():
        if type(number) is not int:
            must = f"is the id of {token!r}, which must be a whole number"
            raise DataError(str(path), number, must, _REMEDY)
