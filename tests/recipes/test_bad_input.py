"""Every mistake that a user can make with a config is one message.

The message names the key, the value found and the remedy.
"""

import gc
import json
import shutil
import socket
import sys

import pytest

from gspo.data import steps as steps_module
from tests.recipes.runs import ROOT, lines, overrides, shell, steps

REFUSED = {
    "misspelt_key": (
        ["docs_per_stepp=3"],
        "docs_per_stepp: unknown key; did you mean 'docs_per_step'?",
    ),
    "misspelt_argument": (
        ["loss.clip_hihg=3"],
        "loss.clip_hihg: unknown, GSPOLoss takes no such argument; did",
    ),
    "wrong_component": (
        ["loss=gspo.losses.GSPOLos"],
        "gspo.losses has no 'GSPOLos'; did you mean 'GSPOLoss'",
    ),
    "wrong_model": (
        ["model=torchtune.models.qwen2.qwen2_0_5b", "check_model_config=false"],
        "model: 'layers.0.attn.k_proj.bias' is [128] in the model and [64] in the",
    ),
    "wrong_model_type": (["checkpointer.model_type=QWEN3"], "checkpointer: "),
    "no_checkpoint_folder": (
        ["checkpointer.checkpoint_dir=nowhere"],
        "checkpointer: FileNotFoundError: [Errno 2] No such",
    ),
    "no_checkpoint_file": (
        ["checkpointer.checkpoint_files=[a.bin]"],
        "No file with name: a.bin found in",
    ),
    "dead_groups_dropped_under_a_penalty": (
        ["loss.entropy_coef=0.1"],
        "advantages.drop_dead_groups: True must be false where the loss has a KL or entropy term",
    ),
    "negative_clip_grad_norm": (
        ["clip_grad_norm=-1"],
        "clip_grad_norm: -1 must be a number above 0",
    ),
    "clip_grad_norm_not_a_number": (
        ["clip_grad_norm=big"],
        "clip_grad_norm: 'big' must be a number above 0",
    ),
    "no_new_tokens": (
        ["sampling.max_new_tokens=null"],
        "sampling.max_new_tokens: None must be a whole number of 1",
    ),
    "temperature_not_a_number": (
        ["sampling.temperature=hot"],
        "sampling.temperature: 'hot' must be a number above 0",
    ),
    "true_for_a_number": (
        ["group_size=true"],
        "group_size: True must be a whole number of 1 or more",
    ),
    "true_for_a_bin": (
        ["packing.bin_length=true"],
        "packing.bin_length: True must be a whole number of 1 or more, at most 2,147,483,647, or",
    ),
    "tokens_not_a_number": (
        ["packing.tokens_per_microbatch=many"],
        "packing.tokens_per_microbatch: 'many' must be",
    ),
    "no_tokens_per_microbatch": (
        ["~packing.tokens_per_microbatch"],
        "packing.tokens_per_microbatch: missing, but the recipe needs a value; set it",
    ),
    "true_for_new_tokens": (
        ["sampling.max_new_tokens=true"],
        "sampling.max_new_tokens: True must be a whole number",
    ),
    "true_for_a_norm": (
        ["clip_grad_norm=true"],
        "clip_grad_norm: True must be a number above 0, or null for no clip",
    ),
    "misspelt_switch": (["compile=flase"], "compile: 'flase' must be true, false or null"),
    "misspelt_dtype": (["dtype=fp16"], "dtype: 'fp16' must be fp32 or bf16"),
    "rate_not_a_number": (
        ["optimizer.lr=1e-5x"],
        "optimizer.lr: '1e-5x' is no number, as AdamW takes; write one like",
    ),
    "kl_not_a_number": (
        ["loss.kl_coef=little"],
        "loss.kl_coef: 'little' is no number, as GSPOLoss takes; write one",
    ),
    "timeout_not_a_number": (
        ["reward_pool.timeout=long"],
        "reward_pool.timeout: 'long' must be a number of seconds above 0",
    ),
    "no_reward_workers": (
        ["reward_pool.num_workers=0"],
        "reward_pool.num_workers: 0 must be a whole number of 1 or",
    ),
    "misspelt_estimator": (
        ["advantages.estimator=mean"],
        "advantages.estimator: 'mean' is not known; use one of",
    ),
    "no_model": (["~model"], "model: missing, but the recipe needs a value; set it in the config"),
    "eval_every_not_a_number": (
        ["eval.every_n_steps=two"],
        "eval.every_n_steps: 'two' must be a whole number",
    ),
    "negative_kl": (["loss.kl_coef=-0.1"], "loss.kl_coef: -0.1 must be 0 or more"),
    "no_reference": (
        ["loss.kl_coef=0.1", "advantages.drop_dead_groups=false"],
        "loss.kl_coef: 0.1 needs a reference policy; set reference_checkpointer",
    ),
    "no_tokenizer": (
        ["tokenizer.path=nowhere.json"],
        "tokenizer: FileNotFoundError: [Errno 2] No such file or direc",
    ),
    "no_prompts_file": (
        ["prompts.source=nowhere.jsonl"],
        "prompts.source: 'nowhere.jsonl' does not exist (looked for",
    ),
    "group_of_one": (["group_size=1"], "group_size: 1 "),
    "no_documents": (["docs_per_step=0"], "docs_per_step: 0 must be a whole number of 1 or more"),
    "not_a_number": (["num_steps=many"], "num_steps: 'many' must be a whole number of 1 or more"),
    "negative_prefetch": (["prefetch=-1"], "prefetch: -1 must be a whole number of 0 or more"),
    "dumps_not_a_number": (
        ["dump_every_n_steps=often"],
        "dump_every_n_steps: 'often' must be a whole number of 0 or m",
    ),
    "uneven_evaluation": (
        ["sync_every_steps=2", "eval.every_n_steps=3"],
        "eval.every_n_steps: 3 must be a multiple of",
    ),
    "greedy_sampling": (
        ["sampling.temperature=0"],
        "sampling.temperature: 0 must be a number above 0",
    ),
    "long_bins": (
        ["packing.bin_length=8192"],
        "packing.bin_length: 8192 is more than the model's max_seq_len 128",
    ),
    "short_bins": (
        ["packing.tokens_per_microbatch=16"],
        "is more than the 17 that one bin takes; raise tokens_per",
    ),
    "long_completions": (["sampling.max_new_tokens=120"], "in the model's max_seq_len 128"),
    "negative_rate": (["optimizer.lr=-1"], "optimizer: ValueError: Invalid learning rate: -1"),
    "odd_replicas": (
        ["data_parallel_replicate_size=3"],
        (
            "data_parallel_replicate_size: 3 x context_parallel_size 1 = 3, "
            "which does not divide the 1 ranks"
        ),
    ),
    "too_few_ranks": (
        ["context_parallel_size=4"],
        (
            "= 4, which does not divide the 1 ranks of this run; "
            "change one of them, or start a multiple of 4 ranks"
        ),
    ),
    "bins_that_cannot_be_split": (
        ["context_parallel_size=3", "packing.bin_length=64"],
        (
            "packing.bin_length: 64 must be a multiple of context_parallel_size (3), "
            "which splits every bin; use 66"
        ),
    ),
    "segments_without_a_component": (
        ["segments=gspo.data.segments.AtDelimiter"],
        (
            "segments: 'gspo.data.segments.AtDelimiter' must be a mapping "
            "with a _component_, or null; write segments._comp"
        ),
    ),
    "old_logps_of_nobody": (["old_logps=mine"], "old_logps: 'mine' must be sampler or recompute"),
    "correction_of_nothing": (
        ["loss.correction=sequence_geometric"],
        (
            "loss.correction: 'sequence_geometric' needs old_logps: recompute, "
            "since the sampler's own already stand"
        ),
    ),
    "ess_above_1": (
        ["min_ess=2"],
        "min_ess: 2 must be a share above 0 and up to 1, or null for no bound",
    ),
    "no_context": (
        ["context_parallel_size=0"],
        "context_parallel_size: 0 must be a whole number of 1 or more",
    ),
    "output_in_the_model": (
        ["output_dir=${base_dir}/out"],
        "output directory cannot be the same as or a subdirectory",
    ),
    "output_in_a_file": (
        ["output_dir=${data_dir}/train.jsonl/out"],
        "output_dir: NotADirectoryError: [Errno 20]",
    ),
    "no_gpu": (["device=xpu"], "device: 'xpu' is not on this machine; set device to cpu"),
    "no_device": (["device=gpu"], "device: 'gpu' is refused: Expected one of cpu, cuda"),
    "unknown_reward": (
        ["rewards.correct.function=gspo.rewards.mathh"],
        "gspo.rewards has no 'mathh'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_mistake_is_one_message(run, capsys, changes, message):
    code, _ = run(*changes)
    shown = capsys.readouterr().err.split("error: ")[-1]
    assert code == 1
    assert message in shown
    assert len(shown.splitlines()) <= 5 and "Traceback" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"expression": "1 + 1", "answer": "2"}\n{"expression": \n',
            "train.jsonl:2: not JSON: Expecting value",
        ),
        ("", "train.jsonl' is empty; a run needs at least one prompt"),
        (
            '{"question": "1 + 1", "answer": "2"}\n',
            "train.jsonl:1 has no field 'expression'; it has 'question', 'answer'",
        ),
    ],
    ids=["not_json", "empty", "other_fields"],
)
def test_bad_data_names_file_and_line(run, tmp_path, capsys, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    code, _ = run(f"prompts.source={tmp_path / 'train.jsonl'}")
    assert code == 1
    assert message in capsys.readouterr().err


def test_damaged_weights_name_the_file(run, base, tmp_path, capsys):
    shutil.copytree(base / "base", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    code, _ = run(f"base_dir={tmp_path / 'model'}")
    assert code == 1
    shown = capsys.readouterr().err
    assert "error: checkpointer: ValueError: Unable to load checkpoint from" in shown
    assert "(SafetensorError: Error while deserializing header" in shown


def test_missing_tensorboard_is_one_message(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _ = run(
        "metric_logger={_component_: torchtune.training.metric_logging.TensorBoardLogger, "
        "log_dir: log}"
    )
    assert code == 1
    shown = capsys.readouterr().err
    assert "error: metric_logger: ModuleNotFoundError: import of tensorboard halted" in shown
    assert shown.rstrip().endswith("install the package of 'tensorboard'")
    gc.collect()


def test_port_in_use_names_the_address(base, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = (
            "gspo",
            "run",
            "gspo_full_finetune",
            "--config",
            "tiny/gspo",
            *overrides(base, tmp_path / "out"),
        )
        result = shell(*command, path=ROOT, cwd=tmp_path, **address)
    assert result.returncode == 1
    error = result.stderr.split("error: ")[-1]
    assert error.startswith(
        f"MASTER_ADDR:MASTER_PORT: '127.0.0.1:{port}' is where the ranks could not meet: "
    )
    assert "choose a free port" in error and "Traceback" not in error


@pytest.mark.parametrize("reward", ["raises", "hangs", "nan"])
def test_failing_reward_is_counted_and_the_run_goes_on(run, reward):
    options = ["reward_pool.timeout=0.1", "prompts_per_rollout=4", "docs_per_step=16"]
    options += ["reward_pool.max_failure_share=1"]
    code, output = run(
        *options,
        "eval={every_n_steps: 1, num_samples: 2}",
        reward=f"tests.recipes.rewards.{reward}",
    )
    assert code is None
    records = steps(output)
    assert len(records) == 2 and all(r["reward_failures"] > 0 for r in records)
    assert all(r["eval/reward_failures"] > 0 for r in records)


def test_prompts_that_end_stop_the_run_early(run, base):
    code, output = run("prompts.num_epochs=1", "num_steps=50")
    assert code is None
    num_steps = len((base / "data" / "train.jsonl").read_text().splitlines()) // 8
    assert json.loads((output / "summary.json").read_text())["steps"] == num_steps
    *_, trained, evaluated = lines(output / "metrics.jsonl")
    assert (
        trained["step"] == evaluated["step"] == num_steps
    )  # which was the last, no one knew when it was written
    assert "loss" in trained and evaluated.keys() == {
        "step",
        "eval/accuracy",
        "eval/reward",
        "eval/reward_failures",
    }


@pytest.mark.parametrize(
    ("changes", "suffix"),
    [(["model=torchtune.models.qwen2.qwen2_0_5b"], ""), ([], ".1")],
    ids=["refused", "rerun"],
)
def test_files_of_an_earlier_run_are_kept(run, tmp_path, changes, suffix):
    names = ("metrics", "completions", "quarantine_rank0")
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / f"{name}.jsonl").write_text(f"{name}\n")
    _, output = run(*changes)
    assert [(output / f"{name}{suffix}.jsonl").read_text() for name in names] == [
        f"{name}\n" for name in names
    ]


def test_groups_that_are_all_dead_train_nothing_and_are_counted(run):
    code, output = run("num_steps=2", reward="tests.recipes.rewards.constant")
    assert code is None
    assert [(r["dead_groups"], r["documents"], r["grad_norm"]) for r in steps(output)] == [
        (1, 0, 0)
    ] * 2


def test_refilling_dead_groups_for_ever_ends_with_a_message(run, capsys, monkeypatch):
    monkeypatch.setattr(steps_module, "MAX_EMPTY_ROUNDS", 5)
    code, _ = run("advantages.refill_dead_groups=True", reward="tests.recipes.rewards.constant")
    assert code == 1
    error = capsys.readouterr().err.split("error: ")[-1]
    assert error.startswith(
        "docs_per_step: 32 is out of reach, 5 microbatches in a row brought no document; with adv"
    )


def test_refilling_dead_groups_until_the_prompts_end_trains_nothing(run):
    options = ("advantages.refill_dead_groups=True", "prompts.num_epochs=1")
    code, output = run(*options, reward="tests.recipes.rewards.constant")
    assert code is None
    assert json.loads((output / "summary.json").read_text())["steps"] == 0
