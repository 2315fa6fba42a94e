import logging

import pytest
import reasoning_gym as gym

from gspo.errors import InputError
from gspo.rewards import exact_match, math_verify, overlong_penalty, reasoning_gym, regex_match


@pytest.mark.parametrize(
    ("completion", "answer", "options", "value"),
    [
        (" 42\n", "42", {}, 1),
        ("42.", "42", {}, 0),
        ("so\n#### 42\nbye", "42", {"marker": "####"}, 1),
        ("#### 1\n####\n42", "42", {"marker": "####"}, 0),
        ("#### 42\n####\n42", "42", {"marker": "####"}, 1),
        ("it is 42, sir", "42", {"extraction": "anywhere"}, 1),
        ("it is 420, sir", "42", {"extraction": "anywhere"}, 0),
        ("#### 42 #### 43", "42", {"marker": "####"}, 0),
        ("42", "42", {"marker": "####"}, 0),
        ("#### 42", "6 * 7 = 42\n#### 42", {"marker": "####"}, 1),
        ("because\n42\n\n", "42", {"last_line": True}, 1),
        ("42\nor so", "42", {"last_line": True}, 0),
        ("$1,042", "1042", {"ignore": ",$"}, 1),
        ("Yes", "yes", {"ignore_case": True}, 1),
        ("Yes", "yes", {}, 0),
        ("", "42", {}, 0),
    ],
)
def test_exact_match_compares_the_stated_answer(completion, answer, options, value):
    assert exact_match("", completion, answer, {}, **options) == value


@pytest.mark.parametrize(
    ("completion", "options", "value"),
    [
        ("<a>1\n2</a>\n", {"pattern": "<a>.*</a>"}, 1),
        ("see <a>1</a>", {"pattern": "<a>.*</a>"}, 0),
        ("see <a>1</a>", {"pattern": "<a>.*</a>", "whole": False}, 1),
        ("see", {"pattern": "<a>", "whole": False}, 0),
    ],
)
def test_regex_match_finds_the_form(completion, options, value):
    assert regex_match("", completion, None, {}, **options) == value


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (500, -1)],
)
def test_overlong_penalty_falls_over_the_buffer(num_tokens, value):
    metadata = {"num_tokens": num_tokens}
    assert overlong_penalty(
        "", "", None, metadata, max_tokens=100, buffer_tokens=20
    ) == pytest.approx(value)


@pytest.mark.parametrize("buffer_tokens", [0, 101])
def test_overlong_penalty_refuses_a_buffer_out_of_range(buffer_tokens):
    with pytest.raises(ValueError, match="buffer_tokens"):
        overlong_penalty(
            "", "", None, {"num_tokens": 1}, max_tokens=100, buffer_tokens=buffer_tokens
        )


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1),
        (r"so $x = \frac{2}{4}$", r"\frac{1}{2}", 1),
        (r"\boxed{(x+1)^2}", "$x^2+2x+1$", 1),
        (r"\boxed{3}", r"thus \boxed{3}", 1),
        ("the answer is 3", "3", 1),
        (r"\boxed{4}", "3", 0),
        ("no idea", "3", 0),
        ("", "3", 0),
    ],
)
def test_math_verify_compares_expressions(completion, answer, value):
    assert math_verify("", completion, answer, {}) == value


GSM8K_ANSWER = "She has $5 + 5 = $<<5+5=10>>10 and 6 * 7 = 42\n#### 1,042\nSource: page 7"


@pytest.mark.parametrize(("boxed", "value"), [("1042", 1), ("1{,}042", 1), ("42", 0), ("7", 0)])
def test_math_verify_takes_a_worked_reference_after_its_marker(boxed, value):
    assert (
        math_verify("", f"so \\boxed{{{boxed}}}", GSM8K_ANSWER, {}, answer_marker="####") == value
    )


def test_math_verify_refuses_a_reference_without_its_marker():
    with pytest.raises(ValueError, match="no answer_marker '####' in the reference '1042'"):
        math_verify("", "1042", "1042", {}, answer_marker="####")


def test_math_verify_sets_no_alarm_and_is_silent(monkeypatch, caplog):
    for module in ("parser", "grader"):  # the library warns once per process
        monkeypatch.setattr(f"math_verify.{module}.TIMEOUT_WARNING_SHOWN", False)
    monkeypatch.setattr("signal.alarm", lambda seconds: pytest.fail("math-verify set an alarm"))
    with caplog.at_level(logging.WARNING):
        assert math_verify("", r"\boxed{1729}", "1729", {}) == 1.0
    assert not caplog.records


@pytest.mark.parametrize("reward", [exact_match, math_verify], ids=["exact_match", "math_verify"])
def test_reward_without_a_reference_says_so(reward):
    with pytest.raises(ValueError, match="answer_column"):
        reward("", "3", None, {})


def test_math_verify_refuses_a_reference_without_an_expression():
    with pytest.raises(ValueError, match="no expression"):
        math_verify("", "3", "$$", {})


@pytest.mark.parametrize("completion", ["", "3"])
@pytest.mark.parametrize(
    ("reward", "answer", "options"),
    [
        (exact_match, "", {}),
        (exact_match, " \n", {}),
        (exact_match, "so\n####", {"marker": "####"}),
        (exact_match, "$,", {"ignore": "$,"}),
        (math_verify, " ", {}),
        (math_verify, "so\n####", {"answer_marker": "####"}),
    ],
)
def test_empty_reference_is_refused(completion, reward, answer, options):
    with pytest.raises(ValueError, match="empty reference"):
        reward("", completion, answer, {}, **options)


