"""Check a config before anything is loaded, so that a typo is one clear message.

Building the components is torchtune's own ``config.instantiate``; no config object goes past the
recipe. The ranges of values stand in :mod:`gspo.config.settings`.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from torchtune import config

from gspo.compat import InstantiationError, component_from_path
from gspo.config.merge import preset_keys
from gspo.config.model_files import check_model_files
from gspo.config.settings import BaseSettings, Section, Settings
from gspo.config.value_types import Given
from gspo.decoder import PARTS
from gspo.errors import NO_VALUE, InputError, did_you_mean, exits_raise, first_line, raise_all
from gspo.losses import GSPOLoss
from gspo.losses.checked import CheckedLoss
from gspo.losses.inputs import Loss, traits_of
from gspo.types import Axis

S = TypeVar("S", bound=BaseSettings)

FILE_VARIABLES = "_file_variables"  # attribute of a config that was read from a file
_NUMBERS = {"int", "float"}
# Words that may stand beside a number in an annotation.
_NULLS = {"None", "NoneType", "Optional"}
_BESIDE_NUMBERS = {"class", "typing", "Union", "torch", "Tensor"} | _NULLS
_HOW_TO_WRITE = {"number": "write one like 1e-5, unquoted", "text": "put it in quotes"}
_CORRECT = "correct its arguments"
_GET_MODEL = (
    "correct the path, or get the model first: the head of a copy made with `tune cp` has the "
    "commands"
)
_REMEDIES = {
    "tokenizer": _GET_MODEL,
    "checkpointer": _GET_MODEL,
    "reference_checkpointer": _GET_MODEL,
}
# What the recipe uses of the component at a key.
_USED = {
    "model": PARTS,
    "tokenizer": ("encode", "decode"),
    "checkpointer": ("load_checkpoint", "save_checkpoint"),
    "reference_checkpointer": ("load_checkpoint",),
    "prompts": ("reset", "next", "get_state"),
    "eval_prompts": ("__iter__",),
    "segments": ("__call__",),
    "sampler": ("sample", "update"),
    "loss": ("__call__", "denominator"),
    "optimizer": ("step", "zero_grad", "param_groups"),
    "lr_scheduler": ("step",),
    "metric_logger": ("log_config", "log_dict", "close"),
}


@contextlib.contextmanager
def refusals(key: str, remedy: str = _CORRECT) -> Iterator[None]:
    """Show what a component or a library raises over the value of ``key`` as the user's input.

    Raises:
        InputError: The key and the cause. A component's own error gets the key before its argument:
            ``source`` becomes ``prompts.source``.
    """
    try:
        yield
    except InputError as error:
        raise error.within(key) from error
    except (Exception, SystemExit) as error:  # torchtune's checkpointers raise a bare Exception
        cause = _missing_module(error) or error
        problem = f"{type(cause).__name__}: {cause}"
        if error.__cause__ is not None and cause is error:  # torchtune's may not tell the reason
            problem += f" ({type(error.__cause__).__name__}: {error.__cause__})"
        if isinstance(cause, ModuleNotFoundError) and remedy == _CORRECT:
            package = (cause.name or "").partition(".")[0]
            remedy = f"install the package of {package!r}"
        _free_in_silence(error)
        raise InputError(key, NO_VALUE, problem, remedy) from error


def _missing_module(error: BaseException) -> ModuleNotFoundError | None:
    """Return the failed import behind an ImportError: torchtune raises one of its own words."""
    cause: BaseException | None = error
    while isinstance(cause, ImportError):
        if isinstance(cause, ModuleNotFoundError):
            return cause
        cause = cause.__cause__
    return None


def _free_in_silence(error: BaseException) -> None:
    """Free what failed halfway now: the ``__del__`` of such an object may print a stack."""
    print_ignored = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = print_ignored


def build(cfg: BaseSettings, key: str, *args: Any, **kwargs: Any) -> Any:
    """Build the component that the config names at ``key``; None where it is null.

    Args:
        cfg: the settings.
        key: a top-level key.
        args: what the recipe passes to the component first.
        kwargs: what it passes by keyword.

    Raises:
        InputError: The component refuses its arguments.
    """
    component = getattr(cfg, key)
    if component is None:
        return None
    if key in _REMEDIES:
        check_model_files(component)
    with refusals(key, _REMEDIES.get(key, _CORRECT)), exits_raise():
        built = config.instantiate(OmegaConf.create(component), *args, **kwargs)
    _check_kind(key, component["_component_"], built)
    return built


def _check_kind(key: str, dotpath: str, built: Any) -> None:
    """Refuse a component of another kind by what the recipe uses of it."""
    missing = [name for name in _USED.get(key, ()) if not hasattr(built, name)]
    if missing:
        kind = type(built).__name__
        raise InputError(
            f"{key}._component_",
            dotpath,
            f"gives a {kind}, which has no {' and no '.join(missing)}",
            f"name a component that is fit for {key}",
        )


def build_loss(cfg: Settings) -> Loss:
    """Build the loss and check that the config has what it declares to need.

    Raises:
        InputError: The loss refuses its arguments, or needs another key.
    """
    loss = build(cfg, "loss")
    traits = traits_of(loss)
    drops = cfg.advantages.drop_dead_groups and not cfg.advantages.refill_dead_groups
    if drops and ("kl_coef" in traits.needs or "entropy_coef" in traits.needs):
        raise InputError(
            "advantages.drop_dead_groups",
            True,
            "must be false where the loss has a KL or entropy term, which a group of equal rewards "
            "feels too",
            "set it to false, or set refill_dead_groups: true to replace such groups",
        )
    if "correction" in traits.needs and cfg.old_logps != "recompute":
        raise InputError(
            "loss.correction",
            cfg.loss.get("correction"),
            "needs old_logps: recompute, since the sampler's own already stand in the ratio",
            "set that, or drop it",
        )
    has_reference = cfg.reference_checkpointer is not None or has_adapters(cfg.model)
    if "kl_coef" in traits.needs and not has_reference:
        raise InputError(
            "loss.kl_coef",
            cfg.loss.get("kl_coef"),
            "needs a reference policy",
            "set reference_checkpointer to the model to stay near, e.g. "
            "reference_checkpointer='${checkpointer}'",
        )
    if traits.ratio_unit == Axis.SEGMENT and cfg.segments is None:
        raise InputError(
            "segments",
            None,
            f"leaves completions whole, and {type(loss).__name__} has a ratio per segment",
            "cut them, e.g. with segments._component_=gspo.data.segments.AtDelimiter, or name "
            "gspo.losses.GSPOLoss",
        )
    is_shipped = type(loss).__module__ == GSPOLoss.__module__
    return loss if is_shipped else CheckedLoss(loss)


def has_adapters(model: Mapping[str, Any]) -> bool:
    """Whether a config's model is one of adapters, whose base is a reference policy."""
    builder = component_from_path(model["_component_"])
    return "lora_rank" in inspect.signature(builder).parameters


