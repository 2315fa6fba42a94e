"""The examples run, and the notebook is the script."""

import json
import os
import re
import subprocess
import sys

from tests.recipes.runs import ROOT, load_recipe

EXAMPLES = ROOT / "examples"


def run(*command, num_steps):
    """What an example prints, run for some steps."""
    done = subprocess.run(
        [sys.executable, *command, str(EXAMPLES / "successor.py")],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUM_STEPS": str(num_steps)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rewards(text):
    return [float(number) for number in re.findall(r"step +\d+: reward ([\d.]+)", text)]


def test_a_model_learns():
    first, *_, last = rewards(run(num_steps=40))
    assert first < 0.3 and last > 0.5


def test_two_ranks_under_torchrun_see_the_same():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one, two = rewards(run(*launcher, num_steps=10))
    assert one == two > 0


def test_notebook_is_the_script_run():
    make_notebook = load_recipe(EXAMPLES / "make_notebook.py")
    notebook = json.loads((EXAMPLES / "successor.ipynb").read_text())
    expected = make_notebook.cells_of((EXAMPLES / "successor.py").read_text())
    assert [cell["source"] for cell in notebook["cells"]] == [cell["source"] for cell in expected]
    printed = [
        line
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for line in output["text"]
    ]
    assert rewards("".join(printed))[-1] > 0.95
    assert printed[-1].startswith("after: {'eval/accuracy': 1.0")
