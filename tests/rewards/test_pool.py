import gc
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from gspo.errors import InputError
from gspo.rewards import RewardPool

HERE = "tests.rewards.sample_rewards"
BY_COMMAND = {"correct": {"function": f"{HERE}.by_command"}}


def make_pool(rewards, **knobs):
    pool = RewardPool(
        rewards, **{"num_workers": 2, "timeout": 0.3, "max_failure_share": 1, **knobs}
    )
    pool.warm()
    return pool


@pytest.fixture(scope="module")
def pool():
    """One pool for all tests of failures: it has to be as good after each."""
    pool = make_pool(BY_COMMAND)
    yield pool
    pool.close()


def items_of(*completions):
    return [("p", completion, None, {}) for completion in completions]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_items", [0, 1, 7, 65])
def test_scores_come_back_in_order(num_items, num_workers):
    rewards = {
        "plain": {"function": f"{HERE}.of_metadata"},
        "scaled": {"function": f"{HERE}.of_metadata", "weight": -0.5, "scale": 10},
    }
    pool = make_pool(rewards, num_workers=num_workers)
    result = pool.score([("p", "c", "a", {"value": i}) for i in range(num_items)])
    pool.close()
    assert result.rewards == [{"plain": i, "scaled": 10 * i} for i in range(num_items)]
    assert result.totals == [i - 5 * i for i in range(num_items)]
    assert result.failed == [False] * num_items
    assert result.failures == {"raised": 0, "timed_out": 0, "died": 0, "nonfinite": 0}


@pytest.mark.parametrize("how", ["close", "block", "shut"])
def test_a_reward_that_spoils_its_socket_prints_no_stack(capfd, how):
    pool = make_pool({"r": {"function": f"{HERE}.spoils_socket", "how": how}}, num_workers=1)
    pool.score(items_of("a"))
    pool.score(items_of("b"))
    pool.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_reward_gives_a_terminal_no_commands(caplog):
    pool = make_pool({"r": {"function": f"{HERE}.raises_commands"}})
    with caplog.at_level(logging.WARNING, logger="gspo.rewards.pool"):
        pool.score(items_of("a"))
    pool.close()
    (record,) = caplog.records
    assert r"ValueError: \x1b[2J\nred. The value is 0" in record.getMessage()


def test_function_gets_the_item_whole():
    pool = make_pool({"r": {"function": f"{HERE}.described"}})
    assert pool.score([("p", "c", "a", {"k": (1, 2)})]).totals == [1.0]
    pool.close()


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("raise", "raised"),
        ("exit", "raised"),
        ("none", "raised"),
        ("text", "raised"),
        ("nan", "nonfinite"),
        ("inf", "nonfinite"),
        ("sleep", "timed_out"),
        ("swallow", "timed_out"),
        ("tolerate", "timed_out"),
        ("backtrack", "timed_out"),
        ("sleep_deaf", "timed_out"),
        ("die", "died"),
        ("killed", "died"),
    ],
)
def test_failure_costs_its_own_call_only(pool, command, kind):
    completions = ["one", "half", "true"] * 6
    completions[5] = command
    result = pool.score(items_of(*completions))
    values = [1.0, 0.5, 1.0] * 6
    values[5] = 0.0
    assert result.totals == values
    assert result.failed == [i == 5 for i in range(18)]
    assert {k: n for k, n in result.failures.items() if n} == {kind: 1}


def test_several_culprits_are_each_found(pool):
    result = pool.score(items_of("die", "one", "die", "raise", "half", "killed", "one"))
    assert result.totals == [0, 1, 0, 0, 0.5, 0, 1]
    assert result.failures == {"raised": 1, "timed_out": 0, "died": 3, "nonfinite": 0}


def test_other_rewards_of_a_failed_item_count():
    rewards = {**BY_COMMAND, "value": {"function": f"{HERE}.of_metadata", "weight": 2.0}}
    pool = make_pool(rewards)
    result = pool.score([("p", "die", None, {"value": 3.0}), ("p", "one", None, {"value": 4.0})])
    pool.close()
    assert result.rewards == [{"correct": 0.0, "value": 3.0}, {"correct": 1.0, "value": 4.0}]
    assert result.totals == [6.0, 9.0]
    assert result.failed == [True, False]