def check(cfg: DictConfig, settings: type[S]) -> S:
    """Check names, values and the arguments of components, and fill in the defaults.

    A key that the config file refers to as ``${key}`` may have any name, also where overrides took
    that use away. A preset's keys lie between the defaults and the config's own.

    Args:
        cfg: the config, overrides merged. It is not changed.
        settings: the recipe's settings.

    Raises:
        InputError: Up to eight problems at once, each with its key, the value and the remedy.
    """
    checked, problems = examine(cfg, settings)
    raise_all(problems)
    assert checked is not None
    return checked


def examine(cfg: DictConfig, settings: type[S]) -> tuple[S | None, list[InputError]]:
    """Return what :func:`check` does beside the problems that it finds.

    None stands for settings whose names or values are wrong by themselves.

    Raises:
        InputError: The config cannot be read as plain values.
    """
    merged = OmegaConf.merge(preset_keys(cfg) if "preset" in settings.model_fields else {}, cfg)
    values = _resolve(merged, settings)
    known = set(settings.model_fields) | variables_of(merged) | variables_of(cfg)
    if os.getcwd() not in sys.path:  # as config.instantiate does, for the user's own folder
        sys.path.append(os.getcwd())

    problems = []
    for key in values:
        if key not in known:
            problems.append(_unknown(key, settings.model_fields))
    checked = None
    try:
        checked = settings.model_validate(values)
    except ValidationError as error:
        problems += refused_values(error, settings)
    problems += component_problems(values, given_arguments(settings))
    if checked is None or problems:
        return None, problems
    return checked, list(checked.problems())


def variables_of(cfg: DictConfig) -> set[str]:
    """Return the top-level names that other values refer to as ``${name}``: a user's own.

    Those of the file that the config was read from count too, whatever was overridden since.
    """
    names = set(re.findall(r"\$\{\s*(\w+)", OmegaConf.to_yaml(cfg)))
    return names | vars(cfg).get(FILE_VARIABLES, set())


