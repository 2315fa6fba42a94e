"""The code stays readable: its density, first words of docstrings, and names that say nothing."""

import ast
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted([*(ROOT / "gspo").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
PROSE = [*CODE, *sorted((ROOT / "benchmarks").rglob("*.py"))]

# Where the code stands; it may get plainer. Model libraries of the field have 3.9 to 5.8 syntax
# nodes a line, and functions of 19 to 36.
MEDIAN_NODES = 36
NODES_PER_LINE = 5.8
MAX_NODES = 300  # of a function that is no Triton kernel
MEDIAN_LINES, P90_LINES = 11, 35

# First words that make a fragment, which needs the name of the function to be understood.
FRAGMENTS = {
    *("as", "at", "by", "for", "from", "if", "in", "it", "its", "of", "on", "so", "than", "that"),
    *("their", "they", "those", "to", "under", "what", "when", "where", "which", "whose"),
    *("why", "with", "without"),
}
EMPTY_NAMES = {"found", "given", "own"}


def functions(path):
    """Every function of a file that has a body beside its docstring, with its nodes and lines."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[ast.get_docstring(node) is not None :]
        if body:
            inside = lines[body[0].lineno - 1 : body[-1].end_lineno]
            code = [x for x in inside if x.strip() and not x.strip().startswith("#")]
            counted = [x for part in body for x in ast.walk(part)]
            nodes = sum(isinstance(x, ast.expr | ast.stmt) for x in counted)
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", nodes, max(len(code), 1)


def test_functions_are_short_and_plain():
    rows = [row for path in CODE for row in functions(path)]
    nodes, lines = [n for _, n, _ in rows], sorted(n for *_, n in rows)
    assert statistics.median(nodes) <= MEDIAN_NODES
    assert sum(nodes) / sum(lines) <= NODES_PER_LINE
    assert statistics.median(lines) <= MEDIAN_LINES
    assert lines[int(0.9 * len(lines))] <= P90_LINES
    too_large = [row for row in rows if row[1] > MAX_NODES and "kernels/triton.py" not in row[0]]
    assert not too_large


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_sentence(path):
    bad = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and re.sub(r"\W", "", words[0]).lower() in FRAGMENTS:
                bad.append((getattr(node, "name", "module"), " ".join(words[:8])))
    assert not bad


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_what_they_hold(path):
    tree = ast.parse(path.read_text())
    assigned = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert not assigned & EMPTY_NAMES


def test_the_recipe_stays_a_loop_that_is_read_in_one_go():
    """Its length, its attributes and its methods, with no schema and no file name in it."""
    text = (ROOT / "recipes" / "gspo_full_finetune.py").read_text()
    tree = ast.parse(text)
    attributes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                attributes.add(node.attr)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name
    assert len(text.splitlines()) <= 340
    assert len(attributes) <= 24
    assert not re.search(r"\.jsonl|\.json\b|\.safetensors|REQUIRED_KEYS", text)
