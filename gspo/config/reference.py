"""Write the page of all config keys from the settings: ``python -m gspo.config.reference``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gspo.config.settings import Section, Settings
from gspo.config.value_types import Given, Must

_HEAD = """# Configuration

Every key of a config for `gspo_full_finetune`, with its range and default. This page is made from
`gspo/config/settings.py` by `make docs`.

A key is written in the YAML file, or on the command line as `key=value`; `~key` removes one. A key
of your own that other values refer to as `${key}` may have any name. A component is a mapping with
a `_component_`, the dotted path of a class or function, and its arguments.
`python -m gspo validate CONFIG` checks all of it without a run.
"""
_TABLE = ("| key | must be | default | meaning |", "|---|---|---|---|")


def page(settings: type[BaseModel] = Settings) -> str:
    """Return the page in Markdown."""
    lines = [_HEAD, *_TABLE]
    for key, field in settings.model_fields.items():
        lines.append(_row(key, field))
    for key, section in _sections(settings):
        docstring = section.__doc__ or ""
        summary = docstring.strip().splitlines()[0]
        lines += ["", f"## {key}", "", summary, "", *_TABLE]
        for name, field in section.model_fields.items():
            lines.append(_row(f"{key}.{name}", field))
    return "\n".join(lines) + "\n"


def _sections(settings: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in settings.model_fields.items():
        if _is_section(field):
            assert isinstance(field.annotation, type)
            yield key, field.annotation


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _row(key: str, field: FieldInfo) -> str:
    words = "a mapping, see below" if _is_section(field) else _range(field)
    meaning = field.description or ""
    if passed := _passed(field):
        meaning += f" The recipe passes {passed}."
    cells = [f"`{key}`", words, _default(field), meaning]
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _range(field: FieldInfo) -> str:
    for item in field.metadata:
        if isinstance(item, Must):
            return item.words
    return "any value"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if _is_section(field):
        return "see below"
    return f"`{_as_yaml(field.default)}`"


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _passed(field: FieldInfo) -> str:
    for item in field.metadata:
        if isinstance(item, Given):
            return ", ".join(f"`{name}`" for name in item.names)
    return ""


if __name__ == "__main__":
    sys.stdout.write(page())
