import errno
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gspo.run import rows as rows_module
from gspo.run.rows import RowFile


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes the first characters of a text and no more, while ``is_full`` holds."""
    disk = {"is_full": True}
    open_plain = Path.open

    def open_full(self, mode="r", **options):
        file = open_plain(self, mode, **options)
        if mode == "a" and disk["is_full"]:
            write = file.write

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(self, text):
                    write(text[:5])
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Full()
        return file

    monkeypatch.setattr(Path, "open", open_full)
    return disk


@pytest.fixture
def warnings(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_grow_by_a_line_and_have_null_for_what_json_lacks(tmp_path):
    file = RowFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append([{"step": step, "loss": math.nan, "high": math.inf, "text": "ü"}])
    file.append([{"step": 3, "rewards": {"mine": math.nan}, "list": [1, -math.inf]}])
    first, second, third = read(file.path)
    assert first == {"step": 1, "loss": None, "high": None, "text": "ü"}
    assert second["step"] == 2
    assert third == {"step": 3, "rewards": {"mine": None}, "list": [1, None]}


def test_rows_wait_for_a_full_disk_with_one_warning(tmp_path, full_disk, warnings):
    file = RowFile(tmp_path / "metrics.jsonl")
    full_disk["is_full"] = False
    file.append([{"step": 0}])
    full_disk["is_full"] = True
    for step in (1, 2):
        file.append([{"step": step}])
    assert read(file.path) == [{"step": 0}]  # no half a row
    full_disk["is_full"] = False
    file.append([{"step": 3}])
    assert [row["step"] for row in read(file.path)] == [0, 1, 2, 3]
    file.close()
    (message,) = warnings()
    assert message.startswith(f"{file.path} could not be written: [Errno 28] No space left")


def test_rows_that_never_fit_are_counted(tmp_path, full_disk, warnings, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_WAITING", 3)
    file = RowFile(tmp_path / "metrics.jsonl")
    for step in range(5):
        file.append([{"step": step}])
    full_disk["is_full"] = False
    file.append([{"step": 5}])
    assert [row["step"] for row in read(file.path)] == [2, 3, 4, 5]
    file.close()
    assert warnings()[-1] == f"{file.path} lacks 2 rows, which could not be written."


def test_threads_lose_and_repeat_no_row(tmp_path, monkeypatch):
    write = rows_module._append

    def slowly(path, text):
        time.sleep(0.01)
        write(path, text)

    monkeypatch.setattr(rows_module, "_append", slowly)
    file = RowFile(tmp_path / "quarantine_rank0.jsonl")
    with ThreadPoolExecutor(4) as threads:
        for number in range(12):
            threads.submit(file.append, [{"row": number}])
    numbers = [row["row"] for row in read(file.path)]
    assert sorted(numbers) == list(range(12))