def _resolve(cfg: DictConfig, settings: type[BaseSettings]) -> dict[str, Any]:
    """Return the config as plain values, interpolations resolved."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    for key, value in raw.items():
        # `key=null` on the command line arrives as the component's path, see torchtune's merge.
        if isinstance(value, dict) and value.get("_component_", "") is None:
            cfg[key] = None
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        problem = first_line(error)
        raise InputError(str(error.full_key), NO_VALUE, problem, "set or correct it") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _unknown(key: str, known: Collection[str]) -> InputError:
    name = key.rpartition(".")[2]
    return InputError(key, NO_VALUE, "unknown key", did_you_mean(name, known))


def refused_values(error: ValidationError, settings: type[BaseModel]) -> list[InputError]:
    """Word the problems that pydantic has found in the values of settings."""
    return [_problem(details, settings) for details in error.errors()]


def _problem(details: ErrorDetails, settings: type[BaseModel]) -> InputError:
    """Word a problem that pydantic has found."""
    path = [str(part) for part in details["loc"]]
    key, value = ".".join(path), details["input"]
    if details["type"] == "missing":
        return InputError(
            key, NO_VALUE, "missing, but the recipe needs a value", "set it in the config"
        )
    section = _section_at(settings, path[:-1])
    if details["type"] == "extra_forbidden":
        retired = section.RETIRED if issubclass(section, Section) else {}
        if path[-1] in retired:
            return InputError(key, value, "is no key any more", retired[path[-1]])
        return _unknown(key, section.model_fields)
    if details["type"] == "must":
        is_required = section.model_fields[path[-1]].is_required()
        if value is None and is_required:
            return InputError(
                key, NO_VALUE, "null, but the recipe needs a value", "set it in the config"
            )
        remedy = "change it"
        if "_component_" in details["msg"]:
            remedy = f"write {key}._component_={value}"
        return InputError(key, value, details["msg"], remedy)
    if details["type"] == "model_type":
        return InputError(key, value, "must be a mapping of keys to values", "change it")
    return InputError(key, value, f"is refused: {details['msg']}", "change it")


def _section_at(settings: type[BaseModel], path: list[str]) -> type[BaseModel]:
    section = settings
    for name in path:
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return section


def given_arguments(settings: type[BaseSettings]) -> dict[str, tuple[str, ...]]:
    """Return, by key, the arguments that the recipe gives to the component there."""
    arguments = {}
    for key, field in settings.model_fields.items():
        for item in field.metadata:
            if isinstance(item, Given):
                arguments[key] = item.names
    return arguments


def component_problems(
    values: Any, given: Mapping[str, Collection[str]] | None
) -> Iterator[InputError]:
    """Yield what is wrong with the names and arguments of all components in plain values.

    Args:
        values: a config or a part of it, at any depth.
        given: the arguments that the recipe handles itself for the component at a path: it passes
            them, or takes them out of the YAML. A path is written like ``optimizer`` or
            ``readers.0``. If None, an argument that is missing is not a problem.
    """
    for path, node in _components(values, ""):
        try:
            component = _locate(f"{path}._component_", node["_component_"])
        except InputError as error:
            yield error
        else:
            yield from _argument_problems(path, component, node, given)


def _components(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping with a ``_component_``, at any depth, with its path."""
    if isinstance(node, dict) and "_component_" in node:
        yield path, node
    children: Any = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    for key, child in children:
        yield from _components(child, f"{path}.{key}" if path else str(key))


def _remedy_of_import(dotpath: str, cause: BaseException | None) -> str:
    """Return what to do about a component whose module raises while it is imported."""
    if not isinstance(cause, ModuleNotFoundError):
        return "correct the module"
    package = "gspo[hf]" if dotpath.startswith("gspo.models.huggingface") else cause.name
    return f"pip install '{package}'"


def _locate(key: str, dotpath: Any) -> Callable[..., Any]:
    """Return the object that a ``_component_`` names."""
    is_dotted = isinstance(dotpath, str) and all(p.isidentifier() for p in dotpath.split("."))
    if not is_dotted:
        raise InputError(
            key, dotpath, "must be a dotted path such as gspo.losses.GSPOLoss", "correct it"
        )
    try:
        with exits_raise():
            component = component_from_path(dotpath)
    except InstantiationError as error:
        if _is_missing(error.__cause__, dotpath):
            problem, remedy = _what_is_missing(dotpath)
            raise InputError(key, dotpath, problem, remedy) from error
        problem = f"cannot be imported: {error.__cause__!r}"
        remedy = _remedy_of_import(dotpath, error.__cause__)
        raise InputError(key, dotpath, problem, remedy) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may exit, too
        problem = f"cannot be imported: it raises {error!r}"
        raise InputError(key, dotpath, problem, "correct the module") from error
    if not callable(component):
        kind = type(component).__name__
        hint = did_you_mean(dotpath.rpartition(".")[2], _public_names(component))
        raise InputError(key, dotpath, f"is a {kind}, but it must be a class or a function", hint)
    return component


