"""``python -m gspo``: the doors of ``tune``, for where its plugin is switched off, and those of this pack."""

import importlib
import sys
from pathlib import Path

TUNE_COMMANDS = ("download", "ls", "cp", "cat", "run", "validate")
COMMANDS: dict[str, str] = {}  # of this pack: name -> "module:function", called with the arguments after the name

USAGE = f"usage: python -m gspo {{{','.join((*TUNE_COMMANDS, *COMMANDS))}}} ..."


def main() -> None:
    """Run the command named by the first argument."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        module, function = COMMANDS[command].split(":")
        sys.exit(getattr(importlib.import_module(module), function)(sys.argv[2:]))
    if command in TUNE_COMMANDS:
        tune()
    elif command in ("-h", "--help"):
        print(f"{USAGE}\n\n{', '.join(TUNE_COMMANDS)}: as in tune; see `python -m gspo run --help` and the like")
    else:
        sys.exit(f"{USAGE}\n\nunknown command {command!r}")


def tune() -> None:
    """Run torchtune's command line with the recipe registered; ``validate`` takes the name of a config too."""
    from torchtune._cli.tune import main as tune_main

    from gspo.plugin import add_recipes, shipped_configs

    add_recipes()
    if sys.argv[1] == "validate":
        names = shipped_configs()
        sys.argv[2:] = [str(names.get(Path(argument).as_posix(), argument)) for argument in sys.argv[2:]]
    tune_main()


if __name__ == "__main__":
    main()
