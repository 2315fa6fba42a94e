import datetime
import inspect
import itertools
import json
import logging
import math
import re
import struct

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gspo.data import readers
from gspo.errors import DataError, InputError
from tests.data.law import assert_resumes_anywhere


class CharTokenizer:
    """One token per character; 1 begins a sequence."""

    def encode(self, text, *, add_bos, add_eos):
        return [1] * add_bos + [ord(character) for character in text] + [2] * add_eos


TOKENIZER = CharTokenizer()
ROWS = [{"question": "x" * (i + 1), "answer": i, "level": i % 3} for i in range(7)]


def write_jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", ROWS)


def ids(reader, num=None):
    return [prompt.id for prompt in itertools.islice(reader, num)]


def make_jsonl(tmp_path, **knobs):
    return readers.jsonl_prompts(
        TOKENIZER, source=write_jsonl(tmp_path / "train.jsonl", ROWS), **knobs
    )


def make_parquet(tmp_path, **knobs):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    return readers.parquet_prompts(TOKENIZER, source=str(tmp_path / "train.parquet"), **knobs)


def make_saved_dataset(tmp_path, **knobs):
    if not (tmp_path / "saved").exists():
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(
            str(tmp_path / "saved")
        )
    return readers.huggingface_prompts(TOKENIZER, source=str(tmp_path / "saved"), **knobs)


def make_reasoning_gym(tmp_path, **knobs):
    return readers.reasoning_gym_prompts(
        TOKENIZER, name="chain_sum", size=7, dataset_seed=5, **knobs
    )


MIXTURE = {
    "chain_sum": {"levels": [{"max_terms": 2}, {"min_terms": 5, "max_terms": 6}], "weight": 3},
    "knights_knaves": {"levels": [{"n_people": 2}, {"n_people": 3}, {"n_people": 4}]},
}


def make_mixture(tmp_path, *, tasks=MIXTURE, size=7, **knobs):
    return readers.reasoning_gym_mixture_prompts(
        TOKENIZER, tasks=tasks, size=size, dataset_seed=5, **knobs
    )


SOURCES = pytest.mark.parametrize(
    "make",
    [make_jsonl, make_parquet, make_saved_dataset, make_reasoning_gym, make_mixture],
    ids=["jsonl", "parquet", "huggingface", "reasoning_gym", "mixture"],
)


@SOURCES
def test_reader_resumes_anywhere(make, tmp_path):
    assert_resumes_anywhere(lambda: make(tmp_path), 17)  # two epochs and a part


@SOURCES
def test_reader_yields_every_row_once_per_epoch(make, tmp_path):
    reader = make(tmp_path, num_epochs=3)
    order = ids(reader)
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert len(order) == 21
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_rows_of_every_file_source_are_equal(tmp_path):
    for make in (make_jsonl, make_parquet, make_saved_dataset):
        prompts = list(make(tmp_path, shuffle=False, num_epochs=1, add_bos=False))
        assert [p.metadata for p in prompts] == ROWS
        assert [p.answer for p in prompts] == [str(i) for i in range(7)]
        assert [p.text for p in prompts] == ["x" * (i + 1) for i in range(7)]
        assert [len(p.tokens) for p in prompts] == [i + 1 for i in range(7)]


def test_local_folder_of_data_files_loads_as_huggingface_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    reader = readers.huggingface_prompts(TOKENIZER, source=str(tmp_path / "data"), shuffle=False)
    assert next(reader).metadata == ROWS[0]


