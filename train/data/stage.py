"""The data stage of a build: tokenize the recipe's sources, which may include the teacher itself, or use the cache."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.filters import Filters
from lrc_edge.corpus.sources import SELF, Document, Fields, LeftOut, known_fields, source_documents
from lrc_edge.recipe import Data, Recipe
from lrc_edge.train.data.self_data import SELF_FILE, self_documents
from lrc_edge.train.data.token_cache import make_or_link, make_resumable
from lrc_edge.train.data.tokenize import check_enough, count_ids, describe, prepare, read_summary

Progress = Callable[[str, int], None]  # gets a status line and the number of tokens so far


def tokenize_corpus(teacher: DenseCheckpoint, recipe: Recipe, folder: Path, key: str, progress: Progress) -> str:
    """Write the corpus of this key to `folder`, or link it from the cache. Returns facts for the stage's line."""
    seq_len, settings = row_length(recipe, teacher), recipe.data

    def make(work: Path) -> None:
        fields = _fields(settings)
        sources = [(source, _documents(source, teacher, recipe, fields, work)) for source in settings.sources]
        with _all_processors():
            prepare(sources, teacher.tokenizer(), work, weights=settings.weights, filters=fields.filters,
                    all_tokens=settings.conversation_loss == "all", held_out_share=settings.held_out_share,
                    max_tokens=recipe.train.tokens or None, seq_len=seq_len, progress=_with_speed(progress))

    if settings.cache:
        make_or_link(Path(settings.cache).expanduser(), key, folder, make)
    else:
        make_resumable(folder, key, make)
    tallies = read_summary(folder)
    check_enough(tallies, seq_len, settings.held_out_share)
    return describe(tallies)


def count_occurrences(teacher: DenseCheckpoint, recipe: Recipe, max_tokens: int, progress: Progress) -> np.ndarray:
    """Return (vocab_size,) int64: how often each id occurs in the first `max_tokens` training tokens.

    The recipe's sources must not include `self`. Raises UserError as `source_documents` does.
    """
    settings = recipe.data
    fields = _fields(settings)
    sources = [(source, source_documents(source, fields)) for source in settings.sources]
    with _all_processors():
        return count_ids(sources, teacher.tokenizer(), teacher.shape.vocab_size, weights=settings.weights,
                         held_out_share=settings.held_out_share, max_tokens=max_tokens,
                         all_tokens=settings.conversation_loss == "all", progress=_with_speed(progress))


def _fields(settings: Data) -> Fields:
    """Return the names and filters to read documents with. Raises UserError if no source has the field of a filter."""
    fields = Fields(settings.text_field, settings.messages_field, Filters(settings.filters))
    _check_filters(fields.filters, settings.sources)
    return fields


def _check_filters(filters: Filters, sources: tuple[str, ...]) -> None:
    """Raise UserError for a filter whose field no source has, if their schemas show it: before hours of reading."""
    known = [known_fields(source) for source in sources] if filters.filters else []
    for names in known:
        filters.note(names or ())
    if None not in known:
        filters.check_found()


def row_length(recipe: Recipe, teacher: DenseCheckpoint) -> int:
    return min(recipe.train.seq_len, teacher.shape.max_position_embeddings)


def _documents(source: str, teacher: DenseCheckpoint, recipe: Recipe, fields: Fields, work: Path
               ) -> Iterator[Document | LeftOut]:
    if source != SELF:
        yield from source_documents(source, fields)
        return
    from lrc_edge.train.device import choose_device, choose_precision

    device = choose_device(recipe.train.device)
    yield from self_documents(teacher, work / SELF_FILE, max_length=row_length(recipe, teacher), seed=recipe.train.seed,
                              device=device, dtype=choose_precision(recipe.train.precision, device))


def _with_speed(progress: Progress) -> Callable[[int], None]:
    """Add the speed to the status line. The first call passes the tokens that an interrupted run had made."""
    began: list[tuple[float, int]] = []

    def tell(n_tokens: int) -> None:
        now = time.monotonic()
        if not began:
            began.append((now, n_tokens))
        started, had = began[0]
        progress(f"{n_tokens:,} tokens  {(n_tokens - had) / max(now - started, 1e-9):,.0f} tok/s", n_tokens)

    return tell


@contextmanager
def _all_processors() -> Iterator[None]:
    """Let the tokenizer use all processors, and restore the setting afterwards (it is off because workers fork)."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
