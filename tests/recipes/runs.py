"""Runs the recipe for a few steps on an untrained model.

The runs are inside this process, or through the command line of ``tune``.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gspo.config import Settings, check, read_command_line

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "gspo_full_finetune.py"
SHORT = (  # with what a test depends on, whatever the config is tuned to
    "checkpointer.checkpoint_files=[model.safetensors]",
    "prompts_per_rollout=8",
    "group_size=4",
    "docs_per_step=32",
    "num_steps=2",
    "sync_every_steps=1",
    "ppo_epochs=1",
    "eval={every_n_steps: 0, num_samples: 0}",
    "sampling={temperature: 1.0, max_new_tokens: 10}",
    "optimizer.lr=1e-3",
    "lr_scheduler._component_=torchtune.training.get_cosine_schedule_with_warmup",
    "lr_scheduler.num_warmup_steps=0",
    "lr_scheduler.num_cycles=0",  # a constant rate
)
TIMEOUT_SECONDS = 240


def load_recipe(path=RECIPE):
    spec = importlib.util.spec_from_file_location("gspo_full_finetune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def overrides(base, output_dir, *more, reward="tests.recipes.rewards.variety"):
    """Command-line arguments of a run of two steps; those in ``more`` win."""
    return [
        *(f"base_dir={base / 'base'}", f"data_dir={base / 'data'}", f"output_dir={output_dir}"),
        *(f"rewards.correct.function={reward}", *SHORT, *more),
    ]


def command_line(*arguments, config="gspo"):
    """``sys.argv`` of a run inside this process."""
    return ["recipe", "--config", str(ROOT / "configs" / "tiny" / f"{config}.yaml"), *arguments]


def build(recipe, monkeypatch, *arguments, config="gspo"):
    """A recipe object, not yet set up."""
    monkeypatch.setattr(sys, "argv", command_line(*arguments, config=config))
    return recipe.GSPOFullFinetuneRecipe(check(read_command_line(), Settings))


def shell(*command, path, cwd, **environment):
    """A command of the user's, with ``path`` in the place of site-packages."""
    (result,) = shells(command, path=path, folders=[cwd], **environment)
    return result


def shells(command, *, path, folders, **environment):
    """The same command in several folders at once, as on the nodes of a cluster."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", *map(str, command)]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT_SECONDS}
    with ThreadPoolExecutor(len(folders)) as threads:
        return list(threads.map(lambda cwd: subprocess.run(command, cwd=cwd, **options), folders))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(output):
    """Returns the rows of the optimizer steps.

    Step 0 is left out: its row, if there are held-out prompts, is an evaluation alone.
    """
    return [row for row in lines(output / "metrics.jsonl") if row["step"]]