def test_order_depends_on_seed_alone(jsonl):
    orders = [
        ids(readers.jsonl_prompts(TOKENIZER, source=jsonl, seed=seed), 14) for seed in (3, 3, 4)
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in_order"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_split_every_epoch(jsonl, world_size, shuffle):
    knobs = {"source": jsonl, "world_size": world_size, "shuffle": shuffle, "num_epochs": 1}
    drawn = [
        ids(readers.jsonl_prompts(TOKENIZER, rank=rank, **knobs)) for rank in range(world_size)
    ]
    flat = sum(drawn, [])
    assert sorted(flat) == [f"train.jsonl:{i}" for i in range(1, 8)]
    assert max(map(len, drawn)) - min(map(len, drawn)) <= 1


def test_rank_resumes_anywhere(jsonl):
    assert_resumes_anywhere(
        lambda: readers.jsonl_prompts(TOKENIZER, source=jsonl, rank=1, world_size=3), 9
    )


def test_state_of_other_data_is_refused(jsonl, tmp_path):
    state = readers.jsonl_prompts(TOKENIZER, source=jsonl).state_dict()
    other = readers.jsonl_prompts(TOKENIZER, source=write_jsonl(tmp_path / "other.jsonl", ROWS[:5]))
    with pytest.raises(InputError, match="num_rows 7, this run has 5"):
        other.reset(state)
    ranks = readers.jsonl_prompts(TOKENIZER, source=jsonl, world_size=2)
    with pytest.raises(InputError, match="world_size 1, this run has 2"):
        ranks.reset(state)


def test_prompt_has_template_tokens_answer_and_metadata(jsonl):
    prompt = next(
        readers.jsonl_prompts(
            TOKENIZER, source=jsonl, prompt_template="Q{{{question}}}:", shuffle=False
        )
    )
    assert (prompt.id, prompt.text, prompt.answer, prompt.metadata) == (
        "train.jsonl:1",
        "Q{x}:",
        "0",
        ROWS[0],
    )
    assert prompt.tokens == [1, *map(ord, "Q{x}:")]


def test_answer_can_be_absent(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}])
    assert next(readers.jsonl_prompts(TOKENIZER, source=source, answer_column=None)).answer is None


def test_jsonl_ids_are_line_numbers_over_blank_lines_and_unicode(tmp_path):
    lines = [
        "",
        json.dumps({"question": "größe", "answer": "é"}, ensure_ascii=False),
        "  ",
        '{"question":"b","answer":1}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prompts = list(
        readers.jsonl_prompts(
            TOKENIZER, source=str(tmp_path / "a.jsonl"), shuffle=False, num_epochs=1
        )
    )
    assert [(p.id, p.text, p.answer) for p in prompts] == [
        ("a.jsonl:2", "größe", "é"),
        ("a.jsonl:4", "b", "1"),
    ]


def test_reasoning_gym_prompt_carries_its_entry(tmp_path):
    prompt = next(make_reasoning_gym(tmp_path, prompt_template="{expression}=", shuffle=False))
    entry = prompt.metadata["entry"]
    assert prompt.id == "reasoning_gym/chain_sum:0"
    assert prompt.text == f"{entry['metadata']['expression']}="
    assert prompt.answer == entry["answer"]
    assert entry["metadata"]["source_dataset"] == "chain_sum"


def test_mixture_rises_by_the_prompts_seen_and_mixes_by_weight(tmp_path):
    size = 600
    prompts = list(make_mixture(tmp_path, size=size, shuffle=False, num_epochs=1))
    assert len({prompt.id for prompt in prompts}) == size
    counts = {name: 0 for name in MIXTURE}
    for number, prompt in enumerate(prompts):
        name, entry = prompt.metadata["task"], prompt.metadata["entry"]
        level = number * len(MIXTURE[name]["levels"]) // size
        assert prompt.id == f"reasoning_gym/{name}/{level}:{number}"
        assert prompt.metadata["level"] == level
        assert entry["metadata"]["source_dataset"] == name
        if name == "chain_sum":
            assert entry["metadata"]["num_terms"] in ((2,), (5, 6))[level]
        counts[name] += 1
    assert abs(counts["chain_sum"] - 0.75 * size) < 0.08 * size
    again = list(make_mixture(tmp_path, size=size, shuffle=False, num_epochs=1))
    assert [prompt.text for prompt in again] == [prompt.text for prompt in prompts]


