"""Tokenize the documents of all sources into shards, mixed according to the weights."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.corpus.encode import Encoded, encode
from lrc_edge.corpus.filters import Filters
from lrc_edge.corpus.held_out import HELD_OUT_TOKENS, HeldOut, is_held_out
from lrc_edge.corpus.sources import Document, LeftOut
from lrc_edge.errors import UserError
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.data.shards import SHARD_TOKENS, ShardWriter
from lrc_edge.workspace import write_atomically

__all__ = ["HELD_OUT_FILE", "SUMMARY_FILE", "PackedRows", "Tally", "check_enough", "prepare", "read_summary"]

BATCH_DOCUMENTS, BATCH_CHARS = 512, 32_000  # tokenized in one call: whichever comes first
LOOK_ON_CHARS, LOOK_ON_DOCUMENTS = 20_000, 512  # stop looking for held-out text after these
HELD_OUT_FILE, SUMMARY_FILE = "held_out.npz", "data.json"
STATE_FILE = "state.json"  # while the stage runs: where to resume after a kill


@dataclass
class Tally:
    """The counts of one source."""

    source: str
    documents: int = 0  # trained on
    tokens: int = 0
    held_out_documents: int = 0
    filtered_records: int = 0  # left out by data.filters: neither trained on nor held out
    skipped_conversations: int = 0  # refused by the chat template, or without an answer to learn
    missed_answers: int = 0  # answers of the others without loss (lrc_edge/corpus/encode.py has the reason)
    ran_out: bool = False
    read: int = 0  # documents read from the stream, including blank and filtered ones: where to resume


@dataclass
class _State:
    tallies: list[Tally]
    n_shards: int = 0
    held_out: list[Document] = field(default_factory=list)
    held_out_chars: int = 0
    fields: list[str] = field(default_factory=list)  # names that records had, for the check of the filters

    @classmethod
    def load(cls, folder: Path, names: Iterable[str]) -> _State:
        file = folder / STATE_FILE
        if not file.exists():
            return cls([Tally(name) for name in names])
        table = json.loads(file.read_text())
        return cls(**{**table, "tallies": [Tally(**tally) for tally in table["tallies"]]})

    def save(self, folder: Path) -> None:
        write_atomically(folder / STATE_FILE, json.dumps(asdict(self)))

    @property
    def n_tokens(self) -> int:
        return sum(tally.tokens for tally in self.tallies)

    def hold_out(self, document: Document) -> None:
        """Keep the document for evaluation and verification, unless there are enough."""
        if self.held_out_chars < HELD_OUT_TOKENS * 8:
            self.held_out.append(document)
            self.held_out_chars += _size(document)

    def next_source(self, weights: Sequence[float]) -> int | None:
        """Return the source that is furthest below its share; without weights, the first that has not run out."""
        left = [i for i, tally in enumerate(self.tallies) if not tally.ran_out]
        return min(left, key=lambda i: self.tallies[i].tokens / weights[i] if weights else i, default=None)


def prepare(sources: Sequence[tuple[str, Iterable[Document | LeftOut]]], tokenizer: PreTrainedTokenizerBase,
            folder: Path, *, weights: Sequence[float] = (), held_out_share: float, max_tokens: int | None, seq_len: int,
            progress: Callable[[int], None], shard_tokens: int = SHARD_TOKENS, filters: Filters | None = None,
            all_tokens: bool = False) -> int:
    """Write shards (about max_tokens, or all), held_out.npz and data.json into `folder`; return the training tokens.

    `sources` are (name, documents). When a source runs out, the others continue; data.json holds the resulting shares.
    `filters` are those that the sources apply. `all_tokens`: the loss covers conversations completely. If a killed call
    worked on the same sources in `folder`, resumes after the last shard that it closed. Raises UserError if there is no
    text, or too little to fill one row and hold some out, or if no record has the field of a filter.
    """
    state, filters = _State.load(folder, (name for name, _ in sources)), filters or Filters()
    filters.fields.update(dict.fromkeys(state.fields))
    writer = ShardWriter(folder, len(tokenizer), state.n_shards)
    streams = [_batches(islice(documents, tally.read, None))
               for (_, documents), tally in zip(sources, state.tallies, strict=True)]
    progress(state.n_tokens)
    for tally, batch in _mixture(state, streams, weights, max_tokens):
        documents = _split(batch, state, tally, held_out_share)
        _write(encode(tokenizer, documents, all_tokens), tally, writer)
        if writer.n_tokens >= shard_tokens:
            writer.close_shard()
            state.n_shards, state.fields = writer.n_shards, list(filters.fields)
            state.save(folder)
        progress(state.n_tokens)
    writer.close_shard()
    state.n_shards = writer.n_shards
    _look_on(state, streams, held_out_share)
    filters.check_found()
    check_enough(state.tallies, seq_len, held_out_share)
    HeldOut.from_texts(state.held_out, tokenizer).save(folder / HELD_OUT_FILE)
    _write_summary(folder, state)
    (folder / STATE_FILE).unlink(missing_ok=True)
    return state.n_tokens


def count_ids(sources: Sequence[tuple[str, Iterable[Document | LeftOut]]], tokenizer: PreTrainedTokenizerBase,
              n_ids: int, *, weights: Sequence[float] = (), held_out_share: float, max_tokens: int,
              progress: Callable[[int], None], all_tokens: bool = False) -> np.ndarray:
    """Return (n_ids,) int64: the occurrences of each id in about the first `max_tokens` training tokens of `prepare`.

    Arguments as there.
    """
    state, occurrences = _State([Tally(name) for name, _ in sources]), _Occurrences(n_ids)
    streams = [_batches(documents) for _, documents in sources]
    for tally, batch in _mixture(state, streams, weights, max_tokens):
        _write(encode(tokenizer, _split(batch, state, tally, held_out_share), all_tokens), tally, occurrences)
        progress(state.n_tokens)
    return occurrences.counts


class _Sink(Protocol):
    def add(self, encoded: Encoded) -> None: ...


class _Occurrences:
    """Counts ids. Implements _Sink, as ShardWriter does."""

    def __init__(self, n_ids: int):
        self.counts = np.zeros(n_ids, dtype=np.int64)

    def add(self, encoded: Encoded) -> None:
        np.add.at(self.counts, encoded.ids, 1)


Batch = list[Document | LeftOut]


def _mixture(state: _State, streams: Sequence[Iterator[Batch]], weights: Sequence[float],
             max_tokens: int | None) -> Iterator[tuple[Tally, Batch]]:
    """Yield batches in the order given by the weights, until there are enough tokens."""
    while max_tokens is None or state.n_tokens < max_tokens:
        i = state.next_source(weights)
        if i is None:
            return
        batch = next(streams[i], None)
        if batch is None:
            state.tallies[i].ran_out = True
        else:
            yield state.tallies[i], batch


def _batches(documents: Iterable[Document | LeftOut]) -> Iterator[Batch]:
    """Yield batches so small that the shares of a mixture are exact to about ten thousand tokens."""
    batch: Batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += 0 if isinstance(document, LeftOut) else _size(document)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(document: Document) -> int:
    """Return the number of characters of the document."""
    return len(document) if isinstance(document, str) else sum(len(message["content"]) for message in document)


def _write(documents: Iterable[Encoded | None], tally: Tally, writer: _Sink) -> None:
    """Add training documents to the writer, and count them."""
    for encoded in documents:
        if encoded is None:
            tally.skipped_conversations += 1
            continue
        writer.add(encoded)
        tally.documents += 1
        tally.tokens += len(encoded.ids)
        tally.missed_answers += encoded.n_missed


def _split(batch: Batch, state: _State, tally: Tally, held_out_share: float) -> list[Document]:
    """Return the training documents of a batch; hold the others out."""
    kept: list[Document] = []
    for document in batch:
        if isinstance(document, LeftOut):
            tally.filtered_records += 1
        elif isinstance(document, str) and not document.strip():
            continue
        elif is_held_out(document, held_out_share):
            tally.held_out_documents += 1
            state.hold_out(document)
        else:
            kept.append(document)
    tally.read += len(batch)
    return kept


def _look_on(state: _State, streams: Sequence[Iterator[Batch]], held_out_share: float) -> None:
    """Hold out some of the documents after the budget, in case it ended too early. None of them is trained on."""
    n_seen = 0
    for tally, stream in zip(state.tallies, streams, strict=True):
        while state.held_out_chars < LOOK_ON_CHARS and n_seen < LOOK_ON_DOCUMENTS and (batch := next(stream, None)):
            _split(batch, state, tally, held_out_share)
            n_seen += len(batch)


def _write_summary(folder: Path, state: _State) -> None:
    table = {"tokens": state.n_tokens, "shards": state.n_shards,
             "sources": [{**asdict(tally), "share": tally.tokens / state.n_tokens} for tally in state.tallies]}
    (folder / SUMMARY_FILE).write_text(json.dumps(table, indent=1) + "\n")


def read_summary(folder: Path) -> list[Tally]:
    """Read the counts of each source that `prepare` wrote to data.json."""
    rows = json.loads((folder / SUMMARY_FILE).read_text())["sources"]
    return [Tally(**{key: value for key, value in row.items() if key != "share"}) for row in rows]


def describe(tallies: list[Tally]) -> str:
    """Describe the resulting shares and what was left out; empty if there is nothing to report."""
    total = sum(tally.tokens for tally in tallies)
    parts = [f"{tally.source} {tally.tokens / total:.1%}" + ", ran out" * tally.ran_out for tally in tallies]
    told = "; ".join(parts) if len(tallies) > 1 else ""
    for what, n in (("filtered records", sum(t.filtered_records for t in tallies)),
                    ("skipped conversations", sum(t.skipped_conversations for t in tallies)),
                    ("answers without loss", sum(t.missed_answers for t in tallies))):
        told += f"; {what}: {n:,}" if n else ""
    return told.removeprefix("; ")


def check_enough(tallies: list[Tally], seq_len: int, held_out_share: float) -> None:
    """Raise UserError if there is no row to train on, or nothing held out."""
    n_held_out = sum(tally.held_out_documents for tally in tallies)
    n_documents = sum(tally.documents for tally in tallies) + n_held_out
    n_tokens = sum(tally.tokens for tally in tallies)
    if skipped := sum(tally.skipped_conversations for tally in tallies) if n_documents == 0 else 0:
        raise UserError(f"--data: the teacher's chat template refuses all {skipped:,} conversations, or none has an "
                        "answer to learn; give conversations that it can render")
    if n_documents == 0:
        filtered = sum(tally.filtered_records for tally in tallies)
        raise UserError(f"--data: data.filters leaves out all {filtered:,} records; lower the limit" if filtered
                        else "--data: no text in it; give files with text")
    if n_tokens < seq_len:
        raise UserError(f"--data: {n_tokens} training tokens in {n_documents} documents, need at least "
                        f"train.seq_len = {seq_len}; give more text or lower train.seq_len")
    if n_held_out == 0:
        raise UserError(f"--data: {n_documents} documents, none held out at data.held_out_share = {held_out_share}; "
                        "give more documents or raise the share")
