"""Nobody is left of a pool: real processes, looked at in /proc."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gspo.rewards import RewardPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

REWARDS = {"r": {"function": "tests.rewards.sample_rewards.leaves_a_program"}}
SECONDS = 20.0  # for what takes milliseconds on an idle machine
TRAINER = """
import sys
from gspo.rewards import RewardPool
pool = RewardPool({rewards!r}, num_workers=2, timeout=600)
item = ("p", sys.argv[1], None, {{"notes": sys.argv[2]}})
pool.score([item, item])
print("scored", flush=True)
sys.stdin.read()
"""


def runs(process):
    """Whether a process is there, and no zombie that waits for its parent."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


def noted(notes, num_lines):
    """The processes of so many calls: guard, worker and program of each."""
    wait_for(lambda: notes.exists() and notes.read_text().count("\n") == num_lines)
    return [int(word) for word in notes.read_text().split()]


def assert_all_end(processes):
    try:
        wait_for(lambda: not any(runs(process) for process in processes))
    finally:
        for process in processes:
            if runs(process) and process != os.getpid():
                os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("how", ["close", "die", "hang"])
def test_program_of_a_reward_ends_with_its_worker(tmp_path, how):
    notes = tmp_path / "notes"
    pool = RewardPool(REWARDS, num_workers=1, timeout=0.3)
    command = {"close": "one", "die": "die", "hang": "sleep_deaf"}[how]
    pool.score([("p", command, None, {"notes": str(notes)})])
    processes = noted(notes, 2 if how == "die" else 1)  # a call that dies is tried again
    if how == "close":
        assert all(runs(process) for process in processes)
        pool.close()
    assert_all_end(processes)
    pool.close()


@pytest.mark.parametrize("command", ["sleep_deaf", "one"], ids=["in_a_call", "idle"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nobody_outlives_the_trainer(tmp_path, number, command):
    notes = tmp_path / "notes"
    arguments = [sys.executable, "-c", TRAINER.format(rewards=REWARDS), command, str(notes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as trainer:
        processes = noted(notes, 2)
        if command == "one":
            assert trainer.stdout.readline() == "scored\n"
        assert all(runs(process) for process in processes)
        trainer.send_signal(number)
        errors = trainer.communicate(timeout=SECONDS)[1]
    assert_all_end(processes)
    expected = "KeyboardInterrupt" if number == signal.SIGINT else ""
    assert errors.strip().endswith(expected) and bool(errors) == bool(expected)


def test_terminal_of_the_trainer_does_not_reach_its_workers():
    pool = RewardPool({"r": {"function": "tests.rewards.sample_rewards.process_id"}})
    (worker,) = pool.score([("p", "c", None, {})]).totals
    assert os.getsid(int(worker)) != os.getsid(0)
    assert os.getpgid(int(worker)) == int(worker)
    pool.close()


def test_guard_that_is_killed_takes_its_worker_along():
    pool = RewardPool({"r": {"function": "tests.rewards.sample_rewards.process_id"}})
    guards = [worker.process for worker in pool._workers]
    (worker,) = pool.score([("p", "c", None, {})]).totals
    for guard in guards:
        guard.kill()
    assert_all_end([int(worker)])
    pool.close()


def test_worker_outlives_the_thread_that_started_it():
    pools = []
    thread = threading.Thread(target=lambda: pools.append(RewardPool(REWARDS, num_workers=1)))
    thread.start()
    thread.join()
    (pool,) = pools
    with pytest.raises(subprocess.TimeoutExpired):
        pool._workers[0].process.wait(0.5)
    pool.close()
