"""Steps that the recipe dumps, scored again: the numbers are those that the run logged."""

import json
import math

import pytest

from gspo.commands import replay as replay_command
from gspo.run import dump
from tests.recipes.runs import ROOT, overrides, shell, steps

# The second update of a rollout has ratios beside 1.
# Some of the 16 groups of two have equal rewards.
MOVING = (
    *(
        "ppo_epochs=2",
        "num_steps=4",
        "sync_every_steps=2",
        "optimizer.lr=5e-3",
        "clip_grad_norm=null",
    ),
    *(
        "group_size=2",
        "prompts_per_rollout=16",
        "packing.tokens_per_microbatch=256",
        "eval_prompts=null",
    ),
)
OBJECTIVES = {
    "gspo": (),
    "grpo": ("preset=grpo",),
    "dapo": ("preset=dapo", "advantages.refill_dead_groups=false"),
}


def scored(path, capsys, *arguments):
    capsys.readouterr()
    replay_command.main([str(path), *arguments, "--json", "-"])
    return json.loads(capsys.readouterr().out)


def assert_as_logged(output, capsys, numbers, *, abs=0.0):
    """The replays of all steps; the metrics of each are those of its row in ``metrics.jsonl``."""
    rows = {row["step"]: row for row in steps(output)}
    assert {p.name for p in (output / "dumps").iterdir()} == {
        f"step_{n}.safetensors" for n in numbers
    }
    found = []
    for number in numbers:
        found.append(scored(output / "dumps" / f"step_{number}.safetensors", capsys))
        (objective,) = found[-1]["objectives"]
        assert {"loss", "clip/binding_document", "clip/any_document", "kl_new_old"} <= objective[
            "metrics"
        ].keys()
        for name, value in objective["metrics"].items():
            assert value == pytest.approx(rows[number][name], rel=1e-6, abs=abs), (number, name)
            assert found[-1]["logged"][name] == rows[number][name]
        for of in ("documents", "tokens"):
            want = rows[number][f"clip/binding_{of.removesuffix('s')}"]
            assert objective["clip"][of]["binding"] == pytest.approx(want, rel=1e-6)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_replay_under_the_runs_own_objective_is_the_run(run, capsys, objective):
    code, output = run(*MOVING, *objective, "dump_every_n_steps=1")
    assert code is None
    found = assert_as_logged(output, capsys, (1, 2, 3, 4))
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert (
            0 < first["documents_in_file"] < first["num_documents"]
        )  # dropped ones are in the denominators
        assert first["objectives"][0]["metrics"]["ratio/mean"] == pytest.approx(1, abs=1e-6)
        metrics = second["objectives"][0]["metrics"]
        assert (
            metrics["clip/any_document"] > 0
            and metrics["ratio/ess"] < 0.999
            and metrics["loss"] != 0
        )
    assert found[1]["quarantined"] == []


@pytest.mark.parametrize("options", [(), ("context_parallel_size=2",)], ids=["data", "context"])
def test_dump_of_two_ranks_is_the_run(base, tmp_path, capsys, options):
    arguments = overrides(base, tmp_path / "out", *MOVING, *options, "dump_every_n_steps=2")
    command = (
        "gspo",
        "run",
        "--nproc_per_node",
        "2",
        "gspo_full_finetune",
        "--config",
        "tiny/gspo",
        *arguments,
    )
    result = shell(*command, path=ROOT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    # Over two ranks a document's sum has two parts.
    # The loss is what is left of terms near 1 of either sign.
    for found in assert_as_logged(tmp_path / "out", capsys, (2, 4), abs=1e-7 if options else 0.0):
        assert found["objectives"][0]["metrics"]["clip/any_document"] > 0
        assert {row["rank"] for row in found["documents"]} == ({0} if options else {0, 1})


def test_dump_has_what_the_step_was_made_of(run):
    code, output = run(
        *MOVING,
        "reference_checkpointer=${checkpointer}",
        "old_logps=recompute",
        "dump_every_n_steps=2",
    )
    assert code is None
    found = dump.read(output / "dumps" / "step_2.safetensors")
    assert len(found.microbatches) > 1
    for m in found.microbatches:
        labelled, rest = m.batch.loss_mask, ~m.batch.loss_mask
        for name in ("old_logps", "ref_logps", "sampler_logps"):
            logps = getattr(m.batch, name)
            assert (logps[labelled] < 0).all() and (logps[rest] == 0).all()
            assert not (logps == m.new_logps)[labelled].any()
        assert (
            m.batch.advantages.count_nonzero()
            == len(m.batch.ids)
            == (m.batch.label_counts > 0).sum()
        )
        assert (m.batch.temperature == 1).all() and m.batch.ids[0][0].startswith("train.jsonl:")
    metadata = found.metadata
    assert metadata["config"]["loss"]["clip_low"] == 0.03 and metadata["config"]["group_size"] == 2
    assert metadata["sampling"] == {"temperature": 1.0, "max_new_tokens": 10}
    assert metadata["seed"] == 0 and metadata["metrics"]["kl_ref"] > 0
    assert metadata["num_documents"] == sum(m.batch.num_documents for m in found.microbatches)


@pytest.mark.parametrize("most", [10, 3])
def test_quarantined_document_is_dumped_and_named(run, recipe, monkeypatch, capsys, most):
    monkeypatch.setattr("gspo.run.folder.MAX_SPOILED_DUMPS", most)
    prepare = recipe.Microbatch.prepare

    def spoil_the_first(batch, device, context):
        batch.old_logps[batch.loss_mask.nonzero()[0]] = math.inf
        return prepare(batch, device, context)

    monkeypatch.setattr(recipe.Microbatch, "prepare", spoil_the_first)
    code, output = run(*MOVING, "packing.tokens_per_microbatch=8192")  # dump_every_n_steps is 0
    assert code is None
    last = min(most, 4)
    for found in assert_as_logged(output, capsys, range(1, last + 1)):
        (row,) = found["quarantined"]
        assert row["not_finite"] == ["old_logps"] and row["prompt_id"].startswith("train.jsonl:")
        assert found["objectives"][0]["denominator"] == found["num_documents"] - 1
    replay_command.main([str(output / "dumps" / f"step_{last}.safetensors")])
    assert (
        f"quarantined, in no sum and no denominator: prompt {row['prompt_id']},"
        in capsys.readouterr().out
    )


def test_dumping_changes_nothing(run, tmp_path):
    found = []
    for every in (0, 1):
        code, output = run(
            *MOVING, f"output_dir={tmp_path / str(every)}", f"dump_every_n_steps={every}"
        )
        assert code is None
        found.append(
            [
                {k: row[k] for k in ("loss", "grad_norm", "kl_new_old")}
                for row in steps(tmp_path / str(every))
            ]
        )
    assert found[0] == found[1] and not (tmp_path / "0" / "dumps").exists()


def test_dumps_of_an_earlier_run_are_kept(run, tmp_path):
    (tmp_path / "out" / "dumps").mkdir(parents=True)
    (tmp_path / "out" / "dumps" / "step_2.safetensors").write_text("earlier")
    code, output = run("dump_every_n_steps=2")
    assert code is None
    assert (output / "dumps.1" / "step_2.safetensors").read_text() == "earlier"
    assert dump.read(output / "dumps" / "step_2.safetensors").metadata["step"] == 2
