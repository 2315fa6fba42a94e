from types import SimpleNamespace

import pytest

from gspo.errors import InputError
from gspo.sampling.fingerprint import (
    check_tokenizer,
    check_vocabulary,
    tokenizer_fingerprint,
)


def tokenizer(vocabulary, specials=None):
    return SimpleNamespace(get_vocab=lambda: vocabulary, special_tokens=specials or {})


def test_fingerprint_is_stable_and_independent_of_order():
    one = tokenizer_fingerprint(tokenizer({"a": 0, "b": 1}, {"<eos>": 2}))
    assert one == tokenizer_fingerprint(tokenizer({"b": 1, "a": 0}, {"<eos>": 2}))
    assert one == "7945ef1736af59cb"


@pytest.mark.parametrize(
    "other",
    [
        tokenizer({"a": 1, "b": 0}, {"<eos>": 2}),
        tokenizer({"a": 0, "b": 1}),
        tokenizer({"a": 0, "b": 1}, {"<eos>": 3}),
        tokenizer({"a": 0, "b": 1, "<eos>": 2}),
    ],
    ids=["ids", "no-specials", "special-id", "not-special"],
)
def test_fingerprint_differs_when_an_id_changes_meaning(other):
    assert tokenizer_fingerprint(
        tokenizer({"a": 0, "b": 1}, {"<eos>": 2})
    ) != tokenizer_fingerprint(other)


def test_fingerprint_finds_the_vocabulary_where_torchtune_keeps_it():
    vocabulary = {"a": 0, "b": 1}
    expected = tokenizer_fingerprint(tokenizer(vocabulary))
    pieces = SimpleNamespace(id_to_piece=["a", "b"].__getitem__, get_piece_size=lambda: 2)
    ranks = SimpleNamespace(_mergeable_ranks={b"a": 0, b"b": 1})
    for holder in (
        SimpleNamespace(encoder=vocabulary),  # Qwen2
        SimpleNamespace(tokenizer_model=SimpleNamespace(encoder=vocabulary)),  # Phi4
        SimpleNamespace(tt_model=SimpleNamespace(tt_model=ranks)),  # Llama3
        SimpleNamespace(_spm_model=SimpleNamespace(spm_model=pieces)),  # Llama2, Gemma, Mistral
        SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary)),  # tokenizers
    ):
        assert tokenizer_fingerprint(holder) == expected


def test_fingerprint_refuses_a_tokenizer_without_a_vocabulary():
    with pytest.raises(InputError, match="get_vocab"):
        tokenizer_fingerprint(SimpleNamespace(decode=str))


class Characters:
    """A tokenizer of characters, with its mistakes as functions of texts and ids."""

    def __init__(self, change_ids=lambda ids: ids, change_text=lambda text: text):
        self.change_ids = change_ids
        self.change_text = change_text

    def encode(self, text, add_bos, add_eos):
        return self.change_ids([ord(character) for character in text])

    def decode(self, ids):
        return self.change_text("".join(chr(number) for number in ids))


def test_tokenizer_that_keeps_letters_is_taken():
    check_tokenizer(Characters())
    check_tokenizer(Characters(change_text=lambda text: f"<s> {text.upper()} "))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Characters(change_ids=lambda ids: [0]), "makes '\\x00' of 'two and 3' when it encodes"),
        (Characters(change_ids=lambda ids: ids[:-1]), "makes 'two and ' of 'two and 3'"),
        (Characters(lambda ids: [1], lambda text: "two and 3 solve 45"), "the same ids [1]"),
        (Characters(change_text=lambda text: 1 / 0), "fails on 'two and 3': ZeroDivisionError: "),
    ],
    ids=["one_id", "cut", "decodes_anything", "raises"],
)
def test_tokenizer_that_loses_text_is_refused(tokenizer, message):
    with pytest.raises(InputError) as refused:
        check_tokenizer(tokenizer)
    assert str(refused.value).startswith("tokenizer: 'Characters' ")
    assert message in str(refused.value)


def test_words_without_an_embedding_are_refused_and_special_tokens_taken():
    added = SimpleNamespace(get_added_tokens_decoder=lambda: {5: "<image>"})
    whole = tokenizer({"a": 0, "b": 3, "<eos>": 4, "<image>": 5}, {"<eos>": 4})
    whole.tokenizer = added
    check_vocabulary(whole, 4)
    message = "tokenizer: 'SimpleNamespace' has the token id 3, outside .* vocabulary of 3; use the"
    with pytest.raises(InputError, match=message):
        check_vocabulary(whole, 3)
    check_vocabulary(SimpleNamespace(), 3)  # shows none
