import json
import subprocess
import sys

import pytest

from gspo.run import plot


@pytest.mark.parametrize("steps", [1, 3, 300])
def test_plot_draws_what_the_run_has(tmp_path, monkeypatch, steps):
    pytest.importorskip("matplotlib")
    names = [name for panel in plot.PANELS.values() for name in panel]
    records = [{"step": step, **{name: step / 7 for name in names}} for step in range(1, steps + 1)]
    records[0].pop("eval/accuracy")  # not every step has every metric
    records = [{"step": 0, "eval/accuracy": 0.1}, *records]  # the evaluation before the first step
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    drawn, draw = {}, plot._draw

    def spy(axis, steps, values, *, label, color):
        drawn[label] = steps
        draw(axis, steps, values, label=label, color=color)

    monkeypatch.setattr(plot, "_draw", spy)
    path = plot.plot_run(tmp_path)
    assert drawn["eval/accuracy"] == [0, *range(2, steps + 1)] and drawn["entropy"] == [
        *range(1, steps + 1)
    ]
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metrics.jsonl; name a run's output_dir"),
        ('{"step": 1}\n{"step":\n', "metrics.jsonl:2: not JSON: Expecting value"),
        ("[1]\n", "metrics.jsonl:1: '[1]' is no row of a step"),
    ],
    ids=["no_run", "not_json", "no_row"],
)
def test_command_refuses_what_is_no_run(tmp_path, capsys, text, message):
    pytest.importorskip("matplotlib")
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(tmp_path)])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_module_draws_the_curves_of_a_folder(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": 0.5}\n')
    command = [sys.executable, "-m", "gspo.run.plot"]
    drawn = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert drawn.stdout == f"wrote {tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").is_file()
    nameless = subprocess.run(command, capture_output=True, text=True)
    assert nameless.returncode == 2
    assert "cpp extensions" not in nameless.stderr
    assert "usage: python -m gspo.run.plot" in nameless.stderr
