"""What a config can switch on, each in a short run inside this process."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torchtune.models.qwen2 import qwen2_tokenizer
from torchtune.training import FullModelHFCheckpointer

from gspo.losses.inputs import find_segments
from gspo.run import dump
from gspo.tiny import tiny_qwen2
from gspo.update import accumulate_gradients
from tests.recipes.runs import lines, steps

ALWAYS = {
    *(
        "step",
        "loss",
        "grad_norm",
        "lr",
        "ratio/mean",
        "ratio/ess",
        "kl_new_old",
        "entropy",
        "clip/any_document",
    ),
    *(
        "clip/binding_token",
        "reward/mean",
        "reward/std",
        "reward/correct",
        "solved",
        "length/mean",
        "length/truncated",
    ),
    *(
        "dead_groups",
        "staleness/mean",
        "documents",
        "tokens",
        "packing_efficiency",
        "quarantined_documents",
    ),
    *(
        "mismatch/rms_token",
        "clip/at_zero_drift",
        "time/sample",
        "time/update",
        "time/sync",
        "time/step",
    ),
    *("tokens_per_second", "skipped_steps"),
}

EVALUATED = {
    "eval/accuracy",
    "eval/reward",
    "eval/reward_failures",
    "eval/pass@3",
    "eval/sampled_accuracy",
}


def finish(result):
    """The metrics of the steps of a run that went well."""
    code, output = result
    assert code is None
    records = steps(output)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert all(math.isfinite(value) for record in records for value in record.values())
    return records


def saved_decoder(folder):
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model-00001-of-00001.safetensors"],
        model_type="QWEN2",
        output_dir=str(folder.parent / "reread"),
    )
    decoder = tiny_qwen2()
    decoder.load_state_dict(checkpointer.load_checkpoint()["model"])
    return decoder


@pytest.fixture
def tokens(base):
    model = base / "base"
    files = (str(model / "vocab.json"), str(model / "merges.txt"))
    tokenizer = qwen2_tokenizer(*files, special_tokens_path=str(model / "tokenizer.json"))
    text = "<|im_start|>user\n12 + 34<|im_end|>\n<|im_start|>assistant\n46"
    return torch.tensor([tokenizer.encode(text, add_bos=False, add_eos=False)])


def test_run_leaves_metrics_completions_summary_and_models(run, tokens):
    code, output = run(
        "save_every_n_steps=1", "eval={every_n_steps: 1, num_samples: 3}", "num_steps=3"
    )
    records = finish((code, output))
    assert len(records) == 3 and all(ALWAYS | EVALUATED <= r.keys() for r in records)
    assert all(0 < r["eval/reward"] < 1 and r["eval/reward_failures"] == 0 for r in records)
    assert [r["lr"] for r in records] == [1e-3] * 3
    assert records[0]["kl_new_old"] < 1e-6 and records[0]["clip/at_zero_drift"] == 0
    completions = lines(output / "completions.jsonl")
    assert {"prompt", "completion", "reward", "advantage", "policy_version"} <= completions[
        0
    ].keys()
    assert {c["policy_version"] for c in completions} == {0, 1, 2}
    summary = json.loads((output / "summary.json").read_text())
    assert summary.keys() == {"accuracy_before", "accuracy_after", "steps", "seconds", "seed"}
    assert (
        summary["steps"] == 3
        and summary["seed"] == 0
        and summary["accuracy_after"] == records[-1]["eval/accuracy"]
    )

    assert {p.name for p in output.glob("epoch_*")} == {"epoch_1", "epoch_2", "epoch_3"}
    logits = {i: saved_decoder(output / f"epoch_{i}")(tokens) for i in (1, 3)}
    assert (logits[1] - logits[3]).abs().max() > 1e-3  # training moved it
    read_back = transformers.Qwen2ForCausalLM.from_pretrained(output / "epoch_3")
    torch.testing.assert_close(read_back(tokens).logits, logits[3], rtol=0, atol=1e-5)
    text = transformers.AutoTokenizer.from_pretrained(output / "epoch_3").decode(tokens[0])
    assert text.endswith("assistant\n46")


def test_evaluations_before_and_after_a_short_run_are_written(run):
    code, output = run(
        "eval={every_n_steps: 0, num_samples: 3}", "num_steps=3", "sync_every_steps=4"
    )
    finish((code, output))
    first, *between, last = lines(output / "metrics.jsonl")
    assert first.keys() == {"step"} | EVALUATED and first["step"] == 0
    assert not any(EVALUATED & row.keys() for row in between) and len(between) == 2
    assert EVALUATED <= last.keys() and last["eval/reward"] != first["eval/reward"]
    assert (
        last["eval/accuracy"] == json.loads((output / "summary.json").read_text())["accuracy_after"]
    )


def test_summary_rounds_the_accuracies(run, base, tmp_path):
    rows = (base / "data" / "heldout.jsonl").read_text().splitlines()
    (tmp_path / "seven.jsonl").write_text("\n".join(rows[:7]))
    held_out = (f"eval_prompts.source={tmp_path / 'seven.jsonl'}", "eval.every_n_steps=2")
    code, output = run(*held_out, "optimizer.lr=0")
    accuracy, summary = (
        finish((code, output))[-1]["eval/accuracy"],
        json.loads((output / "summary.json").read_text()),
    )
    assert accuracy != round(accuracy, 4) == summary["accuracy_before"] == summary["accuracy_after"]


def test_saved_model_gives_the_logits_of_the_recipe(run, recipe, monkeypatch, tokens):
    held = {}

    def keep(self, save=recipe.GSPOFullFinetuneRecipe._save):
        held.update({name: value.clone() for name, value in self._policy.full_state_dict()})
        save(self)

    monkeypatch.setattr(recipe.GSPOFullFinetuneRecipe, "_save", keep)
    code, output = run()
    assert code is None
    decoder = tiny_qwen2()
    decoder.load_state_dict(held)
    read_back = transformers.Qwen2ForCausalLM.from_pretrained(output / "epoch_2")
    torch.testing.assert_close(read_back(tokens).logits, decoder(tokens), rtol=0, atol=1e-5)


def test_prefetch_lets_policies_go_stale_by_as_much(run):
    records = finish(run("prefetch=2", "num_steps=5"))
    assert records[0]["staleness/max"] == 0 < max(r["staleness/max"] for r in records) <= 3


def test_ppo_epochs_update_twice_on_the_same_rollout(run):
    records = finish(run("ppo_epochs=2", "num_steps=4"))
    assert [r["staleness/max"] for r in records] == [0, 1, 0, 1]
    assert [("reward/mean" in r) for r in records] == [True, False, True, False]
    assert records[0]["kl_new_old"] < 1e-6 < records[1]["kl_new_old"]


@pytest.mark.parametrize("min_ess", ["null", 0.9], ids=["unbounded", "bounded"])
def test_a_small_effective_sample_size_ends_the_updates_of_a_rollout(run, min_ess):
    options = (
        "ppo_epochs=4",
        "num_steps=4",
        "sync_every_steps=4",
        "optimizer.lr=3e-2",
        "loss._component_=gspo.losses.GRPOLoss",
    )
    records = finish(run(*options, f"min_ess={min_ess}"))
    first = [i for i, r in enumerate(records) if "reward/mean" in r]
    assert (len(first) == 1) == (min_ess == "null")
    for i, record in enumerate(
        records[:-1]
    ):  # the next is of another rollout where this one is below the bound
        assert (i + 1 in first) == (min_ess != "null" and record["ratio/ess"] < min_ess)
    assert records[0]["ratio/ess"] > 0.99 and min(r["ratio/ess"] for r in records) < 0.9
    assert all(
        records[i]["staleness/max"] == 0 for i in first
    )  # the sampler gets the weights at once
    assert all(0.9 < r["update/changed_fraction"] <= 1 for r in records)


def test_recomputed_old_logps_take_the_samplers_mismatch_out_of_the_ratio(run, recipe, monkeypatch):
    draw = recipe.Microbatch.prepare

    def a_sampler_that_is_off(batch, device, context):
        batch.old_logps += torch.where(
            batch.loss_mask, 0.2 * torch.sin(torch.arange(batch.tokens.numel())), 0.0
        )
        return draw(batch, device, context)

    monkeypatch.setattr(recipe.Microbatch, "prepare", a_sampler_that_is_off)
    options = ("ppo_epochs=2", "loss._component_=gspo.losses.GSPOTokenLoss")
    (first, _) = finish(run(*options))
    assert first["kl_new_old"] > 1e-2 and first["mismatch/rms_token"] > 0.1
    first, second = finish(
        run(
            *options, "old_logps=recompute", "loss.correction=token_tis", "loss.correction_high=1.1"
        )
    )
    assert first["kl_new_old"] < 1e-10 < second["kl_new_old"]  # of the trainer's own numbers
    for record in (first, second):  # of these and the sampler's, both times
        assert 0.1 < record["mismatch/rms_token"] < 0.2 and 0.1 < record["correction/changed"] < 0.5
        assert (
            record["correction/weight_mean"]
            < record["correction/ratio_mean"]
            < record["correction/ratio_max"]
        )
        assert record["correction/ratio_ess"] < record["correction/weight_ess"] < 1


def test_recomputed_old_logps_are_of_the_weights_that_sampled(run):
    """Steps after the first of a sync have moved on from the weights that sampled.

    Here the sampler's own log-probabilities are the same numbers.
    """
    options = (
        "sync_every_steps=3",
        "num_steps=4",
        "loss._component_=gspo.losses.GRPOLoss",
        "optimizer.lr=3e-3",
    )
    expected = finish(run(*options))
    found = finish(run(*options, "old_logps=recompute"))
    assert [r["staleness/max"] for r in found] == [0, 1, 2, 0]
    for record, want in zip(found, expected, strict=True):
        assert record["mismatch/rms_token"] < 1e-5
        for key in ("kl_new_old", "clip/any_document", "ratio/max", "loss", "grad_norm"):
            assert record[key] == pytest.approx(want[key], rel=1e-3, abs=1e-6), key
    assert found[2]["ratio/max"] > 1.05


def test_documents_older_than_the_sampler_are_named_under_recompute(run, caplog):
    finish(run("old_logps=recompute", "prefetch=2", "num_steps=5"))
    assert [
        r
        for r in caplog.messages
        if r.startswith("old_logps: recompute takes the weights that the sampler has")
    ]


def test_completions_are_cut_into_segments(run):
    """Where the tokenizer says that a delimiter ends; each has a ratio of its own."""
    options = (
        "loss._component_=gspo.losses.SegmentLoss",
        "loss.clip_low=0.02",
        "loss.clip_high=0.02",
    )
    cut = (
        "segments._component_=gspo.data.segments.AtDelimiter",
        "segments.delimiter=e",
        "dump_every_n_steps=2",
    )
    updates = ("ppo_epochs=2", "sampling.max_new_tokens=40", "optimizer.lr=3e-4")
    code, output = run(*options, *cut, *updates)
    finish((code, output))
    (microbatch,) = dump.read(output / "dumps" / "step_2.safetensors").microbatches
    batch = microbatch.batch
    segments = find_segments(batch.segment_index, batch.document_index, batch.loss_mask)
    per_document = torch.bincount(segments.document[segments.label_counts > 0])
    assert per_document.max() > 1
    log_ratio = torch.where(batch.loss_mask, microbatch.new_logps - batch.old_logps, 0.0)
    means = (
        torch.zeros(len(segments.document)).index_add(0, segments.index, log_ratio)
        / segments.label_counts
    )
    outside = ((means.exp() - 1).abs() > 0.02)[segments.index][batch.loss_mask].float().mean()
    assert 0 < outside < 1
    (record,) = [r for r in steps(output) if r["step"] == 2]
    assert record["ratio/max"] == pytest.approx(float(means.exp().nan_to_num(0).max()), rel=1e-4)


def test_a_segment_objective_without_segments_names_the_remedy(run, capsys):
    code, _ = run("loss._component_=gspo.losses.SegmentLoss")
    assert (
        code == 1
        and "segments._component_=gspo.data.segments.AtDelimiter" in capsys.readouterr().err
    )


def test_late_document_is_written_once_for_all_ppo_epochs(run, recipe, monkeypatch):
    prepare = recipe.Microbatch.prepare

    def spoil_the_first(batch, device, context):
        batch.old_logps[batch.loss_mask.nonzero()[0]] = math.inf
        return prepare(batch, device, context)

    monkeypatch.setattr(recipe.Microbatch, "prepare", spoil_the_first)
    code, output = run("ppo_epochs=2", "num_steps=4")
    assert [r["quarantined_documents"] for r in finish((code, output))] == [1] * 4
    assert [r["step"] for r in lines(output / "quarantine_rank0.jsonl")] == [1, 3]


def test_reference_policy_starts_where_the_policy_does(run):
    records = finish(
        run(
            "reference_checkpointer=${checkpointer}",
            "loss.kl_coef=0.1",
            "advantages.drop_dead_groups=false",
            "num_steps=3",
        )
    )
    assert records[0]["kl_ref"] < 1e-7 and all(r["kl_ref"] > 1e-3 for r in records[1:])


def test_activation_checkpointing_changes_nothing(run, tmp_path):
    plain = finish(run())
    code, _ = run("enable_activation_checkpointing=True", f"output_dir={tmp_path / 'again'}")
    assert code is None
    checkpointed = steps(tmp_path / "again")
    for a, b in zip(plain, checkpointed, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert b["reward/mean"] == a["reward/mean"]


def test_offload_to_the_cpu_changes_nothing(run, tmp_path):
    plain = finish(run())
    code, _ = run("fsdp_cpu_offload=true", f"output_dir={tmp_path / 'again'}")
    assert code is None
    for one, other in zip(plain, steps(tmp_path / "again"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"]) and other["grad_norm"] == pytest.approx(
            one["grad_norm"]
        )


def test_lr_scheduler_loggers_and_profiler(run, tmp_path):
    schedule = ("lr_scheduler.num_warmup_steps=2", "lr_scheduler.num_cycles=0.5")
    profiler = (
        f"profiler={{enabled: True, output_dir: {tmp_path / 'traces'}, "
        "cpu: True, cuda: False, xpu: False, "
        "profile_memory: False, with_stack: False, record_shapes: False, with_flops: False, "
        "wait_steps: 1, warmup_steps: 1, active_steps: 1, num_cycles: 1}"
    )
    logger = (
        "metric_logger={_component_: torchtune.training.metric_logging.DiskLogger, "
        f"log_dir: {tmp_path / 'log'}}}"
    )
    records = finish(run(*schedule, profiler, logger, "log_every_n_steps=3", "num_steps=4"))
    # The rate that the step used: torchtune's warm-up starts at 0.
    assert [r["lr"] for r in records] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4], abs=1e-9)
    (logged,) = (tmp_path / "log").glob("*.txt")
    rows = [line.split("|") for line in logged.read_text().splitlines()]
    assert [step for step, _ in rows] == ["Step 0 ", "Step 3 ", "Step 4 "]
    assert ["eval/accuracy:" in values for _, values in rows] == [True, False, True]
    assert list((tmp_path / "traces").rglob("*.json*"))


def test_grpo_config_runs(run):
    records = finish(run(config="grpo"))
    assert records[0]["tokens"] > records[0]["documents"] > 0


def test_adamw8bit_moves_bfloat16_weights_with_stochastic_rounding(run, base):
    code, output = run(
        "dtype=bf16",
        "optimizer=torchao.optim.AdamW8bit",
        "optimizer.lr=1e-4",
        "optimizer.bf16_stochastic_round=True",
        "~optimizer.fused",
    )
    records = finish((code, output))
    assert len(records) == 2
    before = load_file(base / "base" / "model.safetensors")
    after = load_file(output / "epoch_2" / "model-00001-of-00001.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(output / "epoch_2", dtype="auto").dtype
        == torch.bfloat16
    )
    moved = (after[name].float() - before[name].bfloat16().float()).abs().mean().item()
    assert (
        0.5e-4 < moved < 2e-4
    )  # two steps of 1e-4, which rounding to nearest would mostly lose at weights of 0.06


def test_every_microbatch_is_divided_by_the_totals_of_the_step(run, recipe, monkeypatch):
    seen = []

    def spy(policy, microbatches, denominator, **options):
        seen.append(
            (len(microbatches), sum(m.batch.num_documents for m in microbatches), denominator)
        )
        return accumulate_gradients(policy, microbatches, denominator, **options)

    monkeypatch.setattr(recipe.update, "accumulate_gradients", spy)
    options = [
        "docs_per_step=40",
        "packing.tokens_per_microbatch=256",
        "advantages.drop_dead_groups=False",
    ]
    records = finish(run(*options, "loss.aggregation=document"))
    for num_microbatches, num_documents, denominator in seen:
        assert num_microbatches > 2
        assert denominator == num_documents >= 40
    assert [r["documents"] for r in records] == [num_documents for _, num_documents, _ in seen]


def test_evaluation_and_logging_do_not_disturb_training(run, tmp_path):
    plain = finish(run("num_steps=3"))
    code, _ = run(
        "num_steps=3", "eval={every_n_steps: 1, num_samples: 2}", f"output_dir={tmp_path / 'again'}"
    )
    assert code is None
    names = ("loss", "grad_norm", "reward/mean", "tokens")
    for a, b in zip(plain, steps(tmp_path / "again"), strict=True):
        assert {name: b[name] for name in names} == {name: a[name] for name in names}


def test_loss_of_the_users_own_runs_and_its_metric_is_logged(run):
    options = [f"~loss.{key}" for key in ("clip_low", "clip_high", "aggregation")]
    records = finish(run("loss=tests.recipes.own_loss.OwnLoss", *options))
    assert all(record["own/logps"] < 0 for record in records)
    assert any(record["loss"] != 0 for record in records)


def test_optional_component_is_switched_off_by_null(run):
    code, output = run("eval_prompts=null", "lr_scheduler=null")
    finish((code, output))
    assert lines(output / "metrics.jsonl") == steps(output)
    assert json.loads((output / "summary.json").read_text())["accuracy_after"] is None
