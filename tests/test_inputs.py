"""What people call texts, and what lies in their files, is read by its names or refused with the place: containers,
tables, compressed files, scripts without spaces."""

import csv
import gzip
import io
import itertools
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfact_nb.base.downloads import cache_folder
from llmfact_nb.base.files import from_home
from llmfact_nb.base.texts import load_cloze, load_labelled, load_texts
from llmfact_nb.base.tokens import (
    batches_agree, columns_of, probe_tokens, text_list, token_counts, token_lists, token_name,
)  # fmt: skip
from llmfact_nb.evaluate import cloze_accuracy, label_accuracy, labelled_texts
from llmfact_nb.scores.questions import exact_match, f1, words_of


class Numbered:
    "What torch.utils.data asks of a data set."

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return {"text": self.items[i], "label": 0}


TEXTS = ["The city lies on the river.", "A second text\nabout numbers."]
CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "numpy": np.array,
    "series": pd.Series,
    "data set": lambda x: Dataset.from_dict({"text": x, "label": [0] * len(x)}),
    "streamed": lambda x: Dataset.from_dict({"text": x}).to_iterable_dataset(),
    "streamed without known columns": lambda x: Dataset.from_dict({"text": x}).to_iterable_dataset().map(lambda r: r),
    "column": lambda x: Dataset.from_dict({"text": x})["text"],
    "frame": lambda x: pd.DataFrame({"label": [0] * len(x), "text": x}),
    "dict": lambda x: {"text": x, "label": [0] * len(x)},
    "rows": lambda x: [{"text": t, "label": 0} for t in x],
    "column of a frame": lambda x: pd.DataFrame({"text": x}).text,
    "Arrow table": lambda x: pa.table({"label": [0] * len(x), "text": x}),
    "Arrow format": lambda x: Dataset.from_dict({"text": x}).with_format("arrow"),
    "dict of Arrow": lambda x: {"text": pa.array(x)},
    "torch's": lambda x: Numbered(x),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_texts(kind):
    found = text_list(CONTAINERS[kind](TEXTS))
    assert found == TEXTS and all(type(t) is str for t in found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5),
    st.sampled_from(sorted(CONTAINERS)),
)
def test_no_text_changes_on_its_way(texts, kind):
    if kind == "numpy":  # numpy drops NULs at the end of its strings
        texts = [t.rstrip("\0") for t in texts]
    assert text_list(CONTAINERS[kind](texts)) == texts


@pytest.mark.parametrize(
    "wrong, error",
    [
        ("one text", TypeError),
        (b"bytes", TypeError),
        (3, TypeError),
        (None, TypeError),
        ([], ValueError),
        ([b"bytes"], TypeError),
        (["a", None], TypeError),
        ([["nested"]], TypeError),
        ({"train": TEXTS, "test": TEXTS}, TypeError),
        ({"text": "a string"}, TypeError),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), TypeError),
        (IterableDatasetDict(train=Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()), TypeError),
        ({"text": Dataset.from_dict({"text": TEXTS}), "train": 1}, TypeError),
        (Dataset.from_dict({"body": TEXTS}), ValueError),
        (pd.DataFrame({"body": TEXTS}), ValueError),
        ([{"body": "a"}], ValueError),
        (pd.DataFrame({"text": ["a", np.nan]}), TypeError),
        ([TEXTS[0], "half a pair \ud83d"], ValueError),
        (set(TEXTS), TypeError),
        (dict.fromkeys(TEXTS).keys() | {"more"}, TypeError),
        (pd.DataFrame([TEXTS], columns=["text", "text"]), ValueError),
        (np.ma.masked_array(TEXTS, [True, False]), TypeError),
        (itertools.repeat("no end"), ValueError),
    ],
)
def test_what_holds_no_texts_is_refused(wrong, error):
    with pytest.raises(error):
        text_list(wrong)


def test_the_place_of_a_lone_surrogate_is_named():
    with pytest.raises(ValueError) as e:
        text_list(["fine", "half a pair \ud83d"])
    assert "texts[1]" in str(e.value) and "12" in str(e.value) and "D83D" in str(e.value)
    str(e.value).encode()  # and the message can be printed


PAIRS = [("2 + 2 =", "4"), ("3 + 3 =", "6")]


