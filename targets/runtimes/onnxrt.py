"""Plain onnxruntime: a decoder graph with a KV cache on the CPU."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from lrc_edge.errors import UserError, one_line
from lrc_edge.targets.runtimes.protocol import Runtime, parts

CHUNK = 512  # tokens per run; each has its logits, V * 4 bytes
CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Cache = dict[str, onnxruntime.OrtValue]  # past_key_values.{layer}.{key|value} -> (1, kv heads, P, head_dim)


class OnnxRuntime(Runtime):
    """An .onnx file written by to_onnx, or any other with the same inputs.

    `threads`: per operator; `spinning`: they wait for each other without sleeping. Raises UserError if the file does
    not load.
    """

    def __init__(self, path: Path, threads: int = 1, spinning: bool = True):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.log_severity_level = 4  # errors come as exceptions; the log would print them a second time
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen types, none documented
            raise UserError(f"{path}: onnxruntime does not load it ({one_line(error)}); "
                            "export it again") from error
        self.label = f"onnxruntime {onnxruntime.__version__}"
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        try:
            self.vocab_size = int(self._session.get_outputs()[self._outputs.index("logits")].shape[-1])
            self._empty_past = {
                name: np.zeros((1, value.shape[1], 0, value.shape[3]), CACHE_TYPES[value.type])
                for name, value in self._inputs.items() if name.startswith("past_key_values.")}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: its graph is not a decoder's with logits and past_key_values.* of fixed heads "
                            f"({one_line(error, 100)}); export it again") from error

    def read(self, ids: np.ndarray, positions: Sequence[int], alone: Sequence[int]) -> np.ndarray:
        ids, cache, rows = np.asarray(ids), self._empty_cache(), []
        wanted = set(positions)
        for start, end in parts(len(ids), alone, CHUNK):
            logits, cache = self._step(ids[None, start:end], cache, start)
            rows.append(logits[0, [p - start for p in range(start, end) if p in wanted]])
        return np.concatenate(rows)

    def decode_rows(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Decode rows (B, T) together, one token of each at a time; yield (B, V) T times."""
        cache = self._empty_cache(len(rows))
        for t in range(rows.shape[1]):
            logits, cache = self._step(rows[:, t:t + 1], cache, t)
            yield logits[:, 0]

    def tokens(self, ids: list[int], n_tokens: int) -> Iterator[int]:
        cache, new, n_past = self._empty_cache(), list(ids), 0
        for _ in range(n_tokens):
            logits, cache = self._step(np.array([new]), cache, n_past)
            n_past += len(new)
            new = [int(logits[0, -1].argmax())]
            yield new[0]

    def close(self) -> None:
        self._session = None

    def _empty_cache(self, n_rows: int = 1) -> Cache:
        return {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.repeat(array, n_rows, axis=0))
                for name, array in self._empty_past.items()}

    def _step(self, new_ids: np.ndarray, cache: Cache, n_past: int) -> tuple[np.ndarray, Cache]:
        """Run (B, T) new ids after n_past cached ones: (B, T, V) float32 and the longer cache, kept in onnxruntime."""
        n_rows, n_new = new_ids.shape
        positions = np.arange(n_past, n_past + n_new, dtype=np.int64)
        feeds = {"input_ids": np.ascontiguousarray(new_ids, dtype=np.int64),
                 "attention_mask": np.ones((n_rows, n_past + n_new), np.int64),
                 "position_ids": np.repeat(positions[None], n_rows, axis=0)}  # which some graphs count themselves
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()
                  if name in self._inputs}
        found = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, values | cache), strict=True))
        logits: np.ndarray = found.pop("logits").numpy().astype(np.float32, copy=False)
        return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}