def test_mixture_has_the_same_level_on_all_ranks(tmp_path):
    options = {"size": 60, "shuffle": False, "num_epochs": 1, "world_size": 2}
    first, second = (list(make_mixture(tmp_path, rank=rank, **options)) for rank in range(2))
    assert len(first) == len(second) == 30
    for number, pair in enumerate(zip(first, second, strict=True)):
        for row, prompt in enumerate(pair, start=2 * number):
            assert prompt.id.endswith(f":{row}")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], r"tasks: \[\] must be a mapping of tasks; write"),
        ({"chain_sums": {"levels": [{}]}}, "tasks.chain_sums: reasoning-gym has no 'chain_sums'"),
        ({"chain_sum": {"level": [{}]}}, "tasks.chain_sum.level: is unknown; did you mean 'levels"),
        ({"chain_sum": {}}, "tasks.chain_sum.levels: None must be a list of the task's options"),
        ({"chain_sum": {"levels": [3]}}, "tasks.chain_sum.levels.0: 3 must be a mapping of the"),
        (
            {"chain_sum": {"levels": [{}, {"terms": 2}]}},
            "tasks.chain_sum.levels.1: reasoning-gym's chain_sum refuses {'terms': 2}",
        ),
        (
            {"chain_sum": {"levels": [{}], "weight": 0}},
            "tasks.chain_sum.weight: 0 must be a number above 0",
        ),
    ],
    ids=["none", "name", "key", "no levels", "no options", "options", "weight"],
)
def test_bad_mixture_names_its_key(tmp_path, tasks, message):
    with pytest.raises(InputError, match=message):
        make_mixture(tmp_path, tasks=tasks)


def test_component_shows_its_keywords():
    parameters = inspect.signature(readers.reasoning_gym_prompts).parameters
    assert {
        "tokenizer",
        "name",
        "size",
        "dataset_options",
        "prompt_template",
        "rank",
        "num_epochs",
    } <= set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_long_prompts_are_skipped_and_counted(jsonl, caplog):
    knobs = {
        "source": jsonl,
        "max_prompt_tokens": 4,
        "on_long_prompt": "skip",
    }  # of 2..8 tokens with the first one
    reader = readers.jsonl_prompts(TOKENIZER, num_epochs=2, **knobs)
    with caplog.at_level(logging.WARNING):
        assert sorted(set(ids(reader))) == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert reader.num_skipped == 8
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert_resumes_anywhere(lambda: readers.jsonl_prompts(TOKENIZER, **knobs), 8)


def test_skips_survive_a_resume(jsonl):
    knobs = {"source": jsonl, "max_prompt_tokens": 2, "on_long_prompt": "skip", "shuffle": False}
    reader = readers.jsonl_prompts(TOKENIZER, **knobs)
    assert ids(reader, 2) == ["train.jsonl:1", "train.jsonl:1"]
    restored = readers.jsonl_prompts(TOKENIZER, **knobs)
    restored.reset(reader.state_dict())
    next(restored)  # over the rest of the epoch, all skipped, which is no all-skipped pass
    assert restored.num_skipped == 12


def test_pass_without_any_prompt_raises(jsonl):
    reader = readers.jsonl_prompts(
        TOKENIZER, source=jsonl, max_prompt_tokens=1, on_long_prompt="skip"
    )
    with pytest.raises(
        InputError, match="all 7 prompts of a pass are longer than max_prompt_tokens: 1"
    ):
        next(reader)


def test_long_prompt_raises_by_default(jsonl):
    reader = readers.jsonl_prompts(TOKENIZER, source=jsonl, max_prompt_tokens=7, shuffle=False)
    assert len(ids(reader, 6)) == 6
    with pytest.raises(
        InputError, match=r"train.jsonl:7: the prompt has 8 tokens, more than max_prompt_tokens: 7"
    ):
        next(reader)


