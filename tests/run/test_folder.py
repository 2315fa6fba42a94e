from gspo.run.folder import set_aside


def test_set_aside_keeps_every_earlier_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    set_aside(path)
    for run in ("first", "second"):
        path.write_text(run)
        set_aside(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.2.jsonl"]
    assert (tmp_path / "metrics.2.jsonl").read_text() == "second"