def test_first_failure_of_a_kind_is_logged_with_its_cause(caplog):
    pool = make_pool(BY_COMMAND)
    with caplog.at_level(logging.WARNING, logger="gspo.rewards.pool"):
        pool.score(items_of("raise", "raise", "nan", "text"))
        pool.score(items_of("raise", "nan"))
    pool.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert f"rewards.correct: {HERE}.by_command raised: KeyError: 'no such thing'" in messages[0]
    assert "nonfinite: returned nan" in messages[1]


def test_failure_raises_where_asked():
    pool = make_pool(BY_COMMAND, on_failure="error")
    assert pool.score(items_of("one")).totals == [1.0]
    with pytest.raises(
        InputError,
        match="rewards.correct: .*by_command raised: KeyError.* on the completion 'raise'",
    ):
        pool.score(items_of("raise"))
    pool.close()


def test_interrupted_score_leaves_no_stale_answers(pool, monkeypatch):
    def interrupt(outcomes):
        raise KeyboardInterrupt

    pool.warm()  # so that both workers get a call
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.score(items_of("one", "slow"))
    assert pool.score(items_of("half", "half")).totals == [0.5, 0.5]


def test_worker_that_died_between_scores_is_replaced():
    pool = make_pool({"r": {"function": f"{HERE}.process_id"}}, num_workers=1)
    (first,) = pool.score(items_of("x")).totals
    assert first != os.getpid()
    os.kill(int(first), signal.SIGKILL)
    (second,) = pool.score(items_of("x")).totals
    pool.close()
    assert second not in (0.0, first)


def test_call_is_not_blamed_for_a_worker_that_was_dead_before(pool, monkeypatch):
    pool.warm()
    monkeypatch.setattr(
        pool, "_replace_unusable", lambda: None
    )  # as if it died right after that look
    pool._workers[0].process.kill()
    assert pool.score(items_of("half")).totals == [0.5]


def test_score_works_from_another_thread(pool):
    totals = []
    thread = threading.Thread(
        target=lambda: totals.extend(pool.score(items_of("one", "sleep", "die")).totals)
    )
    thread.start()
    thread.join()
    assert totals == [1.0, 0.0, 0.0]


def test_workers_do_not_load_torch():
    library = {
        "exact": {"function": "gspo.rewards.exact_match"},
        "math": {"function": "gspo.rewards.math_verify"},
        "gym": {"function": "gspo.rewards.reasoning_gym"},
        "format": {"function": "gspo.rewards.regex_match", "pattern": "."},
        "length": {
            "function": "gspo.rewards.overlong_penalty",
            "max_tokens": 4,
            "buffer_tokens": 2,
        },
    }
    pool = make_pool(
        {**library, "loaded": {"function": f"{HERE}.torch_is_loaded"}}, num_workers=1, timeout=10
    )
    result = pool.score([("p", "4", "4", {"num_tokens": 3})])
    pool.close()
    assert result.rewards[0]["math"] == 1.0
    assert result.rewards[0]["loaded"] == 0.0


def test_workers_do_not_run_the_main_script(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "print('main script runs')\n"  # unguarded, on purpose
        "from gspo.rewards import RewardPool\n"
        "pool = RewardPool({'r': {'function': 'my_file.reward'}}, num_workers=2)\n"
        "print(pool.score([('p', 'c', None, {})]).totals, 'torch' in sys.modules)\n"  # and no close
    )
    (tmp_path / "my_file.py").write_text(
        "def reward(prompt, completion, answer, metadata):\n    return 0.25\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [
        sys.executable,
        "-P",
        str(script),
    ]  # -P: the current directory is not on the path by itself
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("main script runs\n[0.25] False\n", "")


@pytest.mark.parametrize("how", ["close", "forget"])
def test_closing_ends_the_processes(how):
    pool = make_pool(BY_COMMAND)
    processes = [worker.process for worker in pool._workers]
    if how == "close":
        pool.close()
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            pool.score(items_of("one"))
    else:
        del pool
        gc.collect()
    assert all(process.returncode is not None for process in processes)


