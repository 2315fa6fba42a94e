from types import SimpleNamespace

import pytest

from gspo.data.segments import AtDelimiter, Segment
from gspo.errors import InputError
from tests.data.fakes import Items, completion, exact, rollout
from tests.data.law import assert_resumes_anywhere

PIECES = ["", "a", "b", " ", "\n", "\n\n", ".\n", "a\n\nb", "\n\n\n", "</s", "tep>"]
TOKENIZER = SimpleNamespace(decode=lambda tokens: "".join(PIECES[t] for t in tokens))


def cut(*pieces, delimiter="\n\n"):
    tokens = [PIECES.index(piece) for piece in pieces]
    given = completion(len(tokens), tokens=tokens, logps=[0.0] * len(tokens))
    return AtDelimiter(TOKENIZER, delimiter=delimiter)(given)


@pytest.mark.parametrize(
    ("pieces", "segments"),
    [
        (["a", "b", ""], [0, 0, 0]),
        (["a", "\n\n", "b", "a", ""], [0, 0, 1, 1, 1]),
        (["a", ".\n", "\n", "b"], [0, 0, 0, 1]),  # over two tokens
        (["a", "\n", " ", "\n", "b"], [0, 0, 0, 0, 0]),  # not a delimiter
        (
            ["a", "\n\n", "\n", "\n\n\n", " ", "b"],
            [0, 0, 0, 0, 0, 1],
        ),  # blank tokens make no segment
        (["a\n\nb", "b", "a\n\nb", "a"], [0, 1, 1, 2]),  # within a token
        (["a", "\n\n", ""], [0, 0, 0]),  # the stop token is in the last one
        (["\n\n", "a"], [0, 1]),
        ([], []),
    ],
)
def test_segments_end_with_the_delimiter_and_what_is_blank_behind_it(pieces, segments):
    assert cut(*pieces) == segments


def test_a_delimiter_is_found_across_tokens_wherever_it_starts():
    assert cut("a", "</s", "tep>", "b", "</s", "tep>", "a", delimiter="</step>") == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
    ]
    assert cut("a", "b", "a", "b", delimiter="b") == [0, 0, 1, 1]
    assert cut(*["a"] * 9, "b", "\n\n", "a", delimiter="ab\n") == [0] * 11 + [1]


@pytest.mark.parametrize("delimiter", ["", None, 3])
def test_a_delimiter_that_is_no_text_is_refused(delimiter):
    with pytest.raises(InputError, match=r"^delimiter: .* give one"):
        AtDelimiter(TOKENIZER, delimiter=delimiter)


def segmented(splitter, *groups):
    return next(Segment(Items(lambda _: rollout(*groups), 1), splitter))


def test_a_newline_that_the_shell_left_as_two_characters_is_refused():
    with pytest.raises(
        InputError, match=r"^delimiter: .* a backslash and an n where a newline is meant"
    ):
        AtDelimiter(TOKENIZER, delimiter=r"\n\n")


@pytest.mark.parametrize("nothing", [None, []])
def test_a_completion_may_stay_whole(nothing):
    result = segmented(lambda c: nothing, [completion(3)])
    assert result.groups[0].completions[0].segments == [0, 0, 0]


def test_every_completion_is_cut():
    result = segmented(
        lambda c: [i // 2 for i in range(len(c.tokens))],
        [completion(3), completion(1)],
        [completion(4)],
    )
    assert [[c.segments for c in g.completions] for g in result.groups] == [
        [[0, 0, 1], [0]],
        [[0, 0, 1, 1]],
    ]


@pytest.mark.parametrize(
    ("segments", "advantages", "message"),
    [
        ([0, 0], [], "2 numbers for 3 tokens"),
        ([0, -1, 0], [], "-1 is not a number from 0"),
        ([0, 1, 1], [0.5], "1 advantages for 2 segments"),
        ([2**40] * 3, [], "1099511627776 must be less than 1,048,576, since"),
        ([0, 0, 10**5000], [], "<int> must be less than 1,048,576, since"),
        (["a"] * 3, [], r"\['a', 'a', 'a'\] must be whole numbers, or none"),
        ([0.5] * 3, [], r"\[0.5, 0.5, 0.5\] must be whole numbers, or none"),
        (7, [], "7 must be whole numbers, or none"),
        ([0, 0, 0], None, "None must be a list of numbers, as segment_advantages"),
        ([0, 0, 0], 5, "5 must be a list of numbers, as segment_advantages"),
        ([0, 0, 0], ["a"], r"\['a'\] must be a list of numbers, as segment_advantages"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments, advantages, message):
    def splitter(given):
        given.segment_advantages = advantages
        return segments

    beginning = f"^segments of a completion of prompt p:0: {message}"
    with pytest.raises(InputError, match=f"{beginning}.*; correct the splitter, function$"):
        segmented(splitter, [completion(3)])


def test_segments_resume_anywhere():
    def make():
        return Segment(
            Items(lambda i: rollout([completion(i + 1)]), 4), lambda c: list(range(len(c.tokens)))
        )

    assert_resumes_anywhere(make, 4, key=exact)
