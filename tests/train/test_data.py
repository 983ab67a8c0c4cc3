"""The data stage: mixtures, shards, rows and their labels, what a kill leaves, the cache."""
from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tokenizer

from lrc_edge.corpus.encode import token_ids
from lrc_edge.corpus.held_out import HeldOut, is_held_out
from lrc_edge.corpus.sources import Document
from lrc_edge.errors import UserError
from lrc_edge.train.data import token_cache
from lrc_edge.train.data.shards import shard_count, shard_file
from lrc_edge.train.data.tokenize import STATE_FILE, PackedRows, describe, prepare, read_summary

TOKENIZER = make_tokenizer("llama3")
SHARE = 0.1


def texts(name: str, n: int, words: int = 3) -> list[Document]:
    return [f"{name} {i}: " + "hello world, " * words for i in range(n)]


def make(folder: Path, *sources: Sequence[Document], **changes: Any) -> int:
    folder.mkdir(exist_ok=True)
    named = [(chr(ord("a") + i), documents) for i, documents in enumerate(sources)]
    settings: dict[str, Any] = {"held_out_share": SHARE, "max_tokens": None, "seq_len": 16, "progress": lambda n: None}
    return prepare(named, TOKENIZER, folder, **{**settings, **changes})


def stream_of(documents: Sequence[Document]) -> list[list[int]]:
    return token_ids(TOKENIZER, [str(d) for d in documents if not is_held_out(d, SHARE)])


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrc_edge.train.data.tokenize.BATCH_DOCUMENTS", 8)


def test_every_token_once_in_order_and_the_rest_held_out(tmp_path: Path) -> None:
    first, second = texts("a", 300), ["", " \n", *texts("b", 50)]
    n = make(tmp_path, first, second)
    expected = [i for row in stream_of([*first, *second[2:]]) for i in row]
    tokens = np.load(shard_file(tmp_path, "tokens", 0))
    assert tokens.tolist() == expected and n == len(expected) and tokens.dtype == np.uint16
    assert not shard_file(tmp_path, "loss", 0).exists() and not (tmp_path / STATE_FILE).exists()
    held_out = HeldOut.load(tmp_path / "held_out.npz")
    text = TOKENIZER.decode(held_out.ids, skip_special_tokens=True)
    assert text == "".join(str(d) for d in [*first, *second] if str(d).strip() and is_held_out(d, SHARE))
    assert held_out.n_bytes == len(text)
    a, b = read_summary(tmp_path)
    assert a.documents + a.held_out_documents == 300 and b.documents + b.held_out_documents == 50
    assert a.tokens + b.tokens == n and a.ran_out and b.ran_out
    shares = [row["share"] for row in json.loads((tmp_path / "data.json").read_text())["sources"]]
    assert sum(shares) == pytest.approx(1) and shares[0] == a.tokens / n


@pytest.mark.parametrize(("docs", "message"), [
    ([], "no text in it"), (["", "  \n"], "no text in it"), (["Hi."] * 3, "need at least train.seq_len = 64"),
    (["A long enough document, again and again. " * 30], "none held out"),
])
def test_empty_or_too_short_data(docs: list[Document], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, docs, held_out_share=1e-9, seq_len=64)


def test_a_mixture_follows_its_weights(tmp_path: Path, small_batches: None) -> None:
    """Shares of tokens, not of documents: the sources' documents are of very different lengths."""
    sources = texts("a", 5000, 1), texts("b", 5000, 20), texts("c", 5000, 5)
    n = make(tmp_path, *sources, weights=(1, 2, 5), max_tokens=60_000)
    assert 60_000 <= n < 62_000
    tallies = read_summary(tmp_path)
    batch_tokens = 8 * 22 * 8
    for tally, weight in zip(tallies, (1, 2, 5), strict=True):
        assert abs(tally.tokens - n * weight / 8) < batch_tokens and not tally.ran_out
    assert "ran out" not in describe(tallies) and describe(tallies).startswith("a 1")
    again = tmp_path / "again"
    make(again, *sources, weights=(1, 2, 5), max_tokens=60_000)
    assert shard_file(again, "tokens", 0).read_bytes() == shard_file(tmp_path, "tokens", 0).read_bytes()


def test_a_source_that_runs_out_leaves_the_mixture_and_is_told(tmp_path: Path, small_batches: None) -> None:
    n = make(tmp_path, texts("a", 40), texts("b", 3000), weights=(1, 1), max_tokens=20_000)
    a, b = read_summary(tmp_path)
    assert a.ran_out and not b.ran_out and n >= 20_000 and a.tokens < 0.1 * n
    assert f"a {a.tokens / n:.1%}, ran out; b " in describe([a, b])


def test_a_small_budget_still_holds_out(tmp_path: Path, small_batches: None) -> None:
    docs = texts("a", 3000)
    n = make(tmp_path, docs, max_tokens=50, held_out_share=0.02)
    tally, = read_summary(tmp_path)
    assert 50 <= n < 500 and tally.documents <= 8 and 512 <= tally.read < 540
    held_out = [str(d) for d in docs[:tally.read] if is_held_out(d, 0.02)]
    text = TOKENIZER.decode(HeldOut.load(tmp_path / "held_out.npz").ids, skip_special_tokens=True)
    assert text == "".join(held_out) and len(held_out) == tally.held_out_documents > 3
    assert not tally.ran_out


def rows_of(folder: Path, seq_len: int, isolate: bool = False) -> tuple[PackedRows, list[dict[str, Any]]]:
    rows = PackedRows(folder, seq_len, isolate)
    return rows, [{key: value.tolist() for key, value in rows[i].items()} for i in range(len(rows))]


