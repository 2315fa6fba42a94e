from types import SimpleNamespace

from gspo.run import RunFolder, TrainState
from gspo.run.folder import set_aside


def test_set_aside_keeps_every_earlier_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    set_aside(path)
    for run in ("first", "second"):
        path.write_text(run)
        set_aside(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.2.jsonl"]
    assert (tmp_path / "metrics.2.jsonl").read_text() == "second"


def test_files_of_ranks_that_are_no_more_are_set_aside(tmp_path):
    for name in (
        "completions_rank1",
        "completions_rank1.1",
        "quarantine_rank0",
        "quarantine_rank3",
    ):
        (tmp_path / f"{name}.jsonl").touch()
    cfg = SimpleNamespace(
        output_dir=str(tmp_path),
        checkpointer={},
        reference_checkpointer=None,
        adapter_path=None,
        metric_logger=None,
    )
    ranks = SimpleNamespace(is_first=True, rank=0, world_size=1)
    with RunFolder(cfg, ranks, TrainState()) as folder:
        folder.open()
    assert sorted(path.name for path in tmp_path.glob("*_rank*")) == [
        "completions_rank1.1.jsonl",
        "completions_rank1.2.jsonl",
        "quarantine_rank0.1.jsonl",
        "quarantine_rank3.1.jsonl",
    ]
