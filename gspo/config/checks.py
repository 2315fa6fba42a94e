"""Reading and checking a recipe's config, so that a typo is one clear message before anything is loaded.

Building the components is torchtune's own ``config.instantiate``; no config object goes past the recipe.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from gspo.config.command_line import _FILE_VARIABLES, _variables
from gspo.config.presets import preset_keys
from gspo.errors import InputError, did_you_mean

MAX_SHOWN_PROBLEMS = 8


_NUMBERS = {"int", "float"}


_BESIDE_NUMBERS = {
    "class",
    "typing",
    "Union",
    "Optional",
    "None",
    "NoneType",
    "torch",
    "Tensor",
}  # in an annotation


def keeps_sampled_weights(cfg: DictConfig) -> bool:
    """Whether old log-probabilities are computed from weights that the policy leaves before the next rollout."""
    return cfg.old_logps == "recompute" and cfg.sync_every_steps > cfg.ppo_epochs


def require(condition: bool, key: str, value: Any, must: str, remedy: str) -> None:
    """Raise an InputError unless ``condition`` holds.

    ``require(n > 0, "num_steps", n, "must be at least 1", "set it to the steps to train")`` says
    ``num_steps: 0 must be at least 1; set it to the steps to train``.
    """
    if not condition:
        raise InputError(f"{key}: {value!r} {must}; {remedy}")


@contextlib.contextmanager
def refusals(key: str, remedy: str) -> Iterator[None]:
    """Show what a library raises over the value of ``key`` as the user's input, with the ``remedy``.

    Raises:
        InputError: naming the key and the cause. One that opens with an argument of the component, ``source: ...``,
            gets the key before it, ``prompts.source: ...``.
    """
    try:
        yield
    except InputError as error:
        if str(error).partition(":")[0].isidentifier():
            raise InputError(f"{key}.{error}") from error
        raise
    except Exception as error:  # libraries refuse with what they like: torchtune's checkpointers raise a bare Exception
        raise InputError(f"{key}: {type(error).__name__}: {error}; {remedy}") from error


def check_config(
    cfg: DictConfig,
    *,
    required: Collection[str],
    optional: Mapping[str, Any] | None = None,
    sections: Mapping[str, Any] | None = None,
    passed: Mapping[str, Collection[str]] | None = None,
) -> DictConfig:
    """Check the names in ``cfg``, its keys and each ``_component_`` with its arguments, and fill in the defaults.

    Of the values, only a text or a null where a component takes a number is refused; see :func:`require` for the rest.
    A key that the config file refers to as ``${key}`` may have any name, also where overrides took that use away.
    Where ``preset`` is one of the optional keys, the preset's keys lie between the defaults and the config's own.

    Args:
        cfg: The config, overrides merged. It is not changed.
        required: Top-level keys that must be there and not be null.
        optional: The other top-level keys with their defaults. A default that is a mapping is merged key by key, and
            unless it is empty its keys are the only ones.
        sections: For a top-level mapping without a ``_component_``, the keys that it may have, or the function or class
            that takes them as arguments.
        passed: The arguments that the recipe handles itself for the component at a path: it passes them, or takes them
            out of the YAML. A path is written like ``optimizer`` or ``readers.0``. If None, an argument that is missing
            is not a problem.

    Returns:
        The config with the defaults, interpolations kept.

    Raises:
        InputError: Up to eight problems at once, each with its key, the value found and the remedy.
    """
    optional = optional or {}
    merged = OmegaConf.merge(optional, preset_keys(cfg) if "preset" in optional else {}, cfg)
    raw = OmegaConf.to_container(merged, resolve=False)
    for key, default in optional.items():
        # `key=null` on the command line arrives as the component's path, see torchtune's merge.
        if (
            default is None
            and isinstance(raw[key], dict)
            and raw[key].get("_component_", "") is None
        ):
            merged[key] = None
    try:
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(
            f"{error.full_key}: {str(error).splitlines()[0]}; set or correct the value"
        ) from error
    if (
        os.getcwd() not in sys.path
    ):  # as config.instantiate does, for components in the user's folder
        sys.path.append(os.getcwd())

    by_default = {
        key: default
        for key, default in optional.items()
        if isinstance(default, Mapping) and default
    }
    problems = [
        *_top_level_problems(
            values, required, optional, _variables(merged) | vars(cfg).get(_FILE_VARIABLES, set())
        ),
        *_section_problems(values, {**by_default, **(sections or {})}, passed),
        *_component_problems(values, passed),
    ]
    if problems:
        shown = problems[:MAX_SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more problems in the config")
        raise InputError("\n".join(shown))
    return merged


def _top_level_problems(
    values: dict[str, Any],
    required: Collection[str],
    optional: Mapping[str, Any],
    variables: Collection[str],
) -> Iterator[str]:
    known = [*required, *optional]
    for key in values:
        if key not in known and key not in variables:
            yield f"{key}: unknown key.{did_you_mean(key, known)}"
    for key in required:
        if values.get(key) is None:
            yield f"{key}: {'null' if key in values else 'missing'}, but the recipe needs a value; set it in the config"
    for key, default in optional.items():
        if isinstance(default, Mapping) and not isinstance(values[key], dict):
            yield f"{key}: {values[key]!r}, but it must be a mapping of keys to values"


def _section_problems(
    values: dict[str, Any],
    sections: Mapping[str, Any],
    passed: Mapping[str, Collection[str]] | None,
) -> Iterator[str]:
    for path, section in sections.items():
        node = values.get(path)
        if not isinstance(node, dict) or "_component_" in node:
            continue
        if callable(section):
            yield from _argument_problems(path, section, node, passed)
            continue
        for key in node:
            if key not in section:
                yield f"{path}.{key}: unknown key.{did_you_mean(key, section)}"


def _component_problems(values: Any, passed: Mapping[str, Collection[str]] | None) -> Iterator[str]:
    for path, node in _components(values, ""):
        try:
            component = _locate(f"{path}._component_", node["_component_"])
        except InputError as error:
            yield str(error)
        else:
            yield from _argument_problems(path, component, node, passed)


def _components(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a ``_component_``, at any depth, with its path."""
    if isinstance(node, dict) and "_component_" in node:
        yield path, node
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _components(child, f"{path}.{key}" if path else str(key))