GOOD_LINE = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD_LINE}\n{{'question': 1}}\n", r"bad\.jsonl:2: not JSON"),
        (f"{GOOD_LINE}\n\n[1, 2]\n", r"bad\.jsonl:3: a list, not a JSON object"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        (
            '{"question": "q", "solution": "a"}\n',
            "answer_column: bad.jsonl:1 has no field 'answer'; it has 'question', 's",
        ),
        (
            '{"problem": "q", "answer": "a"}\n',
            "prompt_template: bad.jsonl:1 has no field 'question'",
        ),
    ],
    ids=["not_json", "not_an_object", "empty", "blank", "no_answer_column", "no_template_field"],
)
def test_bad_jsonl_shows_when_opened(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        readers.jsonl_prompts(TOKENIZER, source=str(tmp_path / "bad.jsonl"))


def test_bytes_that_are_not_text_name_their_line(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(f"{GOOD_LINE}\n".encode() + b'{"question": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:2: not JSON"):
        readers.jsonl_prompts(TOKENIZER, source=str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("depth", [101, 900, 50_000])
def test_row_that_is_nested_too_deep_names_its_line(tmp_path, depth):
    deep = '{"x": ' * (depth // 2) + "[" * (depth - depth // 2) + "]" * (depth - depth // 2)
    deep += "}" * (depth // 2)
    (tmp_path / "bad.jsonl").write_text(f"{GOOD_LINE}\n{deep}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: nested more than 100 deep; keep"):
        readers.jsonl_prompts(TOKENIZER, source=str(tmp_path / "bad.jsonl"))


def test_long_flat_row_is_read(tmp_path):
    row = {"question": "{" * 200, "answer": "1", "x": [{}] * 200}
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    assert next(readers.jsonl_prompts(TOKENIZER, source=source)).metadata == row


def test_number_of_too_many_digits_names_its_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text(f'{{"question": "q", "answer": {"1" * 5000}}}')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not JSON: Exceeds the limit"):
        readers.jsonl_prompts(TOKENIZER, source=str(tmp_path / "bad.jsonl"))


def make_reader(kind, folder, columns):
    table = pyarrow.table(columns)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, folder / "a.parquet")
        return readers.parquet_prompts(TOKENIZER, source=str(folder / "a.parquet"), shuffle=False)
    datasets.Dataset(table).save_to_disk(str(folder / "a"))
    return readers.huggingface_prompts(TOKENIZER, source=str(folder / "a"), shuffle=False)


ARROW = pytest.mark.parametrize("kind", ["parquet", "huggingface"])


@ARROW
@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["q", None], "None"),
        ([b"q", b"\xff"], "b'q'"),
        ([1.5, math.nan], "nan"),
        ([1.5, -math.inf], "-inf"),
        ([["q"], ["r"]], r"\['q'\]"),
        ([{"q": 1}, {"q": 2}], "{'q': 1}"),
        ([datetime.date(2020, 1, 2)] * 2, r"datetime\.date\(2020, 1, 2\)"),
    ],
    ids=["null", "bytes", "nan", "inf", "list", "struct", "date"],
)
@pytest.mark.parametrize("column", ["question", "answer"])
def test_value_that_is_no_text_number_or_boolean_names_row_and_column(
    tmp_path, kind, column, values, shown
):
    columns = {"question": ["q", "r"], "answer": ["1", "2"]} | {column: values}
    with pytest.raises(DataError, match=rf":[01]: {shown} in column '{column}' must be") as caught:
        list(itertools.islice(make_reader(kind, tmp_path, columns), 2))
    assert ("answer_column: null" in str(caught.value)) == (column == "answer")


@ARROW
def test_numbers_and_booleans_are_text_in_a_prompt(tmp_path, kind):
    columns = {"question": [1.5, 2.0], "answer": [True, False], "unused": [None, None]}
    prompts = list(itertools.islice(make_reader(kind, tmp_path, columns), 2))
    assert [(p.text, p.answer) for p in prompts] == [("1.5", "True"), ("2.0", "False")]


@ARROW
def test_row_of_text_that_is_not_utf8_is_named(tmp_path, kind):
    ends = pyarrow.py_buffer(struct.pack("<3i", 0, 1, 3))
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, ends, pyarrow.py_buffer(b"q\xff\xfe")]
    )
    reader = make_reader(kind, tmp_path, {"question": text, "answer": ["1", "2"]})
    next(reader)
    with pytest.raises(DataError, match=":1: not readable: 'utf-8' codec can't decode byte 0xff"):
        next(reader)


@ARROW
def test_row_with_a_date_beyond_python_s_is_named(tmp_path, kind):
    dates = pyarrow.array([0, 2**55], pyarrow.timestamp("ms"))
    reader = make_reader(kind, tmp_path, {"question": ["1", "2"], "answer": ["1", "2"], "z": dates})
    next(reader)
    with pytest.raises(DataError, match=":1: not readable: "):
        next(reader)


