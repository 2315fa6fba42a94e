r"""Rules, by name, for where a completion states its final answer.

A rule returns every statement of the final answer that it sees, in their order. A reward pays only
where all of them are right, so that several different answers are none. What is inside ``<think>``
is no answer, and neither is a number that is denied, asked about, offered beside another, or a part
of an expression.

Not here: whether an answer is right, and whether it is a value (:mod:`gspo.rewards.values`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Where the prompt ends like this, a completion begins inside the thinking.
_OPEN_THINKING = "<think>"
_END_OF_THINKING = "</think>"
_ANSWER_ELEMENT = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z]\w*>")
_EMPTY_ELEMENT = re.compile(r"<([A-Za-z]\w*)>\s*</\1>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# As pandoc reads dollars: no blank inside them, no digit behind, so that $5 and $7 are prices.
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    r"|(?<![\\$\w])\$(?![\s$])([^$\n]*?[^\s$\\])\$(?![\d$])",
    re.DOTALL,
)

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_.])(?P<sign>-?)[$€£¥]?(?P<minus>-?)(?P<digits>{_DIGITS})"
    r"(?:/(?P<below>[1-9][0-9]*))?(?P<percent>\s?%)?"
)
_STATED = re.compile(r"(?:\banswers?\s*(?:is|are|:|=)|\bis\s*:|####)[:\s]*$", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor)|n't|≠|!=|\\neq?)"
    r"(?:\s+(?:be|equal|to|the|a|number|answer|value|is))*[^\w.]*$",
    re.IGNORECASE,
)
_OFFERED = re.compile(r"\bor\b\W*$", re.IGNORECASE)
_LISTED = re.compile(r"(?:^|\b(?:is|are)|[:=])\s*(?:-?[0-9.]+\s*(?:,|;|and)\s*)+$", re.IGNORECASE)
_OPERATOR_BEFORE = re.compile(r"(?:[+*/×·÷^√_{]|[0-9]\(|[0-9)]\s*[-x])\s*$")
_OPERAND_BEFORE = re.compile(r"[0-9)]\s*$")
# An operator, or an unknown that the number is a multiple of.
_OPERATOR_BEHIND = re.compile(r"\s*(?:[+*/×·÷^]|-\s*[0-9(]|x\s*[0-9]|or\b)|[abknpqxyz](?![A-Za-z])")
_OTHER_BEFORE = re.compile(
    rf"(?<![A-Za-z0-9_.])(?P<number>-?(?:{_DIGITS}))\s*(?:%|[a-z]+)?\s*=\s*$"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")

_PLAIN_FORMS = (
    (re.compile(r"\*\*|__|`|\\[,!;:]|[{]*,[}]+(?=[0-9]{3})"), ""),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|boxed|fbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{?([0-9]+)\}?\s*\{?([0-9]+)\}?"), r"\1/\2"),
    (re.compile(r"(?<![\w*])\*(-?[$]?[0-9.,]+%?)\*(?![\w*])"), r"\1"),
    (re.compile(r"([A-Za-z])\s*\^\s*\{?[0-9]\}?"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\div(?![A-Za-z])"), "÷"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[\[\]()]|\$\$"), " "),
)


@dataclass(frozen=True, slots=True)
class _Span:
    """A piece of a text that may be a statement."""

    start: int
    end: int
    content: str


def boxed(text: str) -> list[str]:
    r"""Return what stands in each ``\boxed{}``, braces inside it and all; an open one is none."""
    return _asserted(text, _boxes(text))


def after_marker(text: str, marker: str) -> list[str]:
    """Return what follows each marker, up to the next one or to the end of its line."""
    answers = []
    _, *pieces = text.split(marker)
    for piece in pieces:
        line, _, _ = piece.lstrip().partition("\n")
        answers.append(line.strip())
    return answers


def last_number(text: str) -> list[str]:
    """Return the last number, and those that are called the answer before it.

    There is none where the last number is part of an expression, of a question or of a choice. Its
    text is plain: ``$1,042.50`` is ``1042.50``, and a fraction of whole numbers is kept.
    """
    plain = _plain(text)
    numbers = list(_NUMBER.finditer(plain))
    if not numbers or not _is_value_stated(plain, numbers[-1]):
        return []
    answers = []
    for number in numbers[:-1]:
        is_named = _STATED.search(plain[: number.start()]) is not None
        if is_named and _is_value_stated(plain, number):
            answers.append(_number_text(number))
    answers.append(_number_text(numbers[-1]))
    return answers


def anywhere(text: str) -> list[str]:
    """Return the whole text: the verifier looks for the answer in it, which can be gamed."""
    return [text]


def final(text: str) -> list[str]:
    """Return what is boxed; without a box, the last formula or the last number, which ends later.

    A formula that more numbers follow is not the last word.
    """
    if _BOX.search(text):
        return boxed(text)
    formulas = list(_formulas(text))
    if formulas and not _NUMBER.search(_plain(text[formulas[-1].end :])):
        return _asserted(text, formulas[-1:])
    return last_number(text)


RULES: dict[str, Callable[..., list[str]]] = {
    "final": final,
    "boxed": boxed,
    "last_number": last_number,
    "after_marker": after_marker,
    "anywhere": anywhere,
}


def find_answers(text: str, rule: str, *, marker: str | None = None, prompt: str = "") -> list[str]:
    """Return the statements of the final answer, none of them empty; [] where there is none.

    Args:
        text: a completion.
        rule: a name in :data:`RULES`.
        marker: of ``after_marker``.
        prompt: tells whether the completion begins inside ``<think>``.
    """
    if rule == "anywhere":
        return anywhere(text) if text.strip() else []
    answers: list[str] = []
    for part in _answer_parts(text, prompt):
        if rule == "after_marker":
            answers += after_marker(part, marker or "")
        else:
            answers += RULES[rule](part)
    answers = [answer.strip() for answer in answers]
    return answers if all(answers) else []


def final_answer(
    text: str, rule: str, *, marker: str | None = None, prompt: str = ""
) -> str | None:
    """Return the text of the final answer; None where there is none, or more than one.

    Args:
        text: see :func:`find_answers`.
        rule: see :func:`find_answers`.
        marker: see :func:`find_answers`.
        prompt: see :func:`find_answers`.
    """
    answers = find_answers(text, rule, marker=marker, prompt=prompt)
    return answers[0] if len(set(answers)) == 1 else None


def without_thinking(text: str, prompt: str = "") -> str:
    """Return what stands behind the thinking; nothing where the thinking does not end."""
    before, end, behind = text.rpartition(_END_OF_THINKING)
    if end:
        return "" if _OPEN_THINKING in behind else behind
    is_thinking = _OPEN_THINKING in text or prompt.rstrip().endswith(_OPEN_THINKING)
    return "" if is_thinking else text


def has_empty_element(text: str) -> bool:
    """Whether an element such as ``<think></think>`` has nothing in it."""
    return _EMPTY_ELEMENT.search(text) is not None


def _answer_parts(text: str, prompt: str) -> list[str]:
    """Return the inside of each ``<answer>`` element, or all that is not thinking."""
    answer = without_thinking(text, prompt)
    elements = _ANSWER_ELEMENT.findall(answer)
    return elements or [answer]


def _boxes(text: str) -> Iterator[_Span]:
    end = 0
    for opening in _BOX.finditer(text):
        closing = _closing_brace(text, opening.end())
        if closing is not None and opening.start() >= end:  # a box in a box is one statement
            content = text[opening.end() : closing]
            end = closing + 1
            yield _Span(opening.start(), end, content)


def _closing_brace(text: str, start: int) -> int | None:
    """Return where the brace that is open at ``start`` closes."""
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return None


def _formulas(text: str) -> Iterator[_Span]:
    for formula in _FORMULA.finditer(text):
        contents = [group for group in formula.groups() if group is not None]
        yield _Span(formula.start(), formula.end(), contents[0])


def _asserted(text: str, spans: Iterator[_Span] | list[_Span]) -> list[str]:
    """Return the contents of the spans; nothing where one of them is not asserted."""
    contents = []
    for span in spans:
        before = _sentence_before(text, span.start)
        if _is_doubtful(before, _sentence_behind(text, span.end)):
            return []
        contents.append(span.content)
    return contents


def _is_doubtful(before: str, behind: str) -> bool:
    """Whether a value is denied, is offered beside another, or stands in a question."""
    is_denied = _DENIED.search(before) is not None
    is_offered = _OFFERED.search(before) is not None or re.match(r"\W*or\b", behind) is not None
    return is_denied or is_offered or behind.endswith("?")


def _is_value_stated(plain: str, number: re.Match[str]) -> bool:
    """Whether a number is the value that its sentence states."""
    before = _sentence_before(plain, number.start())
    behind = _sentence_behind(plain, number.end())
    if _is_doubtful(before, behind) or _LISTED.search(before):
        return False
    if _OPERATOR_BEFORE.search(before) or _OPERATOR_BEHIND.match(behind):
        return False
    if number["sign"] and _OPERAND_BEFORE.search(before):
        return False
    other = _OTHER_BEFORE.search(before)
    if other is None or _OPERATOR_BEFORE.search(before[: other.start()]):
        return True
    return other["number"].replace(",", "") == _number_text(number)


def _sentence_before(text: str, position: int) -> str:
    start = 0
    for end in _SENTENCE_END.finditer(text, 0, position):
        start = end.end()
    return text[start:position]


def _sentence_behind(text: str, position: int) -> str:
    end = _SENTENCE_END.search(text, position)
    return text[position:] if end is None else text[position : end.end()]


def _plain(text: str) -> str:
    """Return a text without the marks of Markdown, of elements and of LaTeX around numbers."""
    plain = _TAG.sub(" ", text).replace("−", "-")
    for pattern, replacement in _PLAIN_FORMS:
        plain = pattern.sub(replacement, plain)
    return plain


def _number_text(number: re.Match[str]) -> str:
    is_negative = (number["sign"] + number["minus"]) == "-"
    sign = "-" if is_negative else ""
    digits = number["digits"].replace(",", "")
    below = f"/{number['below']}" if number["below"] else ""
    percent = "%" if number["percent"] else ""
    return f"{sign}{digits}{below}{percent}"
