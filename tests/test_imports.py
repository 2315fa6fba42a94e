"""Imports go down, from the recipe to types and errors.

The tests read the source and import nothing.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up; a module or package of gspo imports from itself and from lower rows only.
LAYERS = (
    ("types", "errors"),
    ("metrics", "compat", "plugin", "norm", "decoder"),
    ("losses", "advantages", "rewards", "sampling", "parallel", "kernels", "adapters"),
    ("config", "data", "models"),
    ("policy", "evaluation", "diagnosis", "tiny"),
    ("update",),
    ("run",),
    ("replay", "plan", "demo", "trainer"),
    ("commands",),
    ("__main__",),
    ("recipe",),
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
MAY_USE_TORCH_DISTRIBUTED = (
    "gspo.compat",
    "gspo.data.steps",
    "gspo.diagnosis",
    "gspo.metrics",
    "gspo.parallel.context",
    "gspo.parallel.mesh",
    "gspo.plan.dry_run",
    "gspo.policy.model",
    "gspo.policy.sharding",
    "gspo.run.dump",
    "gspo.run.folder",
    "gspo.run.progress",
    "gspo.trainer.trainer",
    "gspo.update",
    "recipe",
)
OF_AN_EXTRA = "gspo.models.huggingface"  # imported where a config names it alone
# Distributions that a declared one pins to an exact version and documents the import of.
PINNED_BY = {"pydantic-core": "pydantic"}


def sources() -> dict[str, ast.Module]:
    """The syntax trees by module name; the recipe is called ``recipe``."""
    paths = {path.relative_to(ROOT): path for path in (ROOT / "gspo").rglob("*.py")}
    names = {
        ".".join(relative.with_suffix("").parts).removesuffix(".__init__"): p
        for relative, p in paths.items()
    }
    names["recipe"] = ROOT / "recipes" / "gspo_full_finetune.py"
    return {name: ast.parse(path.read_text()) for name, path in sorted(names.items())}


SOURCES = sources()
DISTRIBUTIONS = packages_distributions()
MODULES = pytest.mark.parametrize("module", SOURCES)


def walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """All nodes that can run, so not those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            and not into_functions
        ):
            continue
        yield child
        yield from walk(child, into_functions=into_functions)


def imported(tree: ast.Module, *, into_functions: bool = True) -> set[str]:
    """Dotted names that a module imports; ``from a import b`` gives ``a.b``, a module or not."""
    names = set()
    for node in walk(tree, into_functions=into_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                "imports are absolute, so that a copy of the file works elsewhere"
            )
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top(name: str) -> str:
    return name.split(".")[0]


def unit(module: str) -> str:
    """``data`` of ``gspo.data.pack``; what is imported from ``gspo`` itself has none."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gspo" and len(parts) > 1 else module


def modules_of_the_pack(names: set[str]) -> set[str]:
    """Those of the dotted names that are modules, and the modules of the others."""
    ours = {name for name in names if top(name) == "gspo"}
    return {name if name in SOURCES else name.rpartition(".")[0] for name in ours} - {"gspo"}


@MODULES
def test_every_module_has_a_layer(module):
    assert module == "gspo" or unit(module) in LAYER, "give it a row in LAYERS"


def test_every_module_in_the_lists_exists():
    units = {unit(module) for module in SOURCES}
    assert set(LAYER) <= units
    assert set(MAY_USE_TORCH_DISTRIBUTED) <= set(SOURCES)


@MODULES
def test_imports_go_down(module):
    if module == "gspo":
        return
    this = unit(module)
    others = {unit(name) for name in modules_of_the_pack(imported(SOURCES[module]))} - {this}
    upward = sorted(name for name in others if LAYER.get(name, len(LAYERS)) >= LAYER[this])
    assert not upward, f"{module} must not import {upward}"


@MODULES
def test_nothing_imports_the_recipe(module):
    names = imported(SOURCES[module])
    assert not [name for name in names if top(name) == "recipes" or name.startswith("gspo.recipes")]


@MODULES
def test_torch_distributed_stays_where_ranks_meet(module):
    tree = SOURCES[module]
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = sorted(
        name for name in imported(tree) | attributes if re.match(r"torch\.distributed\b", name)
    )
    assert not used or module in MAY_USE_TORCH_DISTRIBUTED, f"{module} uses {used}"


@pytest.mark.parametrize("path", ["gspo/__init__.py", "gspo/plugin.py", "_gspo_torch_plugin.py"])
def test_what_import_torch_loads_is_standard_library(path):
    names = imported(ast.parse((ROOT / path).read_text()), into_functions=False)
    assert {top(name) for name in names} <= sys.stdlib_module_names | {"_gspo_torch_plugin"}


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("gspo.rewards")])
def test_reward_workers_start_without_torch(module):
    seen, waiting = set(), {module}
    while waiting:
        seen |= waiting
        waiting = (
            set().union(*(modules_of_the_pack(imported(SOURCES[name])) for name in waiting)) - seen
        )
    heavy = {"torch", "torchtune", "torchao", "torchdata", "transformers", "datasets"}
    assert not {top(name) for loaded in seen for name in imported(SOURCES[loaded])} & heavy


def test_recipe_runs_from_any_folder():
    others = {top(name) for name in imported(SOURCES["recipe"])} - sys.stdlib_module_names
    assert others <= {"gspo", "torch", "torchdata", "torchtune"}


def normalized(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@MODULES
def test_third_party_imports_are_declared(module):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {normalized(text) for text in project["dependencies"]}
    extras = {
        normalized(text) for texts in project["optional-dependencies"].values() for text in texts
    }
    always = imported(SOURCES[module], into_functions=False)
    for name in imported(SOURCES[module]):
        if top(name) in sys.stdlib_module_names or top(name) in ("gspo", "_gspo_torch_plugin"):
            continue
        distributions = {normalized(text) for text in DISTRIBUTIONS.get(top(name), [top(name)])}
        distributions |= {PINNED_BY[text] for text in distributions if text in PINNED_BY}
        is_needed = name in always and not module.startswith(OF_AN_EXTRA)
        declared = needed if is_needed else needed | extras
        assert distributions & declared, (
            f"{module} imports {name}, which pyproject.toml does not declare"
        )
