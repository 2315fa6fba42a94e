"""Read a config file and its overrides, and show errors without a stack."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.config._parse import TuneRecipeArgumentParser
from torchtune.config._utils import _merge_yaml_and_cli_args

from gspo.config.presets import make_room
from gspo.errors import InputError

_FILE_VARIABLES = "_file_variables"


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorate a recipe's main as torchtune's ``config.parse`` does, with :func:`show_errors` around it.

    An unreadable config file or command line is the user's input as well, and is shown in the same way.
    """

    @functools.wraps(recipe_main)
    @show_errors
    def main() -> None:
        sys.exit(recipe_main(read_command_line(recipe_main.__doc__)))

    return main


def read_command_line(description: str | None = None) -> DictConfig:
    """The config named by ``--config`` in ``sys.argv``, with the ``key=value`` overrides that follow.

    Raises:
        InputError: The file or an override cannot be read.
    """
    parser = TuneRecipeArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        from_file, overrides = parser.parse_known_args()
        variables = _variables(OmegaConf.create(vars(from_file)))
        for override in [o for o in overrides if o.startswith("~") and o[1:] in from_file]:
            delattr(from_file, override[1:])  # torchtune itself removes no key with a _component_
            overrides.remove(override)
        make_room(vars(from_file), overrides)
        if "_component_" not in (
            vars(from_file).get("loss") or {}
        ):  # a preset's, which torchtune's merge cannot see
            overrides = [
                f"loss._component_{o[4:]}" if o.startswith("loss=") else o for o in overrides
            ]
        cfg = _merge_yaml_and_cli_args(from_file, overrides)
        vars(cfg)[_FILE_VARIABLES] = variables  # beside the config's keys, for check_config
        return cfg
    except FileNotFoundError as error:
        raise InputError(
            f"--config: no such file or registered config: {error.filename}; see `tune ls`"
        ) from error
    except Exception as error:  # whatever goes wrong here, it is in the file or on the command line
        raise InputError(f"cannot read the config: {error}") from error


def show_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``main`` so that an InputError is printed without a stack and the process exits with code 1.

    Under torchrun, ranks other than 0 print its first line only, and torchrun's summary, printed last, repeats the
    message. Every other exception passes.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            _show(str(error))
            sys.exit(1)

    return wrapper


def _show(message: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    text = f"error: {message}" if rank == 0 else f"[rank {rank}] error: {message.splitlines()[0]}"
    sys.stderr.write(f"{text}\n")  # one write: the ranks share the stream
    sys.stderr.flush()
    if error_file := os.environ.get(
        "TORCHELASTIC_ERROR_FILE"
    ):  # torchrun sets it and reads this format
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(error_file, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def _variables(cfg: DictConfig) -> set[str]:
    """Top-level names that other values refer to as ``${name}``: a user's own, which no recipe has to know."""
    return set(re.findall(r"\$\{\s*(\w+)", OmegaConf.to_yaml(cfg)))
