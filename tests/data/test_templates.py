"""Prompt templates through torchtune's tokenizer classes: a special token in them is one token."""

import base64
import json
import re

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, processors
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS, Llama3Tokenizer
from torchtune.models.qwen2 import qwen2, qwen2_tokenizer
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

from gspo import tiny
from gspo.data import readers
from gspo.errors import DataError, InputError
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


@pytest.fixture
def qwen(folder):
    files = {"path": folder / "vocab.json", "merges_file": folder / "merges.txt"}
    return qwen2_tokenizer(**files, special_tokens_path=str(folder / "tokenizer.json"))


@pytest.fixture
def huggingface_with_bos(folder):
    """Hugging Face's tokenizer with a begin-of-sequence token before every text it encodes."""
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    inner.save(str(folder / "with_bos.json"))
    names = str(folder / "tokenizer_config.json")
    return HuggingFaceBaseTokenizer(str(folder / "with_bos.json"), tokenizer_config_json_path=names)


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


def test_qwen_template_gives_the_tokens_of_its_own_encode(qwen, tmp_path):
    prompt = draw(qwen, tmp_path, "user 1 + 2", prompt_template=TEMPLATE)
    assert prompt.tokens == qwen.encode(prompt.text, add_bos=False, add_eos=False)
    assert prompt.tokens.count(qwen.special_tokens[END]) == 2


def special_ids_and_text(tokenizer, ids):
    """The special tokens among ids, and the text of all."""
    if isinstance(tokenizer, HuggingFaceBaseTokenizer):
        special = set(tokenizer.tokenizer.get_added_tokens_decoder())
        text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    elif isinstance(tokenizer, Llama3Tokenizer):
        special = set(tokenizer.special_tokens.values())
        text = tokenizer.decode(ids, truncate_at_eos=False, skip_special_tokens=False)
    else:
        special = set(tokenizer.special_tokens.values())
        text = tokenizer.decode(ids)
    return [i for i in ids if i in special], text


TOKENIZERS = pytest.mark.parametrize(
    "kind", ["qwen", "llama", "huggingface", "huggingface_with_bos"]
)


@TOKENIZERS
@pytest.mark.parametrize(
    "value",
    [
        "<|im_end|>",
        "<|eot_id|>",
        f"1{END}\n{BOS}user\n2 {END}{END} größe",
        f"<|im_{END}end|>",
        f"{END[:-1]}{BOS}",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nx<|endoftext|>",
    ],
    ids=["qwen", "llama", "turns", "nested", "half", "others"],
)
def test_special_tokens_in_a_row_are_text(kind, value, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    prompt = draw(tokenizer, tmp_path, value, prompt_template="{question}", add_bos=False)
    tokens = prompt.tokens
    if kind == "huggingface_with_bos":
        assert tokens[0] == tokenizer.bos_id
        tokens = tokens[1:]
    assert special_ids_and_text(tokenizer, tokens) == ([], value)
    assert prompt.text == value


@TOKENIZERS
def test_special_tokens_of_the_template_stay_beside_those_of_a_row(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    end, bos = ("<|eot_id|>", "<|end_of_text|>") if kind == "llama" else (END, BOS)
    template = f"{end}\n{{question}}{end}{{{{{{question}}}}}}{bos}x"
    value = f"1{end}{bos} 2{end[:-1]}"
    prompt = draw(tokenizer, tmp_path, value, prompt_template=template, add_bos=True)
    plain = draw(tokenizer, tmp_path, "1", prompt_template=template, add_bos=True)
    special, text = special_ids_and_text(tokenizer, prompt.tokens)
    assert special == special_ids_and_text(tokenizer, plain.tokens)[0]
    assert len(special) == 3 + (tokenizer.bos_id is not None)
    assert prompt.text == template.format(question=value)
    assert text.endswith(prompt.text)


@TOKENIZERS
@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("<|im_{question}", "end|>"),
        ("{question}|im_end|>", "<"),
        ("<|im_{question}end|>", ""),
        ("{question}{question}", "<|im_end|"),
        (f"{END}{{question}}", END[1:]),
    ],
    ids=["value_ends_it", "value_begins_it", "empty", "twice", "behind_the_templates"],
)
def test_special_token_of_template_and_row_together_is_text(
    kind, template, value, request, tmp_path
):
    tokenizer = request.getfixturevalue(kind)
    prompt = draw(tokenizer, tmp_path, value, prompt_template=template, add_bos=False)
    special, text = special_ids_and_text(tokenizer, prompt.tokens)
    num_special = template.count(END) if kind != "llama" else 0
    assert len(special) == num_special + (kind == "huggingface_with_bos")
    assert text.endswith(template.format(question=value))


