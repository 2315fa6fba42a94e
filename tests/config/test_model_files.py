"""Broken JSON files of a model folder are named with their cause."""

import json

import pytest

from gspo.config.model_files import check_model_files
from gspo.errors import DataError


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "cannot be read: JSONDecodeError: Expecting property name"),
        ("config.json", "[]", "[] is no JSON object; get the file again"),
        ("config.json", "[" * 100_000, "cannot be read: RecursionError"),
        ("config.json", f'{{"vocab_size": 1{"0" * 400}}}', "1000"),
        ("config.json", '{"rope_scaling": "x"}', "'x' is rope_scaling, which must be a mapping"),
        ("model.safetensors.index.json", "", "cannot be read: JSONDecodeError"),
        ("vocab.json", "{", "cannot be read: JSONDecodeError"),
        ("vocab.json", "[]", "[] is no JSON object of tokens and ids"),
        ("vocab.json", '{"a": 0, "b": "1"}', "'1' is the id of 'b', which must be a whole number"),
        ("tokenizer.json", "{", "cannot be read: JSONDecodeError"),
    ],
    ids=[
        *("config", "list", "deep", "huge", "scaling", "index", "vocabulary", "vocabulary_list"),
        *("ids_as_text", "tokenizer"),
    ],
)
def test_a_broken_file_is_named_with_its_cause(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    component = {"checkpoint_dir": str(tmp_path), "path": str(path), "number": 3}
    with pytest.raises(DataError) as caught:
        check_model_files(component)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_whole_files_and_absent_ones_pass(tmp_path):
    config = {"vocab_size": 10, "rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    component = {"checkpoint_dir": str(tmp_path), "path": str(tmp_path / "vocab.json")}
    check_model_files(component)
