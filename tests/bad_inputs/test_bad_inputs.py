"""Bad input ends as a table says: in one screen that names the place, or handled; never in a stack.

The table is in the YAML files beside this one. A case has a name and

- ``command``: run (the recipe in this process, on the tiny model; the default), or validate, plan,
  presets, replay: a command of ``python -m gspo``;
- ``arguments``: overrides or arguments. ``{tmp}`` is a folder of the case's own, ``{base}`` the
  folder of the tiny model and its data;
- ``huggingface``: folders of a transformers model by ``model``, ``tokenizer``, ``checkpointer``, in
  the place of these sections; the tiny model's where none is named;
- ``files``: text by name, written into ``{tmp}`` first; ``hex:`` begins bytes;
- ``exit``: 1 for a refusal (the default), 0 for a run that goes well;
- ``says``: what the message has in it, one text or several.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.recipes import runs

HERE = Path(__file__).parent
MAX_LINES = 10  # of a message: one screen


def read_cases():
    cases = []
    for file in sorted(HERE.glob("*.yaml")):
        for case in yaml.safe_load(file.read_text()):
            cases.append(pytest.param(case, id=f"{file.stem}-{case['name']}"))
    return cases


def write_files(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("hex:"):
            path.write_bytes(bytes.fromhex(text[4:]))
        else:
            path.write_text(text)


def of_transformers(folders):
    """The overrides by which the three sections are those of a transformers model."""
    components = {"model": "causal_lm", "tokenizer": "tokenizer", "checkpointer": "Checkpointer"}
    arguments = []
    for section, component in components.items():
        values = {
            "_component_": f"gspo.models.huggingface.{component}",
            "path": folders.get(section, "{base}/base"),
        }
        if section == "checkpointer":
            values["output_dir"] = "{tmp}/out"
        arguments += [f"~{section}", f"{section}={json.dumps(values)}"]
    return arguments


def run_recipe(recipe, base, folder, arguments, monkeypatch):
    words = runs.command_line(*runs.overrides(base, folder / "out", *arguments))
    if "~checkpointer" in arguments:
        words = [word for word in words if not word.startswith("checkpointer.checkpoint_files")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        recipe.recipe_main()
    return stopped.value.code or 0


def run_command(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gspo", name, *arguments])
    try:
        code = importlib.import_module(f"gspo.commands.{name}").main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    return code or 0


@pytest.mark.parametrize("case", read_cases())
def test_bad_input_ends_as_the_table_says(
    case,
    recipe,
    base,
    tmp_path,
    monkeypatch,
    capsys,
    no_group_left,  # noqa: F811
):
    write_files(tmp_path, case.get("files", {}))
    places = {"{tmp}": str(tmp_path), "{base}": str(base)}
    arguments = []
    given = case.get("arguments", [])
    if "huggingface" in case:
        given = [*of_transformers(case["huggingface"]), *given]
    for argument in given:
        for name, path in places.items():
            argument = argument.replace(name, path)
        arguments.append(argument)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = case.get("command", "run")
    if command == "run":
        code = run_recipe(recipe, base, tmp_path, arguments, monkeypatch)
    else:
        code = run_command(command, arguments, monkeypatch)
    printed = capsys.readouterr()
    message = printed.err.split("error: ")[-1]
    assert code == case.get("exit", 1), printed.err[-2000:]
    says = case.get("says", [])
    for text in [says] if isinstance(says, str) else says:
        assert text in printed.err + printed.out
    if code:
        assert "Traceback" not in printed.err
        assert len(message.splitlines()) <= MAX_LINES
