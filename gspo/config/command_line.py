"""Read a config file and its overrides, and show errors without a stack."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gspo.compat import TuneRecipeArgumentParser, merge_overrides
from gspo.config.checks import FILE_VARIABLES, S, check, variables_of
from gspo.config.merge import make_room
from gspo.errors import NO_VALUE, InputError

SECONDS_FOR_TORCHRUN = 5.0  # it looks after its ranks ten times a second
_LOST_WORDS = ("Connection closed by peer", "Connection reset by peer")  # gloo's


def parse(settings: type[S]) -> Callable[[Callable[[S], Any]], Callable[[], None]]:
    """Decorate a recipe's main so that it gets the settings that the command line names.

    ``@parse(Settings)`` stands where torchtune has ``@config.parse``. Errors of the input are
    shown as :func:`show_errors` does. The settings class stays at hand as ``main.settings``.
    """

    def decorate(recipe_main: Callable[[S], Any]) -> Callable[[], None]:
        @functools.wraps(recipe_main)
        @show_errors
        def main() -> None:
            cfg = check(read_command_line(recipe_main.__doc__), settings)
            sys.exit(recipe_main(cfg))

        main.settings = settings  # type: ignore[attr-defined]
        return main

    return decorate


def read_command_line(description: str | None = None) -> DictConfig:
    """Return the config named by ``--config`` in ``sys.argv``, with the overrides that follow.

    Raises:
        InputError: The file or an override cannot be read.
    """
    parser = TuneRecipeArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        from_file, overrides = parser.parse_known_args()
        return _merge(from_file, overrides)
    except FileNotFoundError as error:
        raise InputError(
            "--config", error.filename, "is no file and no registered config", "see `tune ls`"
        ) from error
    except InputError:
        raise
    except Exception as error:  # whatever goes wrong, it is in the file or on the command line
        raise InputError("--config", NO_VALUE, f"cannot be read: {error}") from error


def _merge(from_file: argparse.Namespace, overrides: list[str]) -> DictConfig:
    """Lay the overrides over the file's keys."""
    variables = variables_of(OmegaConf.create(vars(from_file)))
    kept = []
    for override in overrides:
        if override.startswith("~") and override[1:] in from_file:
            delattr(from_file, override[1:])  # torchtune removes no key with a _component_
        else:
            kept.append(override)
    kept = [_escape_equals_signs(override) for override in kept]
    for override in kept:
        _check_value(override, vars(from_file))
    make_room(vars(from_file), kept)
    loss = vars(from_file).get("loss") or {}
    if "_component_" not in loss:  # a preset's, which torchtune's merge cannot see
        kept = [_with_component(override, "loss") for override in kept]
    cfg = merge_overrides(from_file, kept)
    vars(cfg)[FILE_VARIABLES] = variables  # beside the config's keys
    return cfg


def _escape_equals_signs(override: str) -> str:
    """Write each ``=`` in the value as YAML can, because torchtune's merge takes a single one."""
    key, _, value = override.partition("=")
    if override.startswith("~") or "=" not in value:
        return override
    if value == "=":  # a type of its own in YAML
        plain: Any = value
    else:
        loaded = OmegaConf.from_dotlist([f"value={value}"])
        plain = OmegaConf.to_container(loaded, resolve=False)["value"]
    escaped = json.dumps(plain).replace("=", r"\u003D")  # JSON is YAML
    return f"{key}={escaped}"


def _check_value(override: str, from_file: Mapping[str, Any]) -> None:
    """Refuse a value that a merge with the file's would drop in silence or not name."""
    if override.startswith("~"):
        return
    values = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    for key in _missing_values(values, ""):
        raise InputError(
            key, "???", "is the mark for a missing value", "give a value, or leave it out"
        )
    assert isinstance(values, dict)
    for name, value in values.items():
        in_file = from_file.get(str(name))
        is_section = isinstance(in_file, dict) and "_component_" not in in_file
        if is_section and isinstance(value, list):
            raise InputError(str(name), value, "must be a mapping of keys to values", "change it")


def _missing_values(value: Any, key: str) -> Iterator[str]:
    """Yield the keys of OmegaConf's mark for a missing value, at any depth."""
    if value == "???":
        yield key
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _missing_values(child, f"{key}.{name}" if key else str(name))


def _with_component(override: str, key: str) -> str:
    if not override.startswith(f"{key}="):
        return override
    return f"{key}._component_{override[len(key) :]}"


def show_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``main`` so that an InputError is printed without a stack and ends with exit code 1.

    Under torchrun, ranks other than 0 print its first line only, and torchrun's summary, printed
    last, repeats the message. A rank that has lost another to an error says so in a line and waits
    for torchrun, so that the summary names the other's error. Ctrl-C ends with exit code 130 and a
    line of the first rank: the interrupt's message, where it has one. Every other exception passes.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            _show(str(error))
            sys.exit(1)
        except RuntimeError as error:
            if not _has_lost_rank(error):
                raise
            _wait_for_torchrun()
            sys.exit(1)
        except KeyboardInterrupt as interrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes a second one on
            if os.environ.get("RANK", "0") == "0":
                sys.stderr.write(f"{str(interrupt) or 'Interrupted.'}\n")
                sys.stderr.flush()
            sys.exit(130)

    return wrapper


def _has_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank of the run has ended."""
    is_lost = any(words in str(error) for words in _LOST_WORDS)
    return is_lost and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _wait_for_torchrun() -> None:
    """Say that another rank has ended, and give torchrun the time to end this one."""
    rank = os.environ.get("RANK")
    sys.stderr.write(f"[rank {rank}] ends, since another rank has ended; its error tells why.\n")
    sys.stderr.flush()
    time.sleep(SECONDS_FOR_TORCHRUN)


def _show(message: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    text = f"error: {message}" if rank == 0 else f"[rank {rank}] error: {message.splitlines()[0]}"
    sys.stderr.write(f"{text}\n")  # one write: the ranks share the stream
    sys.stderr.flush()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:  # torchrun sets it and reads this format
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(error_file, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
