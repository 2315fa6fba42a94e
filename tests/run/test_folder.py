import json
import math

from gspo.run.folder import append_jsonl, set_aside


def test_jsonl_grows_by_a_line_and_writes_null_for_what_json_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_jsonl(path, [{"step": step, "loss": math.nan, "high": math.inf, "text": "ü"}])
    first, second = path.read_text().splitlines()
    assert json.loads(first) == {"step": 1, "loss": None, "high": None, "text": "ü"}
    assert json.loads(second)["step"] == 2


def test_set_aside_keeps_every_earlier_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    set_aside(path)
    for run in ("first", "second"):
        path.write_text(run)
        set_aside(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.2.jsonl"]
    assert (tmp_path / "metrics.2.jsonl").read_text() == "second"