def _locate(key: str, dotpath: Any) -> Callable[..., Any]:
    """The object that a ``_component_`` names."""
    if not isinstance(dotpath, str) or not all(
        part.isidentifier() for part in f"{dotpath}".split(".")
    ):
        raise InputError(
            f"{key}: {dotpath!r}, but it must be a dotted path such as gspo.losses.GSPOLoss"
        )
    try:
        component = _get_component_from_path(dotpath)
    except InstantiationError as error:
        if _is_missing(error.__cause__, dotpath):
            raise InputError(f"{key}: {dotpath!r}, but {_what_is_missing(dotpath)}") from error
        raise InputError(
            f"{key}: {dotpath!r}, but importing it raises {error.__cause__!r}"
        ) from error
    if not callable(component):
        kind = type(component).__name__
        names = did_you_mean(dotpath.rpartition(".")[2], _public_names(component))
        raise InputError(
            f"{key}: {dotpath!r} is a {kind}, but it must be a class or a function.{names}"
        )
    return component


def _is_missing(cause: BaseException | None, dotpath: str) -> bool:
    """Whether the path itself is wrong; otherwise its module exists and fails to import."""
    if isinstance(cause, ModuleNotFoundError):
        return f"{dotpath}.".startswith(f"{cause.name}.")
    return isinstance(cause, AttributeError)


def _what_is_missing(dotpath: str) -> str:
    """Which part of the path does not exist, and what is there instead."""
    parts = dotpath.split(".")
    for count in range(len(parts) - 1, 0, -1):
        parent, name = ".".join(parts[:count]), parts[count]
        try:
            found = _get_component_from_path(parent)
        except InstantiationError:
            continue
        return f"{parent} has no {name!r}.{did_you_mean(name, _public_names(found))}"
    packages = [name for name in sys.modules if "." not in name and not name.startswith("_")]
    hint = did_you_mean(
        parts[0], difflib.get_close_matches(parts[0], packages)
    )  # all that there are say nothing
    return f"there is no module {parts[0]!r} installed or in {os.getcwd()}; run from its folder or set PYTHONPATH.{hint}"


def _public_names(found: Any) -> list[str]:
    submodules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    declared = [
        name for name in getattr(found, "__all__", ()) if isinstance(name, str)
    ]  # torchtune lists modules
    return submodules + (declared or [name for name in dir(found) if not name.startswith("_")])


def _argument_problems(
    path: str,
    component: Callable[..., Any],
    node: dict,
    passed: Mapping[str, Collection[str]] | None,
) -> Iterator[str]:
    try:
        parameters = inspect.signature(component).parameters.values()
    except ValueError:  # built in, without a signature
        return
    handled = (passed or {}).get(path, ())
    component_name = getattr(component, "__name__", path)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = [name for name in node if name != "_component_" and name not in handled]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in given:
            if name not in named:
                hint = did_you_mean(name, set(named) - set(handled))
                yield f"{path}.{name}: unknown, {component_name} takes no such argument.{hint}"
    for name in given:
        if name in named and not _fits(node[name], named[name]):
            yield f"{path}.{name}: {node[name]!r}, but {component_name} takes a number; write one like 1e-5, unquoted"
    for name, parameter in named.items() if passed is not None else ():
        if parameter.default is parameter.empty and name not in given and name not in handled:
            yield f"{path}.{name}: missing, but {component_name} needs it; set it in the config"


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    """False for a text or a null where only a number is taken, by the annotation or else by the default."""
    annotated = parameter.annotation is not parameter.empty
    # An annotation may be a class, a union or a string that no one has evaluated: words are what these share.
    words = set(
        re.findall(r"\w+", str(parameter.annotation if annotated else type(parameter.default)))
    )
    if not words & _NUMBERS or not words <= _NUMBERS | _BESIDE_NUMBERS:
        return True
    optional = parameter.default is None or bool(words & {"None", "NoneType", "Optional"})
    return not isinstance(value, str) and (value is not None or optional)
