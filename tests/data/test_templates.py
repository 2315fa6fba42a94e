"""Prompt templates through torchtune's tokenizer classes: a special token in them is one token."""

import base64
import json

import pytest
import torch
from tokenizers import Tokenizer, processors
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS, Llama3Tokenizer
from torchtune.models.qwen2 import qwen2, qwen2_tokenizer
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

from gspo import tiny
from gspo.data import readers
from gspo.errors import InputError
from gspo.sampling.fingerprint import tokenizer_fingerprint
from gspo.sampling.local import LocalSampler
from gspo.types import SamplingParams

BOS, END = "<|im_start|>", "<|im_end|>"
LLAMA = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
TEMPLATE = f"{END}\n\n{{question}}{END}answer\n\n"


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE tokenizer in Hugging Face's files, with a begin-of-sequence token."""
    tiny.write_tokenizer(tmp_path, ["user assistant 1 + 2"])
    names = {"bos_token": {"__type": "AddedToken", "content": BOS}, "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    return tmp_path


@pytest.fixture
def huggingface(folder):
    return HuggingFaceBaseTokenizer(
        str(folder / "tokenizer.json"),
        tokenizer_config_json_path=str(folder / "tokenizer_config.json"),
    )


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """Llama 3's tokenizer class with its special tokens after the 256 bytes as vocabulary."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # else tiktoken keeps a copy under the path's name
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    return Llama3Tokenizer(str(tmp_path / "tokenizer.model"), special_tokens=LLAMA)


def draw(tokenizer, tmp_path, question, **knobs):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"question": question, "answer": "1"}))
    return next(readers.jsonl_prompts(tokenizer, source=str(tmp_path / "prompts.jsonl"), **knobs))


@pytest.mark.parametrize("add_bos", [True, False], ids=["bos", "no_bos"])
def test_llama_header_tokens_of_the_template_are_single_tokens(llama, tmp_path, add_bos):
    template = "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
    template += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    prompt = draw(llama, tmp_path, "hi{}", prompt_template=template, add_bos=add_bos)
    start, end, eot = LLAMA["<|start_header_id|>"], LLAMA["<|end_header_id|>"], LLAMA["<|eot_id|>"]
    assert prompt.tokens == [
        *([LLAMA["<|begin_of_text|>"]] if add_bos else []),
        *(start, *b"user", end, *b"\n\nhi{}"),
        *(eot, start, *b"assistant", end, *b"\n\n"),
    ]
    assert prompt.text == template.format(question="hi{}")


def test_llama_special_token_in_the_data_stays_text(llama, tmp_path):
    prompt = draw(
        llama, tmp_path, "<|eot_id|>", prompt_template="<|eot_id|>{question}", add_bos=False
    )
    assert prompt.tokens == [LLAMA["<|eot_id|>"], *b"<|eot_id|>"]


def test_longest_special_token_of_the_template_is_taken(llama, tmp_path):
    llama.special_tokens = llama.special_tokens | {"<|eot": 300, "<|eot_id|><|eot_id|>": 301}
    assert draw(llama, tmp_path, "", prompt_template="<|eot_id|><|eot_id|>{question}").tokens == [
        llama.bos_id,
        301,
    ]


def test_qwen_template_gives_the_tokens_of_its_own_encode(folder):
    files = {"path": folder / "vocab.json", "merges_file": folder / "merges.txt"}
    tokenizer = qwen2_tokenizer(**files, special_tokens_path=str(folder / "tokenizer.json"))
    prompt = draw(tokenizer, folder, "user 1 + 2", prompt_template=TEMPLATE)
    assert prompt.tokens == tokenizer.encode(prompt.text, add_bos=False, add_eos=False)
    assert prompt.tokens.count(tokenizer.special_tokens[END]) == 2


@pytest.mark.parametrize("adds_bos", [True, False], ids=["tokenizer_adds_it", "wrapper_adds_it"])
def test_huggingface_template_has_single_special_tokens_and_one_bos(folder, huggingface, adds_bos):
    if adds_bos:
        inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
        )
        inner.save(str(folder / "tokenizer.json"))
        huggingface = HuggingFaceBaseTokenizer(
            str(folder / "tokenizer.json"),
            tokenizer_config_json_path=str(folder / "tokenizer_config.json"),
        )
    tokens = draw(huggingface, folder, "user 1 + 2", prompt_template=TEMPLATE, add_bos=True).tokens
    assert tokens[:2] == [huggingface.bos_id, huggingface.eos_id]
    assert (tokens.count(huggingface.bos_id), tokens.count(huggingface.eos_id)) == (1, 2)
    assert huggingface.tokenizer.decode(tokens) == "\n\nuser 1 + 2answer\n\n"


def test_bos_in_the_template_and_from_the_tokenizer_is_refused(folder, huggingface, llama):
    for tokenizer, bos in ((huggingface, BOS), (llama, "<|begin_of_text|>")):
        with pytest.raises(InputError, match="prompts.jsonl:1 begins with the token .* twice"):
            draw(tokenizer, folder, "1", prompt_template=f"{bos}{{question}}", add_bos=True)
        assert (
            len(
                draw(
                    tokenizer, folder, "1", prompt_template=f"{bos}{{question}}", add_bos=False
                ).tokens
            )
            == 2
        )


@pytest.mark.parametrize("kind", ["huggingface", "llama"])
def test_sampler_draws_stops_and_decodes_with_the_tokenizer(kind, request, folder):
    tokenizer = request.getfixturevalue(kind)
    size = {"huggingface": tiny.VOCAB_SIZE, "llama": 256 + len(LLAMA)}[kind]
    torch.manual_seed(0)
    model = qwen2(**tiny.SHAPE | {"vocab_size": size, "num_layers": 1})
    torch.nn.init.normal_(
        model.tok_embeddings.weight, std=0.01
    )  # nearly uniform over the vocabulary
    prompt = draw(tokenizer, folder, "1", prompt_template="{question}")
    params = SamplingParams(temperature=1.0, max_new_tokens=100)
    (group,) = LocalSampler(lambda: model, tokenizer).sample(
        [prompt], group_size=16, params=params, seeds=[0]
    )

    stops = set(getattr(tokenizer, "stop_tokens", [tokenizer.eos_id]))
    assert {"stop", "length"} >= {completion.finish_reason for completion in group} >= {"stop"}
    for completion in group:
        assert [token in stops for token in completion.tokens[:-1]] == [False] * (
            len(completion.tokens) - 1
        )
        assert (completion.tokens[-1] in stops) == (completion.finish_reason == "stop")
        assert not any(
            token in completion.text for token in (BOS, END, "<|eot_id|>", "<|end_of_text|>")
        )
        assert completion.text
    assert {completion.tokenizer for completion in group} == {tokenizer_fingerprint(tokenizer)}