def test_integer_of_any_size_is_text_in_a_prompt(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": 10**400, "answer": 1}])
    assert next(readers.jsonl_prompts(TOKENIZER, source=source)).text == str(10**400)


def test_later_row_without_a_field_names_its_line(tmp_path):
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}]
    )
    reader = readers.jsonl_prompts(TOKENIZER, source=source, shuffle=False)
    next(reader)
    with pytest.raises(InputError, match="answer_column: a.jsonl:2 has no field 'answer'"):
        next(reader)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"on_long_prompt": "drop"}, "on_long_prompt: 'drop' must be 'error' or 'skip'"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: 0 must be a whole number of 1 or more"),
        ({"num_epochs": 0}, "num_epochs: 0 must be a whole number of 1 or more, or null"),
        ({"num_epochs": 1.5}, "num_epochs: 1.5 must be a whole number"),
        ({"shuffle": "false"}, "shuffle: 'false' must be true or false"),
        ({"add_bos": None}, "add_bos: None must be true or false"),
        ({"rank": 2, "world_size": 2}, "rank: 2 must be"),
        ({"world_size": 8}, "7 rows are too few for 8 data-parallel ranks"),
        ({"prompt_template": "{question"}, "prompt_template: .*double a brace"),
        (
            {"prompt_template": "Solve it."},
            "prompt_template: 'Solve it.' must name the row's fields",
        ),
        ({"prompt_template": "{}"}, "must name the row's fields"),
        (
            {"promt_template": "{question}"},
            "promt_template: jsonl_prompts takes no such .* mean 'prompt_template'",
        ),
    ],
    ids=[
        "long",
        "budget",
        "epochs",
        "half",
        "order",
        "bos",
        "rank",
        "ranks",
        "brace",
        "constant",
        "nameless",
        "typo",
    ],
)
def test_bad_knob_names_its_key(jsonl, knobs, message):
    with pytest.raises(InputError, match=message):
        readers.jsonl_prompts(TOKENIZER, source=jsonl, **knobs)


def test_source_is_needed():
    with pytest.raises(InputError, match="source: jsonl_prompts needs this argument"):
        readers.jsonl_prompts(TOKENIZER)


@pytest.mark.parametrize(
    "component", [readers.jsonl_prompts, readers.parquet_prompts], ids=["jsonl", "parquet"]
)
def test_missing_file_is_named(component, tmp_path):
    with pytest.raises(InputError, match=re.escape(f"source: '{tmp_path}/none' does not exist")):
        component(TOKENIZER, source=f"{tmp_path}/none")


def test_file_that_is_not_parquet_is_named(jsonl):
    with pytest.raises(InputError, match="not readable as Parquet"):
        readers.parquet_prompts(TOKENIZER, source=jsonl)


def test_unknown_split_lists_the_splits(tmp_path):
    make_saved_dataset(tmp_path)
    with pytest.raises(InputError, match="has no 'test'; there are: train"):
        readers.huggingface_prompts(TOKENIZER, source=str(tmp_path / "saved"), split="test")


def test_folder_without_data_does_not_load(tmp_path):
    with pytest.raises(InputError, match="does not load as a Hugging Face dataset"):
        readers.huggingface_prompts(TOKENIZER, source=str(tmp_path))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"name": "chain_sums"},
            "name: reasoning-gym has no 'chain_sums'; did you mean 'chain_sum'",
        ),
        ({"name": "chain_sum", "size": 0}, "size: 0 must be at least 1"),
        (
            {"name": "chain_sum", "dataset_options": {"terms": 2}},
            "dataset_options: reasoning-gym's chain_sum refuses",
        ),
        (
            {"name": "chain_sum", "dataset_options": {"min_terms": 9}},
            "dataset_options: reasoning-gym's chain_sum refuses",
        ),
    ],
    ids=["name", "size", "option", "value"],
)
def test_bad_reasoning_gym_task_names_its_key(knobs, message):
    with pytest.raises(InputError, match=message):
        readers.reasoning_gym_prompts(TOKENIZER, **knobs)


def test_prompt_without_tokens_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "", "answer": "a"}])
    with pytest.raises(InputError, match="a.jsonl:1: the prompt '' has no tokens"):
        next(readers.jsonl_prompts(TOKENIZER, source=source, add_bos=False))
