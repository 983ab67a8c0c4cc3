"""`--data self`: the corpus is text sampled from the teacher at temperature 1, kept as jsonl batch by batch."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.shape import ModelShape

SELF_FILE = "self.jsonl"
MAX_BATCH = {"cuda": 512, "cpu": 16}


def self_documents(teacher: DenseCheckpoint, file: Path, *, max_length: int, seed: int, device: torch.device,
                   dtype: torch.dtype, batch: int = 0) -> Iterator[str]:
    """Yield samples of the teacher without end: first those in `file`, then new ones, each appended to `file` first.

    Each batch has its own seed, so a truncated file continues with the same samples. Raises UserError if the
    teacher has no token to begin with, or samples no text.
    """
    batch = batch or batch_size(teacher.shape, max_length, device, dtype)
    n_done = _keep_whole_batches(file, batch)
    if n_done:
        with file.open() as lines:
            for line in lines:
                yield json.loads(line)["text"]
    sampler = _Sampler(teacher, max_length, device, dtype)
    with file.open("a") as lines:
        while True:
            texts = sampler(batch, _seed_of_batch(seed, n_done))
            if not any(text.strip() for text in texts):
                raise UserError(f"--data self: {teacher.name} ended {batch} texts before their first word; "
                                "give text with --data")
            lines.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
            lines.flush()
            n_done += batch
            yield from texts


def batch_size(shape: ModelShape, max_length: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of sequences whose KV cache fills at most a quarter of the GPU's memory."""
    if device.type == "cpu":
        return MAX_BATCH["cpu"]
    kv_bytes = shape.kv_elements_per_token * max_length * dtype.itemsize
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MAX_BATCH["cuda"], memory // 4 // kv_bytes))


def _seed_of_batch(seed: int, n_done: int) -> int:
    """Return the seed of a batch, hashed because torch's CPU generator uses only 32 bits of a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {n_done}".encode()).digest()[:7], "big")


def _keep_whole_batches(file: Path, batch: int) -> int:
    """Cut off an incomplete last batch, which a kill left; return the number of documents that remain."""
    if not file.exists():
        return 0
    n = kept = offset = end = 0
    with file.open("rb+") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            n, offset = n + 1, offset + len(line)
            if n % batch == 0:
                kept, end = n, offset
        lines.truncate(end)
    return kept


class _Sampler:
    """The teacher on its device, with our own generation config, since the teacher's may set a penalty or top-p."""

    def __init__(self, teacher: DenseCheckpoint, max_length: int, device: torch.device, dtype: torch.dtype):
        self.tokenizer = teacher.tokenizer()
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = eos if bos is None else bos
        if start is None:
            raise UserError(f"--data self: {teacher.name}'s tokenizer has neither BOS nor EOS to begin a text with; "
                            "give text with --data")
        self.begin = torch.tensor([[start]], device=device)
        self.model: Any = teacher.model(dtype).to(device)  # type: ignore[arg-type]
        self.ends = set(teacher.stop_ids(self.tokenizer))
        self.model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=max_length, use_cache=True,
            eos_token_id=sorted(self.ends) or None, pad_token_id=min(self.ends, default=0))

    @torch.inference_mode()
    def __call__(self, batch: int, seed: int) -> list[str]:
        torch.manual_seed(seed)
        begin = self.begin.expand(batch, 1)
        rows = self.model.generate(begin, attention_mask=torch.ones_like(begin))[:, 1:].tolist()
        return self.tokenizer.batch_decode([self._to_end(row) for row in rows], skip_special_tokens=True,
                                           clean_up_tokenization_spaces=False)

    def _to_end(self, row: list[int]) -> list[int]:
        """Return the row without the padding after the first stop token."""
        return row[:next((i for i, token in enumerate(row) if token in self.ends), len(row))]
