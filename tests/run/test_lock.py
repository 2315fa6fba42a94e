import socket
import subprocess
import sys

import pytest

from gspo.errors import InputError
from gspo.run.lock import FolderLock

HOLD = """
import sys
from pathlib import Path
from gspo.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_lock_of_another_run_is_named_and_ends_with_it(tmp_path, other_run):
    with pytest.raises(InputError) as refused:
        FolderLock(tmp_path)
    assert str(refused.value) == (
        f"output_dir: '{tmp_path}' is in use by another run: process {other_run.pid} on "
        f"{socket.gethostname()}; wait for it, end it, or set another output_dir"
    )
    other_run.kill()  # leaves its file behind
    other_run.wait()
    FolderLock(tmp_path).release()


def test_released_lock_can_be_taken(tmp_path):
    lock = FolderLock(tmp_path)
    lock.release()
    lock.release()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, capture_output=True)
