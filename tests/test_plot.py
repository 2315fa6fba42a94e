import json

import pytest

from gspo.plot import PANELS, plot_run


@pytest.mark.parametrize("steps", [1, 3, 300])
def test_plot_draws_what_the_run_has(tmp_path, steps):
    pytest.importorskip("matplotlib")
    names = [name for panel in PANELS.values() for name in panel]
    records = [{"step": step, **{name: step / 7 for name in names}} for step in range(1, steps + 1)]
    records[0].pop("eval/accuracy")  # not every step has every metric
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    path = plot_run(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
