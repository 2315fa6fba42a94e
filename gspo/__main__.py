"""``python -m gspo``: the commands of ``tune`` without its plugin, and those of this pack."""

import importlib
import sys

from gspo.plugin import hide_torchao_note, shorten_interrupts

TUNE_COMMANDS = ("download", "ls", "cp", "cat", "run")
COMMANDS = {
    "validate": "gspo.commands.validate:main",
    "plan": "gspo.commands.plan:main",
    "presets": "gspo.commands.presets:main",
    "replay": "gspo.commands.replay:main",
}  # "module:function", called with the arguments after the name

USAGE = f"usage: python -m gspo {{{','.join((*TUNE_COMMANDS, *COMMANDS))}}} ..."
HELP = f"""{USAGE}

{", ".join(TUNE_COMMANDS)}: as in tune; see `python -m gspo run --help` and the like
validate CONFIG [--no-files] [key=value ...]: names, values and files as the recipe checks them;
    tune's own does not
plan --config CONFIG --world-size N [...]: memory and time of a step on a machine that is not here
presets [--json FILE]: the objectives that `preset: NAME` in a config means
replay FILE [--preset NAME] [loss.key=value ...]: a dumped step under any objective, without the
    model
Each command has --help."""


def main() -> None:
    """Run the command named by the first argument."""
    shorten_interrupts()
    hide_torchao_note()
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        from gspo.config.command_line import show_errors

        module, function = COMMANDS[command].split(":")
        command_main = getattr(importlib.import_module(module), function)
        sys.exit(show_errors(command_main)(sys.argv[2:]))
    if command in TUNE_COMMANDS:
        tune()
    elif command in ("-h", "--help"):
        print(HELP)
    else:
        sys.exit(f"{USAGE}\n\nunknown command {command!r}")


def tune() -> None:
    """Run torchtune's command line with the recipe registered."""
    from gspo.compat import run_tune
    from gspo.plugin import add_recipes

    add_recipes()
    run_tune()


if __name__ == "__main__":
    main()
