"""Plain onnxruntime: a decoder graph with a KV cache on the CPU."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from lrc_edge.errors import UserError

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Cache = dict[str, onnxruntime.OrtValue]  # past_key_values.{layer}.{key|value} -> (1, kv heads, P, head_dim)


class OnnxRuntime:
    """One .onnx file that to_onnx wrote, or any with the same inputs. Implements runtime.Runtime.

    `threads`: of one operator. Raises UserError when the file does not load.
    """

    def __init__(self, path: Path, threads: int = 1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors come as exceptions; the log would print them a second time
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen types, none documented
            raise UserError(f"{path}: onnxruntime does not load it ({' '.join(str(error).split())[:200]}); "
                            "export it again") from error
        self.label = f"onnxruntime {onnxruntime.__version__}"
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.vocab_size = int(self._session.get_outputs()[self._outputs.index("logits")].shape[-1])
        self._empty_past = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), CACHE_TYPES[value.type])
            for value in self._session.get_inputs() if value.name.startswith("past_key_values.")}

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """(T,) -> (T, V)"""
        return self._step(np.asarray(ids), self._empty_cache(), 0)[0]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """(T,) -> (T, V), T runs of one token."""
        cache = self._empty_cache()
        rows = []
        for n_past, token in enumerate(np.asarray(ids)):
            logits, cache = self._step(np.array([token]), cache, n_past)
            rows.append(logits[0])
        return np.stack(rows)

    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        made: list[int] = []
        cache, new, n_past = self._empty_cache(), list(ids), 0
        while len(made) < n_tokens:
            logits, cache = self._step(np.array(new), cache, n_past)
            n_past += len(new)
            token = int(logits[-1].argmax())
            if token in stop:
                break
            made.append(token)
            new = [token]
        return made

    def close(self) -> None:
        self._session = None

    def _empty_cache(self) -> Cache:
        return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self._empty_past.items()}

    def _step(self, new_ids: np.ndarray, cache: Cache, n_past: int) -> tuple[np.ndarray, Cache]:
        """Run (T,) new ids after n_past cached ones: (T, V) float32 and the longer cache, kept in onnxruntime."""
        feeds = {"input_ids": new_ids[None].astype(np.int64),
                 "attention_mask": np.ones((1, n_past + len(new_ids)), np.int64),
                 "position_ids": np.arange(n_past, n_past + len(new_ids), dtype=np.int64)[None]}
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        found = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, values | cache), strict=True))
        logits: np.ndarray = found.pop("logits").numpy()[0]
        return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}