@pytest.mark.parametrize(
    "given_",
    [
        PAIRS,
        [list(p) for p in PAIRS],
        [{"answer": a, "prompt": p} for p, a in PAIRS],
        pd.DataFrame(PAIRS, columns=["prompt", "answer"]),
        Dataset.from_dict({"answer": [a for _, a in PAIRS], "prompt": [p for p, _ in PAIRS]}),
        {"prompt": [p for p, _ in PAIRS], "answer": [a for _, a in PAIRS], "more": [1, 2]},
    ],
)
def test_pairs_are_read_by_their_names(given_):
    assert columns_of(given_, ["prompt", "answer"]) == [["2 + 2 =", "3 + 3 ="], ["4", "6"]]


@pytest.mark.parametrize(
    "wrong", [["ab", "cd"], [("a",)], [("a", "b", "c")], [{"prompt": "a"}], [1], {"prompt": ["a"]}]
)
def test_rows_of_another_shape_are_refused(wrong):
    with pytest.raises((TypeError, ValueError)):
        columns_of(wrong, ["prompt", "answer"])


def test_dict_rows_are_scored_as_pairs_are(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    as_dicts = [{"answer": "w6", "prompt": "w4 w5"}, {"prompt": "w7", "answer": "w8"}]
    pairs = [("w4 w5", "w6"), ("w7", "w8")]
    a, b = (cloze_accuracy(model, tokenizer, data, progress=False) for data in (as_dicts, pairs))
    assert a.fingerprint == b.fingerprint and torch.equal(a.log_likelihoods, b.log_likelihoods)
    labelled = pd.DataFrame({"label": [0, 1], "text": ["w4", "w5 w6"]})
    assert labelled_texts(labelled) == (["w4", "w5 w6"], [0, 1], [])
    tensors = Dataset.from_pandas(labelled).with_format("torch")
    assert labelled_texts(tensors) == labelled_texts(labelled)
    for wrong in (0.5, "0", True, None, torch.tensor(0.5)):
        with pytest.raises(TypeError):
            labelled_texts([("w4", wrong)])
    assert label_accuracy(model, tokenizer, labelled, label_words=["w7", "w8"], progress=False).n == 2


# files

ROWS = [{"text": f'Sentence {i}, "quoted"\nsecond line', "label": str(i % 3)} for i in range(30)]


def table(separator: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "label"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(out)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


LINES = "\n".join(json.dumps(r) for r in ROWS).encode()
FILES = {
    "a.csv": lambda: table(","),
    "a.CSV": lambda: b"\xef\xbb\xbf" + table(","),
    "a.tsv": lambda: table("\t"),
    "a.jsonl": lambda: LINES,
    "a.ndjson": lambda: LINES + b"\n\n",
    "a.json": lambda: json.dumps(ROWS).encode(),
    "columns.json": lambda: json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]}).encode(),
    "data.json": lambda: json.dumps({"version": 1, "data": ROWS}).encode(),
    "a.parquet": parquet,
    "a.Parquet": parquet,
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.csv.GZ": lambda: gzip.compress(table(",")),
    "a.jsonl.zst": lambda: zstd(LINES),
    "a.v2.jsonl": lambda: LINES,
    "lines.json": lambda: LINES,
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_give_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name]())
    texts = [load_texts(tmp_path / name, split) for split in ("fit", "eval")]
    assert sorted(t for part in texts for t in part["text"]) == sorted(r["text"] for r in ROWS)
    labelled = [load_labelled(tmp_path / name, split) for split in ("fit", "eval")]
    assert labelled[0].features["label"].names == ["0", "1", "2"] and sum(map(len, labelled)) == 30


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)] * 2),
        min_size=1,
        max_size=4,
    )
)
def test_any_table_comes_back_from_csv_cell_by_cell(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("prompt", "answer"), *rows])
    kept = [(p.strip(), f" {a.strip()}") for p, a in rows]
    found = load_cloze(path)
    assert list(zip(found["prompt"], found["answer"])) == kept


