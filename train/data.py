"""Training tokens: documents tokenized once, packed end to end, memory-mapped as rows."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.corpus import HELD_OUT_TOKENS, HeldOut, is_held_out, token_ids
from lrc_edge.errors import UserError

BATCH_DOCUMENTS = 512  # tokenized in one call
TOKENS_FILE, HELD_OUT_FILE = "tokens.npy", "held_out.npz"


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of seq_len ids cut from one long memory-mapped stream; the rest of the stream's end is left out."""

    def __init__(self, path: Path, seq_len: int):
        tokens = np.load(path, mmap_mode="r")
        self.rows_RL = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self.rows_RL)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows_RL[index].astype(np.int64))
        return {"input_ids": ids, "labels": torch.nn.functional.pad(ids[1:], (0, 1), value=-100)}


def prepare(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, folder: Path, *, held_out_share: float,
            max_tokens: int | None, seq_len: int, progress: Callable[[int], None]) -> int:
    """Write `tokens.npy` (about max_tokens, or all) and `held_out.npz` into `folder`; return the training tokens.

    Raises UserError when the text is empty or too short to fill one row and hold some of it out.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    held_out: list[str] = []
    held_out_chars = n_tokens = n_documents = 0
    batch: list[str] = []
    with (folder / "tokens.bin").open("wb") as file:
        def flush() -> None:
            nonlocal n_tokens
            ids = np.fromiter((i for row in token_ids(tokenizer, batch) for i in row), dtype=dtype)
            file.write(ids.tobytes())
            n_tokens += len(ids)
            batch.clear()
            progress(n_tokens)

        for text in texts:
            if not text.strip():
                continue
            n_documents += 1
            if is_held_out(text, held_out_share):
                if held_out_chars < HELD_OUT_TOKENS * 8:
                    held_out.append(text)
                    held_out_chars += len(text)
                continue
            batch.append(text)
            if len(batch) == BATCH_DOCUMENTS:
                flush()
                if max_tokens is not None and n_tokens >= max_tokens:
                    break
        flush()
    _check(n_documents, n_tokens, len(held_out), seq_len, held_out_share)
    ids = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    np.save(folder / TOKENS_FILE, ids)
    (folder / "tokens.bin").unlink()
    HeldOut.from_texts(held_out, tokenizer).save(folder / HELD_OUT_FILE)
    return n_tokens


def _check(n_documents: int, n_tokens: int, n_held_out: int, seq_len: int, held_out_share: float) -> None:
    if n_documents == 0:
        raise UserError("--data: no text in it; give files with text")
    if n_tokens < seq_len:
        raise UserError(f"--data: {n_tokens} training tokens in {n_documents} documents, need at least "
                        f"train.seq_len = {seq_len}; give more text or lower train.seq_len")
    if n_held_out == 0:
        raise UserError(f"--data: {n_documents} documents, none held out at data.held_out_share = {held_out_share}; "
                        "give more documents or raise the share")
