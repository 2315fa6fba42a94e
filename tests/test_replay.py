"""A step scored again: numbers by hand, the command line and what it writes."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gspo.commands import replay as replay_command
from gspo.data.layout import Document, pack_documents
from gspo.run import dump
from gspo.run.dump import Dump, DumpedMicrobatch

CONFIG = {
    "docs_per_step": 8,
    "sampling": {"max_new_tokens": 5},
    "advantages": {"estimator": "group_mean_std"},
    "loss": {"_component_": "gspo.losses.GSPOLoss", "clip_low": 0.2, "clip_high": 0.2},
}
# prompt, its length in tokens, advantage, log-ratio of every token
LONG, SHORT, LOWERED, QUIET = (
    ("a", 100, 1.0, 0.0),
    ("b", 4, 2.0, 0.5),
    ("c", 4, -1.0, -0.5),
    ("d", 4, -3.0, 0.5),
)


def microbatch(*documents, rank=0, bin_length=512):
    made = [
        Document([1] * (2 + n), 2, [-1.0] * n, advantage, 0.5, 1.0, 3, prompt, i)
        for i, (prompt, n, advantage, _) in enumerate(documents)
    ]
    batch = pack_documents(made, bin_length, share_prompts=False)
    log_ratio = torch.tensor([*(ratio for *_, ratio in documents), 0.0])[batch.document_index]
    return DumpedMicrobatch(
        rank, batch, torch.where(batch.loss_mask, batch.old_logps + log_ratio, 0.0)
    )


def step(*microbatches, **changes):
    rows = [row for m in microbatches for row in m.batch.label_counts.tolist() if row]
    counts = {"num_documents": len(rows), "num_label_tokens": sum(rows)}
    known = {
        "step": 7,
        **counts,
        "sampling": {"temperature": 1.0},
        "seed": 3,
        "config": CONFIG,
        "metrics": {},
    }
    return Dump(list(microbatches), known | changes)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "dumps" / "step_7.safetensors"
    dump.write(path, step(microbatch(LONG, SHORT), microbatch(LOWERED, QUIET, rank=1)))
    return path


def answer(capsys, path, *arguments):
    replay_command.main([str(path), *arguments, "--json", "-"])
    return json.loads(capsys.readouterr().out)


def test_gspo_by_hand(capsys, path):
    found = answer(capsys, path)
    (objective,) = found["objectives"]
    e = math.exp(0.5)
    assert objective["denominator"] == 4
    assert objective["metrics"]["loss"] == pytest.approx(
        (-1.0 - 1.2 * 2 + 0.8 * 1 + 3 * e) / 4, rel=1e-6
    )
    assert objective["clip"]["documents"] == {
        **{"any": 0.75, "any_low": 0.25, "any_high": 0.5},
        **{"binding": 0.5, "binding_low": 0.25, "binding_high": 0.25},
    }
    assert objective["clip"]["tokens"]["any_high"] == pytest.approx(8 / 112)
    assert objective["clip"]["tokens"]["binding"] == pytest.approx(8 / 112)
    short, middle, *longer = objective["by_length"]
    assert [(row["documents"], row["tokens"]) for row in (short, middle, *longer)] == [
        (3, 12),
        (1, 100),
        (0, 0),
        (0, 0),
    ]
    assert short["clip"]["documents"]["any"] == 1 and middle["clip"]["documents"]["any"] == 0
    assert short["clip"]["tokens"]["binding_low"] == pytest.approx(1 / 3)
    quiet, long = (
        3 * e / (3 * e + 1),
        1 / (3 * e + 1),
    )  # the gradient of s A by all tokens of a document is s A
    assert short["gradient"] == pytest.approx(quiet, rel=1e-5) and middle[
        "gradient"
    ] == pytest.approx(long, rel=1e-5)
    first, second, *rest = found["documents"]
    assert (first["prompt_id"], first["rank"], first["length"], first["advantage"]) == (
        "d",
        1,
        4,
        -3.0,
    )
    assert (
        first["mean_log_ratio"] == pytest.approx(0.5)
        and first["policy_version"] == 3
        and first["reward"] == 0.5
    )
    assert first["objectives"][0]["ratio"] == pytest.approx(e)
    assert first["objectives"][0]["clipped_tokens"]["any_high"] == 4 and second["prompt_id"] == "a"
    assert [d["objectives"][0]["gradient"] for d in rest] == [0, 0]


def test_grpo_clips_tokens(capsys, tmp_path):
    m = microbatch(("a", 4, 1.0, 0.0), ("b", 2, -1.0, 0.0))
    first, last = m.batch.loss_mask.nonzero().squeeze(-1)[[0, -1]]
    m.new_logps[first] += 1.0  # above with A > 0: its gradient stops
    m.new_logps[last] += 1.0  # above with A < 0: it does not
    dump.write(tmp_path / "a", step(m))
    found = answer(capsys, tmp_path / "a", "--preset", "grpo")
    (objective,) = found["objectives"]
    assert (
        objective["clip"]["documents"]["any"] == 1
        and objective["clip"]["documents"]["binding"] == 0.5
    )
    assert objective["clip"]["tokens"]["any"] == pytest.approx(2 / 6)
    assert objective["clip"]["tokens"]["binding_high"] == pytest.approx(1 / 6)
    by_prompt = {d["prompt_id"]: d["objectives"][0] for d in found["documents"]}
    total = 3 / 4 + (1 + math.e) / 2
    assert by_prompt["a"]["gradient"] == pytest.approx(3 / 4 / total)
    assert by_prompt["a"]["ratio"] == pytest.approx((3 + math.e) / 4)
    assert (
        by_prompt["b"]["clipped_tokens"]["any"] == 1
        and by_prompt["b"]["clipped_tokens"]["binding"] == 0
    )


def test_dropped_documents_stay_in_the_denominators(capsys, tmp_path):
    dump.write(tmp_path / "a", step(microbatch(LONG), num_documents=5, num_label_tokens=500))
    of_documents, of_tokens = answer(capsys, tmp_path / "a", "--against", "dapo")["objectives"]
    assert (of_documents["denominator"], of_tokens["denominator"]) == (5, 500)
    assert of_documents["metrics"]["loss"] == of_tokens["metrics"]["loss"] == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("arguments", "denominator"),
    [(["--preset", "pipelinerl"], 8), (["--preset", "dr_grpo"], 20), (["--preset", "luspo"], 4)],
    ids=["docs_per_step", "max_new_tokens", "documents"],
)
def test_presets_refer_to_the_runs_config(capsys, path, arguments, denominator):
    assert answer(capsys, path, *arguments)["objectives"][0]["denominator"] == denominator


def test_overrides_change_the_objective(capsys, path):
    arguments = (
        "loss.clip_high=null",
        "loss.aggregation=token",
        "~loss.clip_low",
        "--against",
        "gspo",
    )
    first, second = answer(capsys, path, *arguments)["objectives"]
    assert (
        first["name"] == "run loss.clip_high=null loss.aggregation=token ~loss.clip_low"
        and second["name"] == "gspo"
    )
    assert first["loss"] == {
        "_component_": "gspo.losses.GSPOLoss",
        "clip_high": None,
        "aggregation": "token",
    }
    assert first["clip"]["documents"]["any_high"] == 0 < first["clip"]["documents"]["any_low"]
    assert first["denominator"] == 112 and second["loss"]["clip_low"] == 3e-4


def test_quarantined_document_is_named_and_in_no_sum(capsys, tmp_path):
    spoiled = microbatch(LONG, SHORT)
    spoiled.batch.old_logps[spoiled.batch.loss_mask.nonzero()[-1]] = math.inf
    dump.write(tmp_path / "spoiled", step(spoiled))
    dump.write(tmp_path / "without", step(microbatch(LONG)))
    found, wanted = (answer(capsys, tmp_path / name) for name in ("spoiled", "without"))
    (row,) = found["quarantined"]
    assert (
        row["prompt_id"] == "b"
        and row["not_finite"] == ["old_logps"]
        and row["mean_log_ratio"] is None
    )
    assert wanted["quarantined"] == []
    a, b = (of["objectives"][0] for of in (found, wanted))
    assert (
        a["metrics"].pop("quarantined_documents") == 1
        and b["metrics"].pop("quarantined_documents") == 0
    )
    assert (a["denominator"], a["metrics"], a["clip"], a["by_length"]) == (
        *(b["denominator"], b["metrics"], b["clip"], b["by_length"]),
    )
    replay_command.main([str(tmp_path / "spoiled")])
    text = capsys.readouterr().out
    assert (
        "quarantined, in no sum and no denominator: prompt b, group 1, rank 0, "
        "not finite: old_logps\n" in text
    )


def test_loss_of_the_users_own_has_a_gradient_but_no_clips(capsys, tmp_path):
    config = CONFIG | {"loss": {"_component_": "tests.recipes.own_loss.OwnLoss"}}
    dump.write(tmp_path / "a", step(microbatch(LONG, SHORT), config=config))
    own = "loss._component_=tests.recipes.own_loss.OwnLoss"
    found = answer(capsys, tmp_path / "a", own)
    (objective,) = found["objectives"]
    assert objective["clip"] is None and objective["by_length"][0]["clip"] is None
    assert sum(row["gradient"] for row in objective["by_length"]) == pytest.approx(1)
    assert found["documents"][0]["objectives"][0]["clipped_tokens"] is None
    replay_command.main([str(tmp_path / "a"), own])


HOSTILE = {
    "system": (
        {"loss": {"_component_": "os.system", "command": "mkdir MARKER"}},
        "config.loss._component_: 'os.system'",
    ),
    "own_loss": (
        {"loss": {"_component_": "hostile_module.Loss"}},
        "config.loss._component_: 'hostile_module.Loss' of",
    ),
    "losses_import": (
        {"loss": {"_component_": "gspo.losses.math.exp"}},
        "config.loss._component_: 'gspo.losses.math",
    ),
    "nested": (
        {
            "loss": {
                "_component_": "gspo.losses.GSPOLoss",
                "clip_low": {"_component_": "os.mkdir", "path": "MARKER"},
            }
        },
        "config.loss.clip_low._component_: 'os.mkdir' may not stand in a file",
    ),
    "environment": (
        {"loss": {"_component_": "gspo.losses.GSPOLoss", "aggregation": "${oc.env:SECRET}"}},
        "config.loss.aggregation: '${oc.env:SECRET}' has an interpolation",
    ),
    "component_of_environment": (
        {"loss": {"_component_": "${oc.env:SECRET}"}},
        "config.loss._component_: '${oc.env",
    ),
    "sampling": (
        {"sampling": {"max_new_tokens": "${oc.env:SECRET}"}},
        "config.sampling.max_new_tokens: '${oc.env",
    ),
    "docs": (
        {"docs_per_step": "${oc.env:SECRET}"},
        "config.docs_per_step: '${oc.env:SECRET}' has an interpolation",
    ),
    "estimator": ({"advantages": {}}, "config.advantages: {} of the file has no estimator"),
    "text": ({"loss": "os.system"}, "config.loss._component_: None of the file is no objective"),
}


HOSTILE["deep"] = (
    {"loss": CONFIG["loss"] | {"clip_low": json.loads("[" * 300 + "]" * 300)}},
    "[]]]]]]... is nested more than 20 deep; dump the step again".replace("[]]]]]]", "[[[["),
)


@pytest.mark.parametrize(("config", "message"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("arguments", [(), ("--preset", "pipelinerl")], ids=["own", "preset"])
def test_no_code_runs_from_a_file(capsys, tmp_path, monkeypatch, config, message, arguments):
    marker = tmp_path / "marker"
    config = json.loads(json.dumps(config).replace("MARKER", str(marker)))
    (tmp_path / "hostile_module.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nclass Loss: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SECRET", "gspo.losses.GSPOLoss")
    dump.write(tmp_path / "a", step(microbatch(LONG), config=CONFIG | config))
    if not arguments or "loss" not in config:
        with pytest.raises(SystemExit):
            replay_command.main([str(tmp_path / "a"), *arguments])
        assert message in capsys.readouterr().err
    else:  # the preset stands in the place of what the file names
        replay_command.main([str(tmp_path / "a"), *arguments])
    assert not marker.exists()


def test_texts_of_a_file_give_a_terminal_no_commands(capsys, tmp_path):
    named = replace(microbatch(LONG).batch, ids=[("\x1b[2J\ud800\nno", 1)])
    metrics = {"a\x1b[2J\nb": 1.0}
    dumped = DumpedMicrobatch(0, named, microbatch(LONG).new_logps)
    dump.write(tmp_path / "a", step(dumped, metrics=metrics))
    replay_command.main([str(tmp_path / "a")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2J\\ud800\\nno" in shown


def test_a_segment_in_two_documents_is_one_message(capsys, tmp_path):
    cut = microbatch(LONG, SHORT).batch
    cut = replace(cut, segment_index=torch.zeros_like(cut.document_index))
    dump.write(tmp_path / "a", step(DumpedMicrobatch(0, cut, cut.old_logps)))
    with pytest.raises(SystemExit):
        replay_command.main([str(tmp_path / "a")])
    message = "error: segment_index: ValueError: segment_index: a segment lies in two documents"
    assert capsys.readouterr().err.startswith(message)


def test_top_shows_the_largest_shares(capsys, path):
    rows = answer(capsys, path, "--top", "2", "--preset", "luspo")["documents"]
    assert [row["prompt_id"] for row in rows] == ["a", "d"]  # here a document weighs its tokens


def test_json_has_these_keys(capsys, path, tmp_path):
    found = answer(capsys, path, "--against", "grpo")
    assert found.keys() == {
        *("file", "step", "num_documents", "num_label_tokens", "sampling", "seed", "advantages"),
        *(
            "documents_in_file",
            "tokens_in_file",
            "logged",
            "quarantined",
            "objectives",
            "documents",
        ),
    }
    for objective in found["objectives"]:
        assert objective.keys() == {
            "name",
            "loss",
            "advantages",
            "denominator",
            "metrics",
            "clip",
            "by_length",
        }
        assert {"loss", "clip/any_document", "ratio/ess"} <= objective["metrics"].keys()
        assert "entropy" not in objective["metrics"]  # which the file does not have
        assert objective["clip"].keys() == {"documents", "tokens"}
        assert [row["length"] for row in objective["by_length"]] == [
            "1-64",
            "65-256",
            "257-1024",
            ">1024",
        ]
        assert all(
            row.keys() == {"length", "documents", "tokens", "gradient", "clip"}
            for row in objective["by_length"]
        )
    for row in found["documents"]:
        assert row.keys() == {
            *(
                "prompt_id",
                "group_id",
                "rank",
                "policy_version",
                "length",
                "advantage",
                "reward",
                "mean_log_ratio",
            ),
            *("not_finite", "objectives"),
        }
        assert [o.keys() for o in row["objectives"]] == [
            {"ratio", "clipped_tokens", "gradient"}
        ] * 2
    replay_command.main([str(path), "--against", "grpo", "--json", str(tmp_path / "found.json")])
    assert (
        json.loads((tmp_path / "found.json").read_text()) == found and not capsys.readouterr().out
    )


def test_report_shows_two_objectives_next_to_each_other(capsys, path):
    replay_command.main([str(path), "--preset", "dr_grpo", "--against", "luspo"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["logged", "dr_grpo", "luspo"] in lines
    assert "with the file's advantages (group_mean_std), not its own (group_mean)".split() in lines
    (row,) = [line for line in lines if line[:2] == ["c", "0"]]
    assert row == [
        "c",
        "0",
        "4",
        "-1",
        "0.5",
        "-0.5",
        "0.606531",
        "low",
        "0.0000",
        "0.606531",
        "low",
        "0.0000",
    ]
    (row,) = [line for line in lines if line[:2] == ["d", "1"]]
    assert row[7] == row[10] == "outside"


def test_command_prints_one_json_object(path):
    command = [sys.executable, "-m", "gspo", "replay", str(path), "--json", "-"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert json.loads(found.stdout)["step"] == 7 and found.stdout.count("\n") == 1, found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpso"], "preset: 'gpso' is not known; did you mean"),
        (["--against", "gpso"], "preset: 'gpso' is not known; did you mean"),
        (
            ["loss.clip_hihg=3"],
            "loss.clip_hihg: unknown, GSPOLoss takes no such argument; did you mean 'clip_high'",
        ),
        (["loss.clip_high=wide"], "loss.clip_high: 'wide' is no number, as GSPOLoss takes"),
        (["loss.clip_low=3"], "loss.clip_low: 3 must lie in [0, 1], or be null"),
        (
            ["loss.clip_low"],
            "overrides: ValueError: Command-line overrides must be in the form of key=value",
        ),
        (
            ["loss.clip_low=???"],
            "loss.clip_low: '???' has the mark for a missing value; give a value, or leave it out",
        ),
        (
            ["optimizer.lr=3"],
            "optimizer.lr: 'optimizer.lr=3' is not a key of the objective; change the objective",
        ),
        (
            ["loss=gspo.losses.SegmentLoss"],
            "segments: the objective has a ratio per segment, but the documents have none",
        ),
        (
            ["loss.kl_coef=0.1"],
            "loss.kl_coef: 0.1 needs ref_logps, which the file lacks; drop it with ~loss.kl_coef",
        ),
        (
            ["loss.entropy_coef=0.1"],
            "loss.entropy_coef: 0.1 needs entropies, which the file lacks; drop it",
        ),
        (
            ["loss.correction=sequence_geometric"],
            "loss.correction: 'sequence_geometric' needs sampler_logps, which",
        ),
        (["--top", "-1"], "--top: -1 must be 0 or more"),
        (
            ["--json", "no/folder/a.json"],
            "--json: 'no/folder/a.json' cannot be written: No such file",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_message(capsys, path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        replay_command.main([str(path), *arguments])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_gradient_that_is_not_finite_leaves_its_cells_empty(capsys, tmp_path):
    m = microbatch(LONG, SHORT)
    m.batch.ref_logps = m.new_logps + 200.0  # k3 overflows
    path = tmp_path / "dumps" / "step_7.safetensors"
    dump.write(path, step(m))
    replay_command.main([str(path), "loss.kl_coef=0.1"])
    shown = capsys.readouterr().out
    assert "run loss.kl_coef=0.1: gradient" in shown and "nan" not in shown and "inf" not in shown


def test_reference_corrections_and_segments_are_scored(capsys, tmp_path):
    m = microbatch(("a", 4, 1.0, 0.0), ("b", 2, -1.0, 0.0))
    batch = replace(
        m.batch,
        ref_logps=m.batch.old_logps - 0.3,
        sampler_logps=torch.where(m.batch.loss_mask, m.batch.old_logps - math.log(1.5), 0.0),
        segment_index=torch.arange(m.batch.tokens.numel()),
        segment_advantages=torch.full((m.batch.tokens.numel(),), 2.0),
    )
    dump.write(tmp_path / "a", step(replace(m, batch=batch)))
    options = ("loss.kl_coef=0.1", "loss.kl_estimator=k1", "loss.correction=sequence_geometric")
    (plain,) = answer(capsys, tmp_path / "a", "loss=gspo.losses.SegmentLoss")["objectives"]
    assert plain["metrics"]["loss"] == pytest.approx(
        -2.0
    )  # all segments have a ratio of 1 and an advantage of 2
    (found,) = answer(capsys, tmp_path / "a", "loss=gspo.losses.SegmentLoss", *options)[
        "objectives"
    ]
    assert found["metrics"]["loss"] == pytest.approx(-1.5 * 2.0 + 0.1 * 0.3, rel=1e-6)
    assert found["metrics"]["kl_ref"] == pytest.approx(0.3, rel=1e-6)
