"""onnxruntime-genai: an ONNX folder with genai's own generation loop, tokenizer and chat template."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from lrc_edge.errors import UserError, one_line
from lrc_edge.targets.runtimes.protocol import TextRuntime

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "min_length": 0}


class OrtGenai(TextRuntime):
    """One model of an ONNX folder.

    `model_file`: relative to the folder, instead of the one that genai_config.json names. `threads`: instead of
    onnxruntime's choice, one per physical core. Raises UserError if the folder does not load.
    """

    def __init__(self, folder: Path, model_file: str | None = None, threads: int | None = None):
        self.label = f"onnxruntime-genai {og.__version__}"
        decoder = {"filename": model_file} if model_file else {}
        session = {"intra_op_num_threads": threads} if threads else {}
        try:
            table = json.loads((folder / "genai_config.json").read_text())
            self._context_length = int(table["model"]["context_length"])
            self.vocab_size = int(table["model"]["vocab_size"])
            config = og.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": decoder | {"session_options": session}}}))
            self._model = og.Model(config)
            self._tokenizer = og.Tokenizer(self._model)
            self._prompt_tokenizer = og.Tokenizer(self._model)
        except Exception as error:  # a bare RuntimeError for anything, or a KeyError of ours
            raise UserError(f"{folder}: onnxruntime-genai does not load it ({one_line(error)}); "
                            "export it again") from error
        # Off by default, unlike Hugging Face: a prompt would go without the BOS that the model was trained with.
        self._prompt_tokenizer.update_options(add_special_tokens="true")

    def prefill(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Return logits (T, V) of ids (T,). Raises RuntimeError if the runtime does not return all positions."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        logits: np.ndarray = np.array(generator.get_output("logits"), dtype=np.float32)[0]
        if len(logits) != len(ids):
            raise RuntimeError(f"{self.label}: {len(logits)} rows of logits for {len(ids)} tokens")
        return logits if positions is None else logits[list(positions)]

    def decode(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        generator = self._generator(len(ids) + 1)
        rows = []
        for token in np.asarray(ids, dtype=np.int32):
            generator.append_tokens(token[None])
            rows.append(np.array(generator.get_output("logits"), dtype=np.float32)[0, -1])
        return np.stack(rows if positions is None else [rows[p] for p in positions])

    def read(self, ids: np.ndarray, positions: Sequence[int], alone: Sequence[int]) -> np.ndarray:
        """Read all tokens one at a time if any must be, because genai's loop cannot mix both."""
        return self.decode(ids, positions) if alone else self.prefill(ids, positions)

    def tokens(self, ids: list[int], n_tokens: int) -> Iterator[int]:
        """Generate greedily. genai also ends at the folder's own end-of-text ids."""
        generator = self._generator(len(ids) + n_tokens)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        for _ in range(n_tokens):
            if generator.is_done():
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.end_tokens:
                return
            yield token

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self._prompt_tokenizer.encode(text)]

    def detokenize(self, ids: list[int]) -> str:
        # The prompt's tokenizer: without added special tokens, genai keeps SentencePiece's leading space.
        return str(self._prompt_tokenizer.decode(np.array(ids, dtype=np.int32)))

    @property
    def end_tokens(self) -> set[int]:
        """Return the tokens at which genai's loop ends a generation."""
        return set(map(int, self._tokenizer.eos_token_ids))

    def render_chat(self, messages: list[dict[str, str]], engine: str = "") -> tuple[str, list[int]]:
        """Render with genai's own Jinja, its only engine."""
        text = self._tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return text, [int(token) for token in self._tokenizer.encode(text)]

    def close(self) -> None:
        self._model = self._tokenizer = self._prompt_tokenizer = None

    def _generator(self, max_length: int) -> og.Generator:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=min(max_length, self._context_length), **GREEDY)
        return og.Generator(self._model, params)
