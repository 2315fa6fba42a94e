import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gspo import tiny
from gspo.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_untrained(
        folder / "model", folder / "data", seed=3, num_train=50, num_heldout=20, num_validation=10
    )
    return folder


def rows(folder, name):
    return [
        json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()
    ]


def test_data_sets_share_no_question(folder):
    questions = {
        name: [row["expression"] for row in rows(folder, name)]
        for name in ("train", "heldout", "validation")
    }
    assert [len(of_set) for of_set in questions.values()] == [50, 20, 10]
    assert len(set().union(*questions.values())) == 80


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(
        InputError,
        match="num_train.*: 12300 in all, but only 116.. distinct questions came of 49200",
    ):
        tiny.chain_sum_rows(12_300, seed=0)


def test_worked_examples_end_in_the_answer(folder):
    for row in rows(folder, "train"):
        left, sign, right = row["expression"].split()
        value = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert row["answer"] == str(value) and value >= 0
        assert row["worked"] == f"{str(value)[::-1]}={value}"


def test_seed_decides_weights_and_questions(folder, tmp_path):
    sizes = {"num_train": 50, "num_heldout": 20, "num_validation": 10}
    for name, seed in (("again", 3), ("other", 4)):
        tiny.make_untrained(tmp_path / name / "model", tmp_path / name / "data", seed=seed, **sizes)
    weights = {
        p: load_file(p / "model" / "model.safetensors")
        for p in (folder, tmp_path / "again", tmp_path / "other")
    }
    first, again, other = weights.values()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert rows(folder, "train") == rows(tmp_path / "again", "train")
    shared = {r["expression"] for r in rows(folder, "train")} & {
        r["expression"] for r in rows(tmp_path / "other", "train")
    }
    assert len(shared) < 10


def test_making_a_model_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tiny.write_model(tmp_path, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_torchtune_and_transformers_read_the_same_tokenizer(folder):
    ours = tiny.read_tokenizer(folder / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "model")
    for row in rows(folder, "train"):
        text = tiny.CHAT_TEMPLATE.format_map(row) + row["worked"] + "<|im_end|>"
        tokens = ours.encode(text, add_bos=False, add_eos=False)
        assert tokens == theirs(text)["input_ids"]
        assert ours.decode(tokens, skip_special_tokens=False) == text
        assert max(tokens) < tiny.VOCAB_SIZE and len(tokens) < 25
    assert theirs.eos_token == "<|im_end|>" and theirs.eos_token_id in ours.stop_tokens


def test_transformers_gives_the_logits_of_torchtune(folder):
    sampler_model = tiny.load_sampler(folder / "model")._model
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder / "model")
    tokens = torch.randint(0, tiny.VOCAB_SIZE, (2, 31), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler_model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_prompts_are_read_in_the_order_of_the_file(folder):
    prompts = tiny.read_prompts(folder / "model", folder / "data" / "heldout.jsonl")
    assert [p.answer for p in prompts] == [row["answer"] for row in rows(folder, "heldout")]
    assert prompts[0].text == tiny.CHAT_TEMPLATE.format_map(rows(folder, "heldout")[0])