def entry_of(task, index=0):
    return gym.create_dataset(task, size=3, seed=1)[index]


@pytest.mark.parametrize("task", ["chain_sum", "zebra_puzzles", "countdown"])
def test_reasoning_gym_gives_the_scorers_values(task):
    entry = entry_of(task)
    scorer = gym.get_score_answer_fn(task)
    for completion in (entry["answer"], "wrong", f"{entry['answer']} or so"):
        assert reasoning_gym("", completion, None, {"entry": entry}) == scorer(completion, entry)
    assert reasoning_gym("", f" {entry['answer']}\n", None, {"entry": entry}) == 1.0


def test_reasoning_gym_scores_by_the_entry_and_not_by_the_text():
    entry = {**entry_of("countdown")}
    expression = entry["metadata"]["expression"]
    assert (
        reasoning_gym("", f"({expression})", None, {"entry": entry}) == 1.0
    )  # not the oracle's letters
    assert f"({expression})" != entry["answer"]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("hm\n<answer> {} </answer> done", {"tag": "answer"}),
        ("hm\n#### {}\ndone", {"marker": "####"}),
        ("hm\n{}\n", {"last_line": True}),
    ],
    ids=["tag", "marker", "last_line"],
)
def test_reasoning_gym_extracts_the_answer(text, options):
    entry = entry_of("chain_sum")
    assert reasoning_gym("", text.format(entry["answer"]), None, {"entry": entry}, **options) == 1.0
    assert reasoning_gym("", "none of it", None, {"entry": entry}, **options) < 1.0


def test_reasoning_gym_needs_an_entry():
    with pytest.raises(ValueError, match="reasoning_gym_prompts"):
        reasoning_gym("", "3", "3", {})


@pytest.mark.parametrize(
    ("reward", "options", "key"),
    [
        (overlong_penalty, {"max_tokens": 10, "buffer_tokens": 11}, "buffer_tokens"),
        (overlong_penalty, {"max_tokens": 10, "buffer_tokens": 0}, "buffer_tokens"),
        (overlong_penalty, {"max_tokens": "10", "buffer_tokens": 1}, "max_tokens"),
        (overlong_penalty, {"max_tokens": 10, "buffer_tokens": True}, "buffer_tokens"),
        (regex_match, {"pattern": "[a"}, "pattern"),
        (regex_match, {"pattern": "a{99999999999}"}, "pattern"),
        (regex_match, {"pattern": None}, "pattern"),
        (regex_match, {"pattern": "a", "whole": 1}, "whole"),
        (exact_match, {"marker": ""}, "marker"),
        (exact_match, {"marker": 4}, "marker"),
        (exact_match, {"last_line": "no"}, "last_line"),
        (exact_match, {"ignore": None}, "ignore"),
        (exact_match, {"ignore_case": 0}, "ignore_case"),
        (math_verify, {"answer_marker": ""}, "answer_marker"),
        (math_verify, {"float_rounding": 1.5}, "float_rounding"),
        (math_verify, {"float_rounding": -1}, "float_rounding"),
        (math_verify, {"strict": "yes"}, "strict"),
        (math_verify, {"extraction": "box"}, "extraction"),
        (math_verify, {"extraction": None}, "extraction"),
        (math_verify, {"extraction": ["boxed"]}, "extraction"),
        (math_verify, {"extraction": "after_marker"}, "marker"),
        (math_verify, {"extraction": "boxed", "marker": "####"}, "marker"),
        (math_verify, {"marker": "####"}, "marker"),
        (math_verify, {"truncated": True}, "truncated"),
        (exact_match, {"extraction": "last"}, "extraction"),
        (exact_match, {"extraction": "boxed", "last_line": True}, "last_line"),
        (exact_match, {"extraction": "last_number", "marker": "="}, "marker"),
        (exact_match, {"truncated": "no"}, "truncated"),
        (regex_match, {"pattern": "a", "truncated": None}, "truncated"),
        (regex_match, {"pattern": "a", "empty_elements": 0}, "empty_elements"),
        (reasoning_gym, {"extraction": "boxed", "tag": "answer"}, "tag"),
        (reasoning_gym, {"truncated": 1}, "truncated"),
        (reasoning_gym, {"marker": ["="]}, "marker"),
        (reasoning_gym, {"last_line": None}, "last_line"),
        (reasoning_gym, {"tag": "(a"}, "tag"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_options_out_of_range_are_refused(reward, options, key):
    with pytest.raises(InputError) as caught:
        reward.check_options(**options)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (overlong_penalty, {"max_tokens": 10, "buffer_tokens": 10}),
        (regex_match, {"pattern": ""}),
        (exact_match, {}),
        (exact_match, {"marker": None, "ignore": "", "ignore_case": True}),
        (exact_match, {"extraction": "after_marker", "marker": "####", "truncated": "score"}),
        (regex_match, {"pattern": "a", "truncated": "score", "empty_elements": True}),
        (math_verify, {"float_rounding": 0}),
        (math_verify, {"extraction": "after_marker", "marker": "####"}),
        (math_verify, {"extraction": "anywhere", "truncated": "score"}),
        (reasoning_gym, {"extraction": "last_number"}),
        (reasoning_gym, {"marker": "=", "tag": "answer"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_options_in_range_are_taken(reward, options):
    reward.check_options(**options)
