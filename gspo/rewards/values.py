r"""The difference between a value and a task: ``75`` is one, ``58+17`` is the other.

math-verify evaluates what it compares, so that it takes a restated question for its answer. Here an
answer's text and its unevaluated expression are looked at before that.

Not here: algebra with unknowns. ``x^2+2x+1`` and ``(x+1)^2`` are both values; that the first of
them is the question, the prompt has to tell.
"""

from __future__ import annotations

import re

import sympy
from sympy import Add, Basic, Integer, MatrixBase, Mul, Pow, Rational

_NEGATION = re.compile(r"\b(?:not|never)\b|n't|\\neq?(?![A-Za-z])|≠|\\not\b|!=", re.IGNORECASE)
# Commands that the library computes while it parses.
_COMPUTED = re.compile(r"\\(?:[dt]?binom|choose|max|min|gcd|lcm|[bp]?mod)(?![A-Za-z])")
# Commands in the text of a number, its unit included.
_OF_NUMBERS = {
    *("frac", "dfrac", "tfrac", "left", "right", "overline", "overset", "bar", "dot"),
    *("text", "textbf", "mathrm", "mathbf", "mbox", "circ", "degree", "deg", "quad"),
    *("approx", "sim", "times", "cdot"),
}
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_DIVISION = re.compile(
    r"\\[dt]?frac\s*(?:\{(?P<a>[0-9.]+)\}|(?P<b>[0-9]))\s*(?:\{(?P<c>[0-9.]+)\}|(?P<d>[0-9]))"
    r"|(?P<e>[0-9.]+)\s*(?:[/:÷]|\\div)\s*(?P<f>[0-9.]+)"
)
# 75 000 is a number, 75 75 is a product to the library, as is --75 a number.
_LOOSE = re.compile(r"[0-9]\s+[0-9](?![0-9]{2}(?![0-9]))|[-+]\s*[-+]")
_UNFINISHED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit)
_TIDY = (
    (re.compile(r"~|(?<!\\)\\ "), " "),
    (re.compile(r"^[\s$]+|[\s$]+$|\*\*|^\\[(\[]|\\[)\]]$"), ""),
    (re.compile(r"(?<=[\w})\]%])\s*[.;,!]$"), ""),
    (re.compile(r"\\(?:text(?:bf)?|math(?:rm|bf))\s*\{\s*([-+]?[0-9.,/]+)\s*\}"), r"\1"),
    (re.compile(r"^(-?[0-9]+)\s+([0-9]+)/([0-9]+)$"), r"\1\\frac{\2}{\3}"),
    # A unit in words: without \text it would be a product of letters.
    (
        re.compile(r"^([-$€£¥]*[0-9][0-9.,/]*)\s+(?!or\b|and\b)[A-Za-z]{2,}(?:\s+[A-Za-z]+)*$"),
        r"\1",
    ),
    (re.compile(r"^(-?)[€£¥]\s*(?=[0-9])"), r"\1"),
    (re.compile(r"(?<=[0-9])\s*(?<!\\)%"), r"\\%"),
)
_SPACES = re.compile(
    r"(?<![0-9])\s+|\s+(?![0-9])|\\left|\\right|\\[,;:! ]|[{}]|(?<=\\)[dt](?=frac)|\\?\$"
)


def tidy(answer: str) -> str:
    r"""Return an answer without what is no part of its value: dollars, bold, ``\text``, units."""
    tidied = answer.strip()
    for pattern, replacement in _TIDY:
        tidied = pattern.sub(replacement, tidied)
    return tidied.strip()


def squeeze(text: str) -> str:
    r"""Return a text without blanks, braces and LaTeX's sizes, to compare texts by."""
    squeezed = text.replace("\\cdot", "*").replace("\\times", "*").replace("×", "*")
    return _SPACES.sub("", squeezed).casefold()


def reads_as_value(answer: str) -> bool:
    """Whether an answer's text denies nothing and asks for no division or count."""
    if _NEGATION.search(answer) or _COMPUTED.search(answer) or _LOOSE.search(answer):
        return False
    return not any(_comes_out(division) for division in _DIVISION.finditer(answer))


def reads_as_number(answer: str) -> bool:
    """Whether the text of what the library reads as a number has no command that computes it."""
    return set(_COMMAND.findall(answer)) <= _OF_NUMBERS


def is_evaluated(expression: Basic | MatrixBase) -> bool:
    """Whether nothing in an expression is left to compute with numbers alone.

    Fractions, roots, powers of ten and multiples of constants stand for themselves.
    """
    if isinstance(expression, MatrixBase):
        return all(is_evaluated(element) for element in expression)
    return not any(_is_task(node) for node in sympy.preorder_traversal(expression))


def _comes_out(division: re.Match[str]) -> bool:
    """Whether a division has a result that is written without it."""
    above = division["a"] or division["b"] or division["e"]
    below = division["c"] or division["d"] or division["f"]
    if not (above.isdigit() and below.isdigit()):
        return True  # decimals, which are no fraction
    return int(below) != 0 and int(above) % int(below) == 0


def _is_task(node: Basic) -> bool:
    if isinstance(node, _UNFINISHED):
        return True
    if isinstance(node, Add):
        return _count_numbers(node) > 1
    if isinstance(node, Mul):
        return _count_numbers(node) > 1 and not _is_scientific(node)
    if isinstance(node, Pow):
        return _is_power_task(node)
    if isinstance(node, sympy.Function):
        return _is_function_task(node)
    return False


def _count_numbers(node: Basic) -> int:
    """Count the arguments that are numbers, without the -1 of a sign."""
    return sum(_is_number(argument) and argument != -1 for argument in node.args)


def _is_number(node: Basic) -> bool:
    if isinstance(node, Pow):
        return all(_is_number(argument) for argument in node.args) and node.args[1].is_integer
    return isinstance(node, Rational | sympy.Float)


def _is_scientific(product: Mul) -> bool:
    powers = [factor for factor in product.args if isinstance(factor, Pow) or factor == 10]
    is_of_ten = len(powers) == 1 and (powers[0] == 10 or powers[0].args[0] == 10)
    return len(product.args) == 2 and is_of_ten


def _is_power_task(power: Pow) -> bool:
    base, exponent = power.args
    if not (_is_number(base) and isinstance(exponent, Rational)):
        return False
    if isinstance(exponent, Integer):
        return exponent != -1 and base != 10
    root = Pow(base, exponent)
    return isinstance(root, Rational)


def _is_function_task(call: sympy.Function) -> bool:
    return not call.free_symbols and isinstance(call.doit(), Rational)
