"""Where a completion states its final answer, and what repeats a prompt."""

import pytest

from gspo.rewards.extraction import RULES, final_answer, find_answers, without_thinking
from gspo.rewards.restating import is_part_of, repeats_prompt


@pytest.mark.parametrize(
    ("rule", "text", "answers"),
    [
        ("boxed", r"\boxed{\frac{1}{2}} and \fbox{3}", [r"\frac{1}{2}", "3"]),
        ("boxed", r"\boxed{\boxed{3}}", [r"\boxed{3}"]),
        ("boxed", r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        ("boxed", r"\boxed{ } 3", []),
        ("boxed", "3", []),
        ("last_number", "from 3 to $1,042.50.", ["1042.50"]),
        ("last_number", "of 1/2", ["1/2"]),
        ("last_number", r"of \frac{1}{2}", ["1/2"]),
        ("last_number", "-5 %", ["-5%"]),
        ("last_number", "The answer is 3. Then 4", ["3", "4"]),
        ("last_number", "58 + 17", []),
        ("last_number", "2x", []),
        ("last_number", "", []),
        ("after_marker", "#### 1 #### 2\n3", ["1", "2"]),
        ("after_marker", "####\n1", ["1"]),
        ("after_marker", "1", []),
        ("after_marker", "#### 1 ####", []),
        ("anywhere", "<think>1", ["<think>1"]),
        ("anywhere", " ", []),
        ("final", r"$3$, so \boxed{4}", ["4"]),
        ("final", "$3$", ["3"]),
        ("final", "$n$ is 3", ["3"]),
        ("final", "$3 and $4", ["4"]),
        ("final", "<answer>3</answer> 4", ["3"]),
    ],
)
def test_rules_find_each_statement(rule, text, answers):
    marker = "####" if rule == "after_marker" else None
    assert find_answers(text, rule, marker=marker) == answers


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_takes_an_empty_text(rule):
    assert final_answer("", rule, marker="####") is None


def test_final_answer_is_one():
    assert final_answer(r"\boxed{3} \boxed{ 3 }", "boxed") == "3"
    assert final_answer(r"\boxed{3} \boxed{4}", "boxed") is None


@pytest.mark.parametrize(
    ("text", "prompt", "rest"),
    [
        ("3", "", "3"),
        ("<think>2</think>3", "", "3"),
        ("2</think>3", "<think>\n", "3"),
        ("3", "<think>\n", ""),
        ("<think>3", "", ""),
        ("<think>1</think>2<think>3", "", ""),
        ("<think>1</think><think>2</think>3", "", "3"),
    ],
)
def test_thinking_is_left_out(text, prompt, rest):
    assert without_thinking(text, prompt) == rest


QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May."
)
CHAT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "text", "repeats"),
    [
        (CHAT, QUESTION, True),
        (CHAT, "Well: " + QUESTION.upper(), True),
        (CHAT, QUESTION[:70], True),
        (CHAT, "Natalia sold clips to 48 of her friends in April. In May she sold 24.", False),
        (CHAT, "72", False),
        (CHAT, "", False),
        ("58 + 17", "We add 58 + 17", True),
        ("58 + 17", "17 + 58", False),
        ("?", "?", False),
        ("<|im_start|>user\n75<|im_end|>", "75", False),
    ],
)
def test_repeats_prompt_wants_half_of_its_runs(prompt, text, repeats):
    assert repeats_prompt(prompt, text) is repeats


def test_is_part_of_compares_words():
    assert is_part_of("Is 139 prime?", "139 Prime")
    assert not is_part_of("Is 139 prime?", "39")
    assert not is_part_of("Is 139 prime?", "")