def test_full_reward_is_what_can_be_gained():
    rewards = {
        "correct": {"function": "gspo.rewards.exact_match", "weight": 2.0},
        "length": {
            "function": "gspo.rewards.overlong_penalty",
            "max_tokens": 4,
            "buffer_tokens": 2,
        },
        "repeats": {"function": f"{HERE}.of_metadata", "weight": -1.0},
    }
    pool = make_pool(rewards)
    assert pool.full_reward == 2.0
    pool.close()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "rewards: there is none"),
        (["gspo.rewards.exact_match"], r"rewards: .* must be a mapping of names to rewards"),
        ("gspo.rewards.exact_match", r"rewards: .* must be a mapping of names to rewards"),
        ({"r": {"weight": 1.0}}, r"rewards\.r: .* needs a function"),
        ({"r": "gspo.rewards.exact_match"}, r"rewards\.r: .* needs a function"),
        ({"r": {"function": "reward"}}, r"rewards\.r\.function: 'reward' is not a dotted path"),
        (
            {"r": {"function": "no_such_file.reward"}},
            r"rewards\.r\.function: 'no_such_file.reward' .*No module named 'no_such_file'; "
            rf"looked in {os.getcwd()}: run from the file's fo",
        ),
        (
            {"r": {"function": "gspo.rewards.exact_mach"}},
            r"rewards\.r\.function: .*did you mean 'exact_match'",
        ),
        (
            {"r": {"function": f"{HERE}.COMMANDS"}},
            r"rewards\.r\.function: .* is a dict, not a function",
        ),
        (
            {"r": {"function": f"{HERE}.takes_two"}},
            r"rewards\.r\.function: .* must take \(prompt, completion, answer",
        ),
        (
            {"r": {"function": f"{HERE}.needs_an_option"}},
            r"rewards\.r\.threshold: .* needs this option",
        ),
        (
            {"r": {"function": "gspo.rewards.exact_match", "maker": "#"}},
            r"rewards\.r\.maker: .*did you mean 'marker'",
        ),
        (
            {"r": {"function": "gspo.rewards.exact_match", "answer": "#"}},
            r"rewards\.r\.answer: .*has no such option",
        ),
        (
            {"r": {"function": "gspo.rewards.exact_match", "weight": "1"}},
            r"rewards\.r\.weight: '1' must be a finite",
        ),
        (
            {"r": {"function": "gspo.rewards.exact_match", "weight": float("nan")}},
            r"rewards\.r\.weight: nan must be",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_reward_names_its_key(rewards, message):
    with pytest.raises(InputError, match=message):
        RewardPool(rewards)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_workers": 0}, "^reward_pool.num_workers: 0 must be a whole number of 1 or more"),
        ({"num_workers": True}, "^reward_pool.num_workers: True must be a whole number"),
        ({"num_workers": 1.5}, "^reward_pool.num_workers: 1.5 must be a whole number"),
        ({"timeout": 0}, "^reward_pool.timeout: 0"),
        ({"timeout": float("inf")}, "^reward_pool.timeout: inf"),
        ({"timeout": 1e300}, "^reward_pool.timeout: 1e.300 must .* up to 86,400"),
        ({"timeout": 10**400}, "^reward_pool.timeout: 1000"),
        ({"max_failure_share": 1.5}, "^reward_pool.max_failure_share: 1.5 must be a share from 0"),
        ({"on_failure": "nan"}, "^reward_pool.on_failure: 'nan' must be 'zero' or 'error'"),
    ],
    ids=[
        "no_workers",
        "true_workers",
        "half_a_worker",
        "no_timeout",
        "infinite_timeout",
        "endless_timeout",
        "timeout_beyond_floats",
        "share_above_one",
        "on_failure",
    ],
)
def test_bad_knob_names_its_key(knobs, message):
    with pytest.raises(InputError, match=message):
        RewardPool(BY_COMMAND, **knobs)


REWARD = "def reward(prompt, completion, answer, metadata):\n    return 1.0\n"


def write_module(folder, monkeypatch, text):
    (folder / "own_reward.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise ImportError('no GPU library')", "ImportError: no GPU library"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("import os; os._exit(3)", "its process ended with exit code 3; see what `import own_"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with exit code 137; see"),
    ],
    ids=["import_error", "system_exit", "interrupt", "exit", "killed"],
)
def test_import_that_fails_names_its_reward(tmp_path, monkeypatch, statement, message):
    write_module(tmp_path, monkeypatch, f"{statement}\n{REWARD}")
    rewards = {**BY_COMMAND, "bad": {"function": "own_reward.reward"}}
    with pytest.raises(InputError) as caught:
        RewardPool(rewards)
    beginning = "rewards.bad.function: 'own_reward.reward' cannot be imported: "
    assert str(caught.value).startswith(f"{beginning}{message}")


