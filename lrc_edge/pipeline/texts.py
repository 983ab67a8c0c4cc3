"""The text of a build: held-out sequences, longer sequences and prompts for verification, calibration sequences."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.filters import Filters
from lrc_edge.corpus.held_out import Calibration, HeldOut, built_in_text
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.recipe import Recipe

if TYPE_CHECKING:
    from lrc_edge.targets.proof.prove import ProofText

DEFAULT_PROMPT = "Once upon a time"  # Python's documentation, the default text, begins no sentence


def held_out_text(out: Path, recipe: Recipe, model: DenseCheckpoint) -> HeldOut:
    """Return the build's held-out text; for an export, --data or Python's own documentation."""
    if (out / "data" / "held_out.npz").exists():
        return HeldOut.load(out / "data" / "held_out.npz")
    n_tokens = 2 * recipe.parity.positions + recipe.export.calibration_tokens
    if not recipe.data.sources:
        return HeldOut.from_texts(built_in_text(), model.tokenizer(), n_tokens)
    fields = Fields(recipe.data.text_field, recipe.data.messages_field, Filters(recipe.data.filters))
    held_out = HeldOut.from_texts(documents(recipe.data.sources, fields), model.tokenizer(), n_tokens)
    fields.filters.check_found()
    return held_out


def row_length(recipe: Recipe, model: DenseCheckpoint) -> int:
    return min(recipe.parity.row_len, model.shape.max_position_embeddings)


def held_out_rows(held_out: HeldOut, recipe: Recipe, model: DenseCheckpoint) -> np.ndarray:
    """Return (n, L) ids. Raises UserError if there is too little text."""
    return held_out.rows(row_length(recipe, model), recipe.parity.positions, model.bos())


def proof_text(held_out: HeldOut, recipe: Recipe, model: DenseCheckpoint) -> ProofText:
    """Return the sequences, longer ones up to the model's context, and prompts."""
    from lrc_edge.targets.proof.prove import ProofText

    rows, longest, bos = held_out_rows(held_out, recipe, model), model.context_length, model.bos()
    lengths = sorted({min(wanted or longest, longest) for wanted in recipe.parity.long_rows})
    openings = held_out.openings[:2] if recipe.data.sources else ()
    return ProofText(rows, tuple(held_out.long_row(length, bos) for length in lengths if length > rows.shape[1]),
                     recipe.parity.prompts or openings or (DEFAULT_PROMPT,))


def calibration(out: Path, held_out: HeldOut, recipe: Recipe, model: DenseCheckpoint) -> Calibration:
    """Return sequences of the training text, or of the given text after the verification's part. Raises UserError."""
    row_len, evaluated = row_length(recipe, model), held_out.ids
    if (out / "data" / "data.json").exists():
        from lrc_edge.train.data.tokenize import PackedRows

        rows, source = PackedRows(out / "data", row_len), "training text"
        candidates = (rows[i]["input_ids"].numpy() for i in range(len(rows)))
    else:
        source = "--data, after the rows of the verification" if recipe.data.sources else "Python's documentation"
        n_evaluated = held_out_rows(held_out, recipe, model).size
        evaluated, rest = evaluated[:n_evaluated], evaluated[n_evaluated:]
        candidates = (rest[i:i + row_len] for i in range(0, len(rest) - row_len + 1, row_len))
    n_rows = max(1, recipe.export.calibration_tokens // row_len)
    return Calibration.choose(candidates, (n_rows, row_len), evaluated, source)