@pytest.mark.parametrize("shard_tokens", [10, 100, 10**9])
def test_rows_cover_the_stream_over_shards(shard_tokens: int, tmp_path: Path, small_batches: None) -> None:
    docs = texts("a", 90)
    n = make(tmp_path, docs, shard_tokens=shard_tokens)
    documents = stream_of(docs)
    assert (shard_count(tmp_path) == 1) == (shard_tokens == 10**9)
    stream = [i for ids in documents for i in ids]
    number = [k for k, ids in enumerate(documents) for _ in ids]
    rows, plain = rows_of(tmp_path, 33)
    _, isolated = rows_of(tmp_path, 33, isolate=True)
    assert rows.n_tokens == n == len(stream) and len(rows) == n // 33
    assert [i for row in plain for i in row["input_ids"]] == stream[:n // 33 * 33]
    for i, (row, apart) in enumerate(zip(plain, isolated, strict=True)):
        span = slice(33 * i, 33 * i + 33)
        assert row.keys() == {"input_ids", "labels"} and apart["input_ids"] == row["input_ids"]
        assert row["labels"] == [*row["input_ids"][1:], -100]
        mine = number[span]
        assert apart["documents"] == [k - mine[0] for k in mine]
        assert apart["labels"] == [*(new if a == b else -100 for new, a, b
                                     in zip(stream[span][1:], mine, mine[1:], strict=False)), -100]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_row_may_cross_many_shards(tmp_path: Path, small_batches: None) -> None:
    docs = texts("a", 90)
    make(tmp_path, docs, shard_tokens=1)
    assert shard_count(tmp_path) == 12
    stream = [i for ids in stream_of(docs) for i in ids]
    assert PackedRows(tmp_path, len(stream))[0]["input_ids"].tolist() == stream
    there = pickle.dumps(PackedRows(tmp_path, len(stream), isolate=True))
    assert len(there) < 500 and pickle.loads(there)[0].keys() == {"input_ids", "labels", "documents"}
    types = {key: str(value.dtype) for key, value in PackedRows(tmp_path, 16, isolate=True)[0].items()}
    assert types == {"input_ids": "torch.int64", "labels": "torch.int64", "documents": "torch.int32"}


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "__len__", lambda self: 2**16 + 1)
    make(tmp_path, texts("a", 50))
    assert np.load(shard_file(tmp_path, "tokens", 0)).dtype == np.uint32


class Killed(Exception):
    pass


def until(documents: Sequence[Document], n: int) -> Iterator[Document]:
    yield from documents[:n]
    raise Killed


def test_a_killed_stage_goes_on_behind_its_last_shard(tmp_path: Path, small_batches: None) -> None:
    sources = texts("a", 200), texts("b", 400, 5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make(whole, *sources, weights=(1, 3), shard_tokens=1000)
    cut.mkdir()
    with pytest.raises(Killed):
        prepare([("a", sources[0]), ("b", until(sources[1], 300))], TOKENIZER, cut, weights=(1, 3), shard_tokens=1000,
                held_out_share=SHARE, max_tokens=None, seq_len=16, progress=lambda n: None)
    finished = shard_file(cut, "tokens", 2).stat().st_mtime_ns
    seen: list[int] = []
    make(cut, *sources, weights=(1, 3), shard_tokens=1000, progress=seen.append)
    assert shard_file(cut, "tokens", 2).stat().st_mtime_ns == finished and seen[0] > 3000
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in cut.iterdir())
    for name in names:
        if name.endswith(".npz"):
            assert HeldOut.load(whole / name).ids.tolist() == HeldOut.load(cut / name).ids.tolist()
        else:
            assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_the_cache_makes_a_corpus_once_and_continues_a_killed_one(tmp_path: Path) -> None:
    made: list[str] = []

    def work(folder: Path) -> None:
        made.append("begun" if not (folder / "half").exists() else "continued")
        (folder / "half").write_text("")
        if len(made) == 1:
            raise Killed
        (folder / "tokens").write_text("1 2 3")

    with pytest.raises(Killed):
        token_cache.make_or_link(tmp_path / "cache", "key", tmp_path / "a", work)
    token_cache.make_or_link(tmp_path / "cache", "key", tmp_path / "a", work)
    token_cache.make_or_link(tmp_path / "cache", "key", tmp_path / "b", work)
    assert made == ["begun", "continued"]
    assert (tmp_path / "b" / "tokens").stat().st_ino == (tmp_path / "a" / "tokens").stat().st_ino
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["half", "tokens"]
    token_cache.make_or_link(tmp_path / "cache", "other", tmp_path / "b", work)
    assert made[2:] == ["begun"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        token_cache.make_or_link(tmp_path / "file", "key", tmp_path / "a", work)


def test_without_links_the_cache_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    token_cache.make_or_link(tmp_path / "cache", "key", tmp_path / "a", lambda folder: make(folder, texts("a", 50)))
    assert PackedRows(tmp_path / "a", 16).n_tokens == PackedRows(tmp_path / "cache" / "key", 16).n_tokens > 0


def test_what_another_corpus_left_unfinished_is_not_continued(tmp_path: Path) -> None:
    def stop(folder: Path) -> None:
        (folder / "old").write_text("")
        raise Killed

    with pytest.raises(Killed):
        token_cache.make_resumable(tmp_path / "data", "one", stop)
    token_cache.make_resumable(tmp_path / "data", "two", lambda folder: None)
    assert list((tmp_path / "data").iterdir()) == [] and not (tmp_path / "data.unfinished").exists()
