"""Filters of records: what they keep, in every kind of source; what is refused; what a kill leaves."""
from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import make_tokenizer

from lrc_edge.corpus.filters import COMPARISONS, Filter, Filters
from lrc_edge.corpus.held_out import HeldOut, is_held_out
from lrc_edge.corpus.sources import LEFT_OUT, Document, Fields, documents, known_fields, source_documents
from lrc_edge.errors import UserError
from lrc_edge.recipe import load_recipe, to_toml
from lrc_edge.train.data.shards import shard_file
from lrc_edge.train.data.tokenize import STATE_FILE, PackedRows, describe, prepare, read_summary

TOKENIZER = make_tokenizer("llama3")
ROWS: list[dict[str, Any]] = [
    {"text": "Five.", "score": 5}, {"text": "Four.", "score": 4.0}, {"text": "Less.", "score": 3.99},
    {"text": "Null.", "score": None}, {"text": "Nested.", "score": 4, "metadata": {"score": 1}}]
CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def kept(source: str | Path, *filters: str) -> list[Document]:
    """The documents; the file's filters must have found their fields."""
    fields = Fields(filters=Filters(filters))
    found = list(documents([str(source)], fields))
    fields.filters.check_found()
    return found


@pytest.mark.parametrize(("text", "kept"), [
    ("score >= 4", [4, 5]), ("score>4", [5]), ("  score <= 4  ", [3, 4]), ("score < 4.0", [3]), ("score == 4", [4]),
    ("score != 4e0", [3, 5]), ("score > -1", [3, 4, 5])])
def test_every_comparison(text: str, kept: list[int]) -> None:
    one = Filter.parse(text)
    assert [value for value in (3, 4, 5) if one.keeps(value, "")] == kept
    assert one.field == "score" and one.comparison in COMPARISONS
    assert one.keeps(Decimal(4), "") == (4 in kept)
    assert Filter.parse(str(one)) == one


@pytest.mark.parametrize("text", ["score >=", "score >= x", "import os", ">= 4", "score", "", "score = 4", "4",
                                  "score >= 4 >= 5", "score >== 4", "score >= nan", "score < inf", "score => 4",
                                  "__import__('os') >= 4 or 1", "score >= 4; import os"])
def test_damaged_conditions_are_refused_before_anything_is_read(text: str) -> None:
    with pytest.raises(UserError, match=r"recipe: data.filters: .* is not a condition; need a field, one of >= <= ==") \
            as caught:
        load_recipe(None, (), data={"filters": [text]})
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_filters_of_the_recipe_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data.filters=score >= 4, metadata.int_score != 0"])
    assert recipe.data.filters == ("score >= 4", "metadata.int_score != 0")
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "r.toml") == recipe


def test_jsonl(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *ROWS, {"text": "No field."}, CHAT, {**CHAT, "score": 1})
    chat = CHAT["messages"]
    assert kept(file, "score >= 4") == ["Five.", "Four.", "Null.", "Nested.", "No field.", chat]
    assert kept(file, "score < 4") == ["Less.", "Null.", "No field.", chat, chat]
    assert kept(file, "score >= 4", "score < 5") == ["Four.", "Null.", "Nested.", "No field.", chat]
    assert "Nested." not in kept(file, "metadata.score > 1") and "Nested." in kept(file, "metadata.score <= 1")
    stream = list(source_documents(file, Fields(filters=Filters(["score >= 4"]))))
    assert [document is LEFT_OUT for document in stream] == [False, False, True, False, False, False, False, True]


def test_parquet_reads_the_columns_that_are_compared(tmp_path: Path) -> None:
    """Nested ones, too; of a column that is not compared, nothing is read."""
    file = tmp_path / "a.parquet"
    table = {"text": ["Five.", "Three.", "Null."], "score": [5.0, 3.0, None],
             "metadata": [{"int_score": 5, "url": "a"}, {"int_score": 3, "url": "b"}, {"int_score": 4, "url": "c"}]}
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    assert kept(file, "score >= 4") == ["Five.", "Null."]
    assert kept(file, "metadata.int_score < 5") == ["Three.", "Null."]
    other = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One."]}), other)
    assert kept(tmp_path, "score >= 4") == ["Five.", "Null.", "One."], "a folder, one file of which has the field"


def test_the_hub_and_a_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS[:3]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert kept("org/name", "score >= 4") == ["Five.", "Four."]
    (tmp_path / "a.txt").write_text("score 1")
    assert list(documents([str(tmp_path / "a.txt")], Fields(filters=Filters(["score >= 4"])))) == ["score 1"]


@pytest.mark.parametrize("value", ["4", True, [4], {"x": 4}])
def test_a_value_that_is_no_number_is_named_with_its_line(value: Any, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "One.", "score": 4}, {"text": "Two.", "score": value}]
    with pytest.raises(UserError, match=r"a.jsonl:2: score is .*, and data.filters compares it with a") as caught:
        kept(write(tmp_path / "a.jsonl", *rows), "score >= 4")
    assert "\n" not in str(caught.value)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One."], "score": [value]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet row 1: score is "):
        kept(tmp_path / "a.parquet", "score >= 4")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
    with pytest.raises(UserError, match=r"org/name row 2: score is "):
        kept("org/name", "score >= 4")


