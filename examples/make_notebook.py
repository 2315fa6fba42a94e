"""Run a script cell by cell and write it, with what the cells printed, as a notebook.

    python examples/make_notebook.py examples/successor.py

A cell begins with ``# %%``. The module's docstring and what stands behind ``# %%`` become text.
Jupyter is not needed.
"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path


def cells_of(source: str) -> list[dict]:
    """Return the cells of a script in the notebook's format, without outputs."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    _, *parts = source.split("\n# %%")
    title, _, rest = docstring.partition("\n\n")
    cells = [_text(f"# {title}\n\n{rest}")]
    for part in parts:
        heading, _, code = part.partition("\n")
        if heading.strip():
            cells.append(_text(heading.strip()))
        cells.append(_code(code.strip()))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return cells


def run(cells: list[dict]) -> None:
    """Run the code cells in one namespace and put what they print into them."""
    names: dict = {"__name__": "__main__"}
    count = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        count += 1
        cell["execution_count"] = count
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)
        text = printed.getvalue()
        if text:
            output = {"output_type": "stream", "name": "stdout", "text": text.splitlines(True)}
            cell["outputs"].append(output)


def _text(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(True)}


def _code(text: str) -> dict:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": text.splitlines(True),
    }


def main() -> None:
    """Write the notebook beside the script."""
    path = Path(sys.argv[1])
    cells = cells_of(path.read_text())
    run(cells)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.with_suffix(".ipynb").write_text(json.dumps(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main()