@TOKENIZERS
@pytest.mark.parametrize("template", ["{question}", "user {question}\n", TEMPLATE])
@pytest.mark.parametrize("value", ["user 1 + 2", "", "<|im_en", "< |im_end|>", "größe <user>\n\n"])
def test_rows_without_special_tokens_have_the_ids_of_the_whole_text(
    kind, template, value, request, tmp_path
):
    tokenizer = request.getfixturevalue(kind)
    if kind == "llama":
        template = template.replace(END, "<|eot_id|>")
    prompt = draw(tokenizer, tmp_path, value + "1", prompt_template=template, add_bos=True)
    whole = []
    for piece in re.split(r"(<\|eot_id\|>)", prompt.text):  # llama's encode knows none
        if piece == "<|eot_id|>":
            whole.append(LLAMA[piece])
        else:
            whole += tokenizer.encode(piece, add_bos=False, add_eos=False)
    if tokenizer.bos_id is not None and kind != "huggingface_with_bos":
        whole.insert(0, tokenizer.bos_id)
    assert prompt.tokens == whole


def test_text_is_whole_for_a_tokenizer_that_takes_special_tokens_for_text(
    llama, tmp_path, monkeypatch
):
    encoded = []
    encode = llama.encode
    monkeypatch.setattr(llama, "encode", lambda text, **knobs: encoded.append(text) or encode(text))
    draw(llama, tmp_path, "1<|eot_id|>2", prompt_template="a{question}b")
    assert encoded[-1] == "a1<|eot_id|>2b"


def test_special_tokens_of_a_single_id_are_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "special_tokens", dict.fromkeys(llama.special_tokens, 3))
    with pytest.raises(DataError, match=r"^tokenizer: all \d+ special tokens have the id 3; get"):
        draw(llama, tmp_path, "1")


def with_tokens(folder, *tokens):
    """Hugging Face's tokenizer with more added tokens, and their ids."""
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens(list(tokens))
    inner.save(str(folder / "more.json"))
    names = str(folder / "tokenizer_config.json")
    tokenizer = HuggingFaceBaseTokenizer(
        str(folder / "more.json"), tokenizer_config_json_path=names
    )
    return tokenizer, [inner.token_to_id(token.content) for token in tokens]


def test_turn_markers_that_a_huggingface_file_calls_not_special_are_text_in_a_row(folder):
    added = [AddedToken("<｜User｜>", special=False), AddedToken("1 +", special=False)]
    tokenizer, (user, words) = with_tokens(folder, *added)
    template = "<｜User｜>{question}"
    tokens = draw(tokenizer, folder, "1 + <｜User｜>", prompt_template=template).tokens
    assert (tokens.count(user), tokens.count(words)) == (1, 1)
    assert tokenizer.decode(tokens) == "<｜User｜>1 + <｜User｜>"


def test_special_token_of_the_template_stays_where_one_with_the_row_overlaps_it(folder):
    tokenizer, (overlapping,) = with_tokens(folder, AddedToken("|><b>", special=True))
    tokens = draw(tokenizer, folder, "<b>1", prompt_template=f"{END}{{question}}").tokens
    assert tokens[:2] == [tokenizer.bos_id, tokenizer.eos_id]
    assert overlapping not in tokens
    assert tokenizer.decode(tokens) == "<b>1"


@pytest.mark.parametrize("kind", ["huggingface_with_bos", "huggingface"])
def test_huggingface_template_has_single_special_tokens_and_one_bos(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokens = draw(tokenizer, tmp_path, "user 1 + 2", prompt_template=TEMPLATE, add_bos=True).tokens
    assert tokens[:2] == [tokenizer.bos_id, tokenizer.eos_id]
    assert (tokens.count(tokenizer.bos_id), tokens.count(tokenizer.eos_id)) == (1, 2)
    assert tokenizer.tokenizer.decode(tokens) == "\n\nuser 1 + 2answer\n\n"


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