@pytest.mark.parametrize("load", [load_texts, load_labelled, load_cloze])
@pytest.mark.parametrize(
    "bad, line", [("Yes, indeed,1\n", 2), ('"a","b"\nonly one\n', 3), ('a,b\n"never closed,1\n', 4)]
)
def test_a_ragged_table_is_refused_by_its_line(load, bad, line, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(("prompt,answer\n" if load is load_cloze else "text,label\n") + bad + "Sentence,0\n")
    with pytest.raises(ValueError) as e:
        load(path)
    assert f"{path}, line {line}" in str(e.value)


@pytest.mark.parametrize("header", ["text;label", "text\tlabel", "text,label,text"])
def test_a_header_of_another_kind_is_refused(header, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n{header}\n")
    with pytest.raises(ValueError) as e:
        load_labelled(path)
    assert f"{path}, line 1" in str(e.value)


@pytest.mark.parametrize("label", [None, [1], {"a": 1}, float("nan"), " "])
def test_a_label_is_a_word_or_a_number(label, tmp_path):
    rows = [{"text": f"sentence {i}", "label": 1} for i in range(20)] + [{"text": "the last", "label": label}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError):
        load_labelled(tmp_path / "a.jsonl")


def test_the_limit_of_the_csv_module_is_as_before(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "t.csv").write_text('text\n"' + "long " * 60_000 + '"\n')
    for split in ("fit", "eval"):
        try:
            assert len(load_texts(tmp_path / "t.csv", split)[0]["text"]) == 299_999
        except ValueError:
            pass  # the other split is empty
    assert csv.field_size_limit() == before


def test_a_file_that_is_no_text_is_named_also_in_a_folder(tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.TXT").write_text("words")
    (tmp_path / "33.TXT").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError) as e:
        load_texts(tmp_path)
    assert "33.TXT" in str(e.value)


@pytest.mark.parametrize("name, content", [
    ("a.json", b"{"), ("a.json", b"3"), ("a.json", b'{"a": [1], "b": [1, 2]}'), ("a.json", b"[1]"), ("a.jsonl", b"[1]"),
    ("a.parquet", b"PAR1"), ("a.jsonl.gz", b"no gzip"), ("a.csv", b"\xff"), ("a.pdf", b"%PDF"), ("a", b"text"),
    ("a.jsonl", b'{"text": "half \\ud83d"}'),
])  # fmt: skip
def test_files_that_cannot_be_read_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        load_texts(tmp_path / name)
    assert str(tmp_path / name) in str(e.value)


def test_a_folder_is_its_visible_text_files(tmp_path):
    (tmp_path / "part").mkdir()
    for i in range(30):
        (tmp_path / "part" / f"{i}.txt").write_text(f"words {i}")
        (tmp_path / "part" / f"._{i}.txt").write_bytes(b"\x00\xff")  # what macOS leaves beside a file
    assert sum(len(load_texts(tmp_path, split)) for split in ("fit", "eval")) == 30
    (tmp_path / "none").mkdir()
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "none" / "arrow")
    with pytest.raises(ValueError) as e:
        load_texts(tmp_path / "none")
    assert ".txt" in str(e.value) and str(tmp_path / "none") in str(e.value)


def test_a_txt_file_is_blocks_lines_or_one_document(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\r".join(f"sentence {i}" for i in range(100)).encode())  # as old Macs did
    counts = {}
    for documents in ("blocks", "lines", "file"):
        found = []
        for split in ("fit", "eval"):
            try:
                with pytest.warns(UserWarning) if documents == "blocks" else _nothing():
                    found += load_texts(path, split, documents=documents)["text"]
            except ValueError:
                pass  # one document has no second split
        counts[documents] = len(found)
    assert counts == {"blocks": 1, "lines": 100, "file": 1}


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_texts_with_one_beginning_are_split_by_the_whole(tmp_path):
    rows = [
        {"text": "Below is an instruction that describes a task. Write a response. ### " * 2 + str(i)}
        for i in range(300)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = [len(load_texts(tmp_path / "a.jsonl", split)) for split in ("fit", "eval")]
    assert sum(sizes) == 300 and 30 < sizes[1] < 90


def test_without_a_home_the_variable_is_named(monkeypatch):
    from pathlib import Path

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LLMFACT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError) as e:
        cache_folder()
    assert "LLMFACT_CACHE" in str(e.value) and from_home("/data/run") == "/data/run"
    monkeypatch.setenv("LLMFACT_CACHE", "/data/llmfact")
    assert str(cache_folder()) == "/data/llmfact"


# tokens


class Processor:
    "A processor of a multimodal model holds the tokenizer."

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_swapped_arguments_and_processors(tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    assert token_lists(Processor(tokenizer), ["w4 w5"]) == token_lists(tokenizer, ["w4 w5"])
    tokenizer.tokenizer = object()  # an engine of the same name, which cannot be called
    assert token_lists(tokenizer, ["w4 w5"]) == token_lists(tiny_tokenizer(), ["w4 w5"])
    for wrong in (tiny_model("llama"), None, Processor(None)):
        with pytest.raises(TypeError):
            token_lists(wrong, ["w4"])
    with pytest.raises(TypeError):
        cloze_accuracy(tokenizer, tiny_model("llama"), [("w4", "w5")])


@pytest.mark.parametrize("part", ["template", "label_words", "answer"])
def test_half_a_character_is_named_wherever_it_comes_from(part, tiny_model, tiny_tokenizer):
    model, t = tiny_model("llama"), tiny_tokenizer()
    ask = {
        "template": lambda: label_accuracy(model, t, [("w4", 0)], "\ud83d {text}", ["w5", "w6"]),
        "label_words": lambda: label_accuracy(model, t, [("w4", 0)], "{text}", ["w5", "\ud83d"]),
        "answer": lambda: cloze_accuracy(model, t, [("w4", "\ud83d")]),
    }
    with pytest.raises(ValueError) as e:
        ask[part]()
    assert "D83D" in str(e.value)


def test_probes_are_ordinary_tokens(tiny_model):
    model = tiny_model("llama", pad_token_id=7, eos_token_id=[13, 14])
    model.config.image_token_index = 19
    assert not {7, 19} & set(probe_tokens(model, 5)) and len(set(probe_tokens(model, 5))) == 5


def test_a_rendered_template_has_one_beginning(tiny_tokenizer):
    tokenizer = tiny_tokenizer(special=True)
    (plain,) = token_lists(tokenizer, ["w4 w5"])
    assert plain[0] == tokenizer.bos_token_id and plain[1] != plain[0], "the fixture adds a token at the beginning"
    (rendered,) = token_lists(tokenizer, [f"{tokenizer.bos_token} w4 w5"])
    assert rendered == plain


# scripts


@pytest.mark.parametrize("said, right, score", [
    ("巴黎", "巴黎", 1.0), ("法国巴黎。", "巴黎", 2 / 3), ("กรุงเทพ", "กรุงเทพ", 1.0), ("東京都", "東京", 0.8),
    ("the city of Paris", "Paris", 0.5), ("Київ!", "київ", 1.0), ("서울 시", "서울", 2 / 3),
])  # fmt: skip
def test_f1_of_scripts_without_spaces_counts_characters(said, right, score):
    assert f1(said, right) == pytest.approx(score)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text())
def test_f1_is_a_share_and_symmetric(a, b):
    assert 0 <= f1(a, b) == f1(b, a) <= 1 and f1(a, a) == 1
    if exact_match(a, b):
        assert f1(a, b) == 1
    assert "" not in words_of(a)


# batches


def test_the_look_at_a_batch_happens_once(tiny_model):
    passes, model = [], tiny_model("llama")
    hook = model.register_forward_hook(lambda *a: passes.append(1))
    assert batches_agree(model) and batches_agree(model) and len(passes) == 3
    hook.remove()
    assert not model.training or all(m.training for m in model.modules())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("w45 6\n", max_size=200), min_size=1, max_size=4), st.integers(2, 9), st.booleans())
def test_the_beginning_of_a_text_says_whether_it_is_cut(texts, most, special):
    import families

    tokenizer = families.tokenizer(special=special)
    whole, part = token_lists(tokenizer, texts), token_lists(tokenizer, texts, most=most)
    for a, b in zip(whole, part):
        assert a[:most] == b[:most] and (len(a) > most) == (len(b) > most)
    assert token_counts(tokenizer, texts, most) == [min(len(x), most) for x in whole]


def byte_tokenizer():
    "A byte-level tokenizer without merges: each byte is a token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocabulary, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t)


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8))
def test_parts_of_characters_are_named_by_their_bytes(text):
    tokenizer = byte_tokenizer()
    (ids,) = token_lists(tokenizer, [text])
    expected = [chr(b) if b < 128 else f"<0x{b:02X}>" for b in text.encode()]
    assert [token_name(tokenizer, i) for i in ids] == expected