def test_a_field_that_no_source_has_is_named_with_those_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no record has a field 'scoer' .*scoer >= 4.*; fields found: text, score,"):
        kept(write(tmp_path / "a.jsonl", *ROWS), "scoer >= 4")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One."], "metadata": [{"int_score": 4}]}),
                                tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"fields found: text, metadata.int_score; correct the name"):
        kept(tmp_path / "b.parquet", "int_score >= 4")
    (tmp_path / "c.txt").write_text("Text.")
    with pytest.raises(UserError, match="fields found: none"):
        kept(tmp_path / "c.txt", "score >= 4")
    assert kept(tmp_path / "c.txt") == ["Text."]


def test_fields_that_are_known_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of sources with a schema; of others, only the records show them."""
    table = pyarrow.table({"text": ["One."], "metadata": [{"int_score": 4, "url": "x"}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("Text.")
    assert known_fields(str(tmp_path)) == known_fields(str(tmp_path / "a.parquet")) == [
        "text", "metadata.int_score", "metadata.url"]
    assert known_fields("self") == known_fields(str(tmp_path / "b.txt")) == []
    write(tmp_path / "c.jsonl", *ROWS)
    assert known_fields(str(tmp_path)) is known_fields(str(tmp_path / "c.jsonl")) is None
    (tmp_path / "d.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        known_fields(str(tmp_path / "d.parquet"))
    typed = datasets.Dataset.from_list([{"text": "x", "metadata": {"int_score": 4}}]).to_iterable_dataset()
    untyped = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: {"typed": typed, "untyped": untyped}[name])
    assert known_fields("typed") == ["text", "metadata.int_score"] and known_fields("untyped") is None


# -- through the data stage --------------------------------------------------------------------------------------------

SHARE = 0.1


def corpus(folder: Path, n: int) -> list[str]:
    """Two sources: one of scores 0 to 5, one without."""
    write(folder / "a.jsonl", *({"text": f"a {i}: " + "hello world, " * 5, "score": i % 6} for i in range(n)))
    write(folder / "b.jsonl", *({"text": f"b {i}: " + "hello world, " * 3} for i in range(n // 2)))
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


def make(folder: Path, files: list[str], *texts: str, **changes: Any) -> int:
    folder.mkdir(exist_ok=True)
    fields = Fields(filters=Filters(texts))
    sources = [(Path(file).stem, source_documents(file, fields)) for file in files]
    settings: dict[str, Any] = {"held_out_share": SHARE, "max_tokens": None, "seq_len": 16, "progress": lambda n: None}
    return prepare(sources, TOKENIZER, folder, filters=fields.filters, **{**settings, **changes})


def stop_after(n_tokens: int) -> Any:
    def progress(n: int) -> None:
        if n > n_tokens:
            raise KeyboardInterrupt
    return progress


def test_what_is_filtered_is_neither_trained_on_nor_held_out_and_is_counted(tmp_path: Path) -> None:
    n = make(tmp_path / "data", corpus(tmp_path, 300), "score >= 4")
    records = [json.loads(line) for name in "ab" for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    texts = [record["text"] for record in records if record.get("score", 4) >= 4]
    ids = [i for text in texts if not is_held_out(text, SHARE)
           for i in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]]
    rows = PackedRows(tmp_path / "data", n)
    assert rows[0]["input_ids"].tolist() == ids
    held_out = TOKENIZER.decode(HeldOut.load(tmp_path / "data" / "held_out.npz").ids, skip_special_tokens=True)
    assert held_out == "".join(text for text in texts if is_held_out(text, SHARE)) and held_out
    a, b = read_summary(tmp_path / "data")
    assert (a.filtered_records, b.filtered_records) == (200, 0) and a.documents + a.held_out_documents == 100
    assert describe([a, b]).endswith("; filtered records: 200")


@pytest.mark.parametrize(("weights", "n_tokens", "ran_out"), [((1, 3), 2500, False), ((), 6000, True)])
def test_a_killed_stage_keeps_and_counts_the_same(weights: tuple[int, ...], n_tokens: int, ran_out: bool,
                                                  tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it was killed when the source with the field had run out: that the field was seen is not forgotten."""
    monkeypatch.setattr("lrc_edge.train.data.tokenize.BATCH_DOCUMENTS", 8)
    monkeypatch.setattr("lrc_edge.train.data.tokenize.LOOK_ON_CHARS", 0)  # which would read the first source again
    files, whole, cut = corpus(tmp_path, 300), tmp_path / "whole", tmp_path / "cut"
    make(whole, files, "score >= 4", shard_tokens=1000, weights=weights)
    with pytest.raises(KeyboardInterrupt):
        make(cut, files, "score >= 4", shard_tokens=1000, weights=weights, progress=stop_after(n_tokens))
    state = json.loads((cut / STATE_FILE).read_text())
    assert state["tallies"][0]["ran_out"] == ran_out and state["tallies"][0]["filtered_records"] > 20
    make(cut, files, "score >= 4", shard_tokens=1000, weights=weights)
    assert (cut / "data.json").read_bytes() == (whole / "data.json").read_bytes()
    for index in range(json.loads((whole / "data.json").read_text())["shards"]):
        assert shard_file(cut, "tokens", index).read_bytes() == shard_file(whole, "tokens", index).read_bytes()


def test_filters_that_leave_nothing_or_meet_no_field(tmp_path: Path) -> None:
    files = corpus(tmp_path, 60)
    with pytest.raises(UserError, match=r"data\.filters leaves out all 60 records; lower the limit"):
        make(tmp_path / "data", files[:1], "score > 5")
    with pytest.raises(UserError, match="no record has a field 'int_score'"):
        make(tmp_path / "other", files, "int_score >= 4")
