"""optimum's ORTModelForCausalLM. Only in the environment of the `optimum` extra (transformers < 4.58)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.version import __version__ as optimum_version


class OptimumOrt:
    """One model of an ONNX folder through optimum. Implements runtime.Runtime."""

    def __init__(self, folder: Path, model_file: str = "onnx/model.onnx", threads: int = 1):
        self.label = f"optimum {optimum_version}, onnxruntime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = Path(model_file)
        self.model = ORTModelForCausalLM.from_pretrained(folder, subfolder=str(file.parent), file_name=file.name,
                                                         session_options=options, local_files_only=True)
        # optimum takes hidden_size / heads for the llama and qwen families, which a narrowed student does not have.
        self.model.embed_size_per_head = self.model.config.head_dim

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """(T,) -> (T, V)"""
        return self._step(np.asarray(ids), None, 0)[0]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        past: tuple[tuple[torch.Tensor, ...], ...] | None = None
        rows = []
        for n_past, token in enumerate(np.asarray(ids)):
            logits, past = self._step(np.array([token]), past, n_past)
            rows.append(logits[0])
        return np.stack(rows)

    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        """Through transformers' own `generate`."""
        prompt = torch.tensor([ids])
        made = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_tokens,
                                   do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=0)
        tokens = made[0, len(ids):].tolist()
        return tokens[:-1] if tokens and tokens[-1] in stop else tokens

    def close(self) -> None:
        self.model = None

    def _step(self, new_ids: np.ndarray, past: tuple[tuple[torch.Tensor, ...], ...] | None, n_past: int
              ) -> tuple[np.ndarray, tuple[tuple[torch.Tensor, ...], ...]]:
        ids = torch.from_numpy(new_ids.astype(np.int64))[None]
        mask = torch.ones((1, n_past + len(new_ids)), dtype=torch.int64)
        with torch.no_grad():
            out = self.model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
        return out.logits[0].numpy(), out.past_key_values