def _is_missing(cause: BaseException | None, dotpath: str) -> bool:
    """Whether the path itself is wrong; otherwise its module exists and fails to import."""
    if isinstance(cause, ModuleNotFoundError):
        return f"{dotpath}.".startswith(f"{cause.name}.")
    return isinstance(cause, AttributeError)


def _what_is_missing(dotpath: str) -> tuple[str, str]:
    """Return which part of the path does not exist, and what is there instead."""
    names = dotpath.split(".")
    for count in range(len(names) - 1, 0, -1):
        parent = ".".join(names[:count])
        try:
            module = component_from_path(parent)
        except InstantiationError:
            continue
        hint = did_you_mean(names[count], _public_names(module))
        return f"does not exist: {parent} has no {names[count]!r}", hint
    packages = [name for name in sys.modules if "." not in name and not name.startswith("_")]
    remedy = "run from its folder or set PYTHONPATH"
    if close := difflib.get_close_matches(names[0], packages):
        remedy = f"{did_you_mean(names[0], close)} Else {remedy}"
    return f"does not exist: no module {names[0]!r} is installed or in {os.getcwd()}", remedy


def _public_names(module: Any) -> list[str]:
    submodules = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))]
    # torchtune's __all__ lists modules too, which have no text as a name.
    declared = [name for name in getattr(module, "__all__", ()) if isinstance(name, str)]
    return submodules + (declared or [name for name in dir(module) if not name.startswith("_")])


def _argument_problems(
    path: str,
    component: Callable[..., Any],
    node: dict[str, Any],
    given: Mapping[str, Collection[str]] | None,
) -> Iterator[InputError]:
    """Yield what is wrong with the arguments of one component."""
    try:
        parameters = inspect.signature(component).parameters
    except ValueError:  # built in, without a signature
        return
    handled = set() if given is None else set(given.get(path, ()))
    for name in sorted(handled & node.keys()):
        problem = "is passed by the recipe"
        yield InputError(f"{path}.{name}", node[name], problem, "leave it out")
    arguments = {name: value for name, value in node.items() if name not in handled}
    arguments.pop("_component_")
    named = _by_name(parameters)
    component_name = getattr(component, "__name__", path)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in sorted(arguments.keys() - named.keys()):
            problem = f"unknown, {component_name} takes no such argument"
            hint = did_you_mean(name, set(named) - handled)
            yield InputError(f"{path}.{name}", NO_VALUE, problem, hint)
    for name, value in arguments.items():
        wanted = _misfit(value, named[name]) if name in named else None
        if wanted is not None:
            problem = f"is no {wanted}, as {component_name} takes"
            yield InputError(f"{path}.{name}", value, problem, _HOW_TO_WRITE[wanted])
    if given is None:
        return
    for name, parameter in named.items():
        is_needed = parameter.default is parameter.empty
        if is_needed and name not in arguments and name not in handled:
            problem = f"missing, but {component_name} needs it"
            yield InputError(f"{path}.{name}", NO_VALUE, problem, "set it in the config")


def _by_name(parameters: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be passed by keyword."""
    named = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named[name] = parameter
    return named


def _misfit(value: Any, parameter: inspect.Parameter) -> str | None:
    """Return the kind of value that is taken alone, where this one is of another kind.

    The annotation says so, or else the type of the default.
    """
    is_annotated = parameter.annotation is not parameter.empty
    kind = parameter.annotation if is_annotated else type(parameter.default)
    # An annotation may be a class, a union or a string that no one has evaluated: words are what
    # these share.
    words = set(re.findall(r"\w+", str(kind)))
    if words & _NUMBERS and words <= _NUMBERS | _BESIDE_NUMBERS:
        takes_null = parameter.default is None or bool(words & _NULLS)
        is_misfit = isinstance(value, str) or (value is None and not takes_null)
        return "number" if is_misfit else None
    if is_annotated and "str" in words and words <= {"str"} | _BESIDE_NUMBERS:
        # A number for a path is the number of an open file, some other library's.
        return "text" if isinstance(value, int | float) else None
    return None
