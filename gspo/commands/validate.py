"""``python -m gspo validate``: check a config as the recipe does, before weights are loaded.

``tune validate`` tries the arguments of each component and passes a misspelt key. No recipe is
executed, but for one that ``--recipe`` names.
"""

from __future__ import annotations

import argparse
import contextlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from gspo.commands.trial import problems_of_parts
from gspo.config import (
    BaseSettings,
    Settings,
    build_loss,
    check,
    read_command_line,
    refusals,
    show_errors,
)
from gspo.config.checks import S, examine
from gspo.errors import NO_VALUE, InputError, raise_all
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, shipped_configs

_RUN_NAME = "gspo_validated_recipe"  # not __main__, so that the recipe does not start
_REMEDY = "decorate the recipe's main with @parse(MySettings), from gspo.config"


@show_errors
def main(arguments: list[str]) -> None:
    """Check the names and values of a config, and build what needs no weights.

    Raises:
        InputError: The recipe would refuse the config.
        ConfigError: torchtune refuses a config that is for a recipe of its own.
    """
    words = _parse(arguments)
    if words.config in CONFIGS_OF_OTHER_RECIPES and words.recipe is None:
        config.validate(OmegaConf.load(shipped_configs()[words.config]))
    else:
        settings = Settings if words.recipe is None else settings_of(words.recipe)
        cfg, problems = examine(_read([words.config, *words.overrides]), settings)
        if isinstance(cfg, Settings):
            told = [problem.key for problem in problems]
            for problem in problems_of_parts(cfg, with_files=words.files):
                # A part says less, or the same, of an argument that is refused already.
                if not any(key.startswith(problem.key) for key in told):
                    problems.append(problem)
        raise_all(problems)
    print("Config is well-formed!")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gspo validate",
        usage="%(prog)s [-h] CONFIG [--recipe FILE] [--no-files] [key=value ...]",
        description="Check the names and values of a config, as the recipe does before it loads "
        "weights, and whether its files are there.",
    )
    parser.add_argument("--config", help="the config, in place of the first word")
    add_recipe_option(parser)
    parser.add_argument(
        "--no-files",
        dest="files",
        action="store_false",
        help="look at no tokenizer, model or prompts, which may not be here yet",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG key=value",
        help="a file or a registered name, such as tiny/gspo, and overrides",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.config is None:
        if not args.overrides:
            raise InputError(
                "validate",
                NO_VALUE,
                "no config",
                "name a file or a registered config, python -m gspo validate tiny/gspo",
            )
        args.config = args.overrides.pop(0)
    return args


def add_recipe_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--recipe FILE``, which :func:`settings_of` reads."""
    parser.add_argument(
        "--recipe", metavar="FILE", help="a copied recipe whose settings the config has"
    )


def read_checked(
    arguments: Sequence[str],
    settings: type[S] = Settings,  # type: ignore[assignment]  # S is Settings then
) -> S:
    """Return the settings that the recipe would start with.

    Args:
        arguments: A config's file or registered name, then overrides.
        settings: The recipe's.

    Raises:
        InputError: The recipe would refuse the config before anything is loaded.
    """
    cfg = check(_read(arguments), settings)
    if isinstance(cfg, Settings):
        build_loss(cfg)
    return cfg


def _read(arguments: Sequence[str]) -> DictConfig:
    """Return the config that a command line names."""
    name, *overrides = arguments
    file = shipped_configs().get(name, name)
    with _command_line(["--config", str(file), *overrides]):
        return read_command_line()


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """Set ``sys.argv``, from which torchtune's parser reads."""
    before = sys.argv[1:]
    sys.argv[1:] = arguments
    try:
        yield
    finally:
        sys.argv[1:] = before


def settings_of(recipe: str) -> type[BaseSettings]:
    """Return the settings class of a recipe's file, which is imported and not started.

    Raises:
        InputError: The file cannot be imported, or not exactly one function is decorated with
            :func:`gspo.config.parse`.
    """
    mains = _functions_with_settings(recipe)
    if not mains:
        raise InputError("--recipe", recipe, "has no function with settings", _REMEDY)
    if len(mains) > 1:
        functions = ", ".join(decorated.__name__ for decorated in mains)
        problem = f"has several functions with settings: {functions}"
        raise InputError("--recipe", recipe, problem, "decorate one alone with @parse")
    return mains[0].settings


def _functions_with_settings(recipe: str) -> list[Any]:
    """Import a recipe's file, and return the functions that carry settings, each once."""
    if not Path(recipe).is_file():
        raise InputError("--recipe", recipe, "is no file", "name the file of a recipe")
    with refusals("--recipe", f"correct {recipe}"):
        names = runpy.run_path(recipe, run_name=_RUN_NAME)
    functions = []
    for value in names.values():
        has_settings = callable(value) and _is_settings(getattr(value, "settings", None))
        if has_settings and value not in functions:
            functions.append(value)
    return functions


def _is_settings(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseSettings)
