import json

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
