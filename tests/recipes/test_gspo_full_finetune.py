"""The recipe runs as a user starts it.

These tests use ``tune run`` on one rank and on two, copies of the recipe, and ``python -m gspo``.
"""

import json
import shutil
import socket

import pytest
import transformers

from tests.recipes.runs import ROOT, lines, overrides, shell, shells, steps

TUNE = "torchtune._cli.tune"
RUN = ("run", "gspo_full_finetune", "--config", "tiny/gspo")


def make_folder(path):
    """A user's folder, with a reward of their own."""
    path.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests" / "recipes" / "rewards.py", path / "my_rewards.py")
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def assert_trained(result, output, *, num_steps=2):
    assert result.returncode == 0, result.stderr[-3000:]
    assert [r["step"] for r in lines(output / "metrics.jsonl")] == list(range(num_steps + 1))
    assert json.loads((output / "summary.json").read_text())["steps"] == num_steps
    assert lines(output / "completions.jsonl")
    transformers.Qwen2ForCausalLM.from_pretrained(output / f"epoch_{num_steps}")


def test_tune_run_trains(installed, base, folder):
    arguments = overrides(base, "out", reward="my_rewards.variety")
    result = shell(TUNE, *RUN, *arguments, path=installed, cwd=folder)
    assert_trained(result, folder / "out")
    assert "steps: 100%" in result.stderr and "tok/s=" in result.stderr
    assert "Warning" not in result.stderr


def assert_trained_on_two_ranks(results, first, second):
    """Checks two ranks by their files.

    ``first`` is the output folder of the first rank, ``second`` the other's file of completions.
    """
    assert_trained(results[0], first)
    asked = [
        {c["prompt_id"] for c in lines(file)} for file in (first / "completions.jsonl", second)
    ]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    assert sum(result.stderr.count("with resolved config") for result in results) == 1


def test_tune_run_trains_on_two_ranks(installed, base, folder):
    arguments = overrides(base, "out", reward="my_rewards.variety")
    result = shell(
        TUNE, "run", "--nproc_per_node", "2", *RUN[1:], *arguments, path=installed, cwd=folder
    )
    assert_trained_on_two_ranks(
        [result], folder / "out", folder / "out" / "completions_rank1.jsonl"
    )


def test_tune_run_trains_on_two_nodes(installed, base, tmp_path):
    """Each node has a replica and a folder of its own.

    The first rank's node has the metrics and the model.
    """
    nodes = [make_folder(tmp_path / name) for name in "ab"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting_point = f"localhost:{free.getsockname()[1]}"
    cluster = (
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        meeting_point,
    )
    arguments = overrides(
        base, "out", "data_parallel_replicate_size=2", reward="my_rewards.variety"
    )
    results = shells((TUNE, "run", *cluster, *RUN[1:], *arguments), path=installed, folders=nodes)
    assert results[1].returncode == 0, results[1].stderr[-3000:]
    first = 0 if (nodes[0] / "out" / "metrics.jsonl").exists() else 1  # whoever came first
    results, nodes = (results[first], results[1 - first]), (nodes[first], nodes[1 - first])
    assert_trained_on_two_ranks(
        results, nodes[0] / "out", nodes[1] / "out" / "completions_rank1.jsonl"
    )
    assert [path.name for path in (nodes[1] / "out").iterdir()] == ["completions_rank1.jsonl"]


# Not those that are sums over ranks of places, or times.
SAME_ON_ANY_RANKS = {
    "loss", "grad_norm", "kl_new_old", "ratio/mean", "clip/binding_token", "entropy",
    "reward/mean", "length/mean", "documents", "tokens", "dead_groups",
    "eval/accuracy", "eval/pass@2",
}  # fmt: skip


def test_any_ranks_train_on_the_same_documents(installed, base, folder):
    """Four ranks have the prompts, completions and updates of one rank.

    Documents are split over two ranks, and prompts over two.
    """
    options = ("ppo_epochs=2", "eval={every_n_steps: 1, num_samples: 2}")
    found = {}
    for name, command in {
        "one": RUN,
        "four": ("run", "--nproc_per_node", "4", *RUN[1:], "context_parallel_size=2"),
    }.items():
        arguments = overrides(base, name, *options, reward="my_rewards.variety")
        result = shell(TUNE, *command, *arguments, path=installed, cwd=folder)
        assert_trained(result, folder / name)
        assert "Warning" not in result.stderr
        found[name] = lines(folder / name / "metrics.jsonl")
    for one, four in zip(found["one"], found["four"], strict=True):
        for key in one.keys() & SAME_ON_ANY_RANKS:
            assert four[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), (one["step"], key)
    assert (
        set().union(*found["one"]) >= SAME_ON_ANY_RANKS
        and found["one"][-1]["clip/binding_token"] > 0
    )


def test_copies_run_from_the_users_folder(installed, base, folder):
    for source, target in (("gspo_full_finetune", "my_recipe.py"), ("tiny/gspo", "my.yaml")):
        assert shell(TUNE, "cp", source, target, path=installed, cwd=folder).returncode == 0
    recipe = folder / "my_recipe.py"
    command = ("run", "my_recipe.py", "--config", "my.yaml")
    arguments = overrides(base, "out", reward="my_rewards.variety")
    assert_trained(shell(TUNE, *command, *arguments, path=installed, cwd=folder), folder / "out")

    line = "        state.finish_step(moved, grad_norm, max_skipped=cfg.max_skipped_steps)\n"
    edited = recipe.read_text().replace(line, line + "        grad_norm = 1234.0\n")
    assert edited != recipe.read_text()
    recipe.write_text(edited)
    arguments = overrides(base, "edited", reward="my_rewards.variety")
    assert_trained(shell(TUNE, *command, *arguments, path=installed, cwd=folder), folder / "edited")
    assert [r["grad_norm"] for r in steps(folder / "edited")] == [1234.0] * 2


def test_module_trains_where_the_plugin_is_switched_off(installed, base, folder):
    arguments = overrides(base, "out", reward="my_rewards.variety")
    result = shell(
        "gspo", *RUN, *arguments, path=installed, cwd=folder, TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert_trained(result, folder / "out")


def test_an_error_on_one_rank_ends_both(installed, base, folder):
    data = folder / "tiny" / "data"
    shutil.copytree(base, folder / "tiny")
    rows = (data / "train.jsonl").read_text().splitlines()
    rows[5] = rows[5].replace('"expression": "', '"expression": "' + "1 + " * 200)
    (data / "train.jsonl").write_text("\n".join(rows) + "\n")
    options = ("num_steps=50", "prompts.shuffle=False", "sampling.max_new_tokens=4")
    arguments = overrides(folder / "tiny", "out", *options, reward="my_rewards.variety")
    result = shell(
        TUNE, "run", "--nproc_per_node", "2", *RUN[1:], *arguments, path=installed, cwd=folder
    )
    assert result.returncode == 1
    assert "prompt train.jsonl:6" in result.stderr and "max_new_tokens" in result.stderr
    assert "Traceback" not in result.stderr.split("error: prompt train.jsonl:6")[0]
    assert len(lines(folder / "out" / "metrics.jsonl")) < 50