def test_worker_that_cannot_start_later_is_an_error_and_no_hang(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, REWARD)
    pool = make_pool({"r": {"function": "own_reward.reward"}})
    assert pool.score(items_of("x")).totals == [1.0]
    (tmp_path / "own_reward.py").write_text("import os; os._exit(3)")
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()
    with pytest.raises(InputError, match="rewards.r.function: .* its process ended with exit code"):
        pool.score(items_of("x"))
    pool.close()


def test_trainer_does_not_import_a_reward(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, f"{REWARD}reward.max_value = 2.5\n")
    pool = make_pool({"r": {"function": "own_reward.reward", "weight": 2}})
    assert pool.full_reward == 5.0
    pool.close()
    assert "own_reward" not in sys.modules


FAIL, PASS = ["raise"], ["one"]


@pytest.mark.parametrize(
    ("knobs", "scores", "message"),
    [
        ({}, [5 * FAIL + 4 * PASS], "5 of its last 9 calls have failed (56%)"),
        ({}, [4 * FAIL + 4 * PASS] * 3, ""),
        ({}, [7 * FAIL], ""),
        ({}, [7 * FAIL, FAIL], "8 of its last 8"),
        ({}, [FAIL, FAIL, FAIL, FAIL, FAIL, FAIL, FAIL, FAIL], "8 of its last 8"),
        (
            {},
            [9 * PASS] * 5 + [9 * FAIL, [], 9 * FAIL],
            "18 of its last 27 calls have failed (67%)",
        ),
        ({}, [9 * FAIL], "than reward_pool.max_failure_share (0.5) allows; the first raised: Key"),
        ({"max_failure_share": 0}, [8 * PASS, FAIL], "1 of its last 9"),
        ({"max_failure_share": 1}, [9 * FAIL] * 3, ""),
    ],
    ids=[
        "more_than_half",
        "half",
        "few",
        "few_and_one",
        "one_by_one",
        "only_the_last_count",
        "cause",
        "none_allowed",
        "all_allowed",
    ],
)
def test_reward_that_fails_too_often_is_an_error(knobs, scores, message):
    rewards = {**BY_COMMAND, "half": {"function": "gspo.rewards.regex_match", "pattern": "."}}
    pool = make_pool(rewards, num_workers=1, **{"max_failure_share": 0.5, **knobs})
    *before, last = [items_of(*completions) for completions in scores]
    for items in before:
        pool.score(items)
    if message:
        with pytest.raises(InputError) as caught:
            pool.score(last)
        assert str(caught.value).startswith("rewards.correct: ")
        assert message in str(caught.value)
    else:
        pool.score(last)
    pool.close()


@pytest.mark.parametrize("max_value", ["float('nan')", "float('inf')", "'1'", "True", "None"])
def test_max_value_is_a_finite_number(tmp_path, monkeypatch, max_value):
    write_module(tmp_path, monkeypatch, f"{REWARD}reward.max_value = {max_value}\n")
    with pytest.raises(InputError, match="rewards.r.function: .* has a max_value of .* finite"):
        RewardPool({"r": {"function": "own_reward.reward"}}, num_workers=1)


@pytest.mark.parametrize("name", ["mean", "std", "a/b", "", " ", 7, None])
def test_name_that_no_metric_can_have_is_refused(name):
    with pytest.raises(InputError, match="^rewards: .* must not name a reward"):
        RewardPool({name: {"function": "gspo.rewards.exact_match"}})


def test_child_that_a_reward_forks_does_not_answer(pool):
    assert pool.score(items_of("one", "fork", "half", "fork")).totals == [1.0, 0.25, 0.5, 0.25]


def test_program_that_a_reward_starts_cannot_write_to_the_pool(pool):
    # Where it could, the pool would take what it writes for an answer. 1.0: it found no socket.
    assert pool.score(items_of("program_looks_for_sockets", "half")).totals == [1.0, 0.5]


def test_no_pickle_from_a_worker_is_loaded(tmp_path, pool):
    marker = tmp_path / "ran"
    result = pool.score([("p", "write_pickle", None, {"marker": str(marker)}), *items_of("half")])
    assert result.totals == [0.0, 0.5]
    assert result.failures["died"] == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "command",
    [
        "write_stray_bytes",
        "write_half_a_line",
        "write_wrong_answer",
        "write_huge_number",
        "write_for_ever",
    ],
)
def test_what_is_no_answer_costs_its_own_call_only(pool, command):
    result = pool.score(items_of("half", command, "one"))
    assert result.totals == [0.5, 0.0, 1.0]
    assert sum(result.failures.values()) == 1
