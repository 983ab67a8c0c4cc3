"""Verification: compare each artifact, in its real runtime, with the PyTorch student on the same held-out tokens.

PyTorch runs here, once. Every runtime runs in its own process (worker_runtime.py). An error there fails the gates of
that file, with the reason, and verification continues.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrc_edge.artifact import Artifact
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import Task
from lrc_edge.formats import format_of
from lrc_edge.parity import (
    AS_TRAINED,
    Comparison,
    Gate,
    gates_of_artifact,
    gates_of_grid,
    gates_of_length,
)
from lrc_edge.recipe import Recipe
from lrc_edge.stored_reference import REFERENCE_FILE, StoredReference
from lrc_edge.targets.proof.chat_parity import ChatParity
from lrc_edge.targets.proof.reference import HeldOutRows, Reference
from lrc_edge.targets.proof.token_parity import compare_token_ids, corpus_of, normalize
from lrc_edge.targets.runtimes.llama_probe import extra_buffers
from lrc_edge.targets.runtimes.table import Runtime, verifiers_of
from lrc_edge.targets.runtimes.worker import WorkerFailed
from lrc_edge.targets.runtimes.worker_runtime import WorkerRuntime


@dataclass
class Proof:
    """The result: the report's entries on the artifacts, and the gates."""

    artifacts: list[dict[str, Any]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    tokenizer: list[dict[str, Any]] = field(default_factory=list)
    chat_template: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    teacher_perplexity: float | None = None  # on the proof's rows
    rounding: float | None = None  # PyTorch's own, of the student's logits
    lengths: list[dict[str, Any]] = field(default_factory=list)  # of the rows longer than the recipe's
    notes: list[str] = field(default_factory=list)  # of this machine


@dataclass(frozen=True)
class ProofText:
    """Held-out text: rows (n, L); longer rows (T,), one of each length; prompts for sample texts."""

    rows: np.ndarray
    long_rows: tuple[np.ndarray, ...]
    prompts: tuple[str, ...]


def prove(artifacts: Sequence[Artifact], folder: Path, student: DenseCheckpoint, on_grid: DenseCheckpoint | None,
          text: ProofText, recipe: Recipe, threads: int, teacher: DenseCheckpoint | None, task: Task) -> Proof:
    """Verify every artifact below `folder`.

    `on_grid`: the student after quantization-aware training. Files made from it are compared with both models: with the
    student to measure the loss from quantization, with `on_grid` to check that they compute what was trained.
    """
    prover = _Prover(folder, student, text, recipe, threads, task)
    prover.expect(artifacts, teacher, on_grid)
    prover.read_references(teacher, on_grid)
    prover.expect(artifacts, teacher, on_grid)  # the long rows may have been cut
    for artifact in artifacts:
        prover.prove_artifact(artifact)
    return prover.proof


class _Prover:
    """The reference logits, computed once, and the results so far."""

    def __init__(self, folder: Path, student: DenseCheckpoint, text: ProofText, recipe: Recipe, threads: int,
                 task: Task):
        self._folder, self._student, self._text, self._recipe = folder, student, text, recipe
        self._threads, self._task = threads, task
        self._tokenizer = student.tokenizer()
        self._stop = list(student.stop_ids(self._tokenizer))
        self._chat = ChatParity(self._tokenizer)
        self._prompts = [list(self._tokenizer(prompt)["input_ids"]) for prompt in text.prompts]
        self._n_generated = recipe.parity.generate_tokens
        self._done = 0
        self._long: list[HeldOutRows] | None = None
        self.proof = Proof(samples=[{"prompt": prompt, "outputs": []} for prompt in text.prompts])
        if advice := extra_buffers().advice:
            self.proof.notes.append(advice)

    # Progress

    def expect(self, artifacts: Sequence[Artifact], *others: DenseCheckpoint | None) -> None:
        """Announce the work, in tokens to read. `others`: models that PyTorch runs besides the student."""
        long = sum(map(len, self._text.long_rows)) if self._long is None else sum(rows.ids.size for rows in self._long)
        sampled = sum(len(prompt) + self._n_generated for prompt in self._prompts)
        per_file = 2 * self._text.rows.size + long + sampled
        caches = sum(len(self._caches(verifiers_of(a.format)[0])) for a in artifacts) * self._kv_rows().size
        models = 1 + sum(model is not None for model in others)
        self._task.expect(models * self._text.rows.size + long + len(artifacts) * per_file + caches, "tokens")

    def _advance(self, what: str, n_tokens: int = 0) -> None:
        self._done += n_tokens
        self._task.update(what, self._done)

    # References

    def read_references(self, teacher: DenseCheckpoint | None, on_grid: DenseCheckpoint | None) -> None:
        text, near_tie = self._text, self._recipe.parity.near_tie
        self._advance("loading the student in PyTorch")
        reference = Reference(self._student.model())
        self.proof.rounding = reference.rounding(text.rows)
        started = time.monotonic()
        self._held_out = HeldOutRows.of(reference, text.rows, folder=self._folder, progress=self._counter("PyTorch"))
        seconds_per_token = (time.monotonic() - started) / text.rows.size
        self._long = [HeldOutRows.of(reference, row[None], self._spread(len(row)), self._folder,
                                     self._counter(f"PyTorch, {len(row):,} tokens"))
                      for row in self._affordable(seconds_per_token)]
        self.proof.lengths = [{"tokens": rows.ids.shape[1], "positions": rows.logits.shape[1]} for rows in self._long]
        self._sample("student", reference.generate)
        reference.close()
        self._store()
        if teacher is not None:
            original = Reference(teacher.model())
            metrics = self._held_out.compare(self._counted(original.prefill, "teacher in PyTorch"), near_tie)
            self.proof.teacher_perplexity = metrics.as_dict()["ppl"]
            self._sample("teacher", original.generate)
            for row in self.proof.samples:
                row["outputs"].reverse()  # the teacher first
        self._trained = on_grid and HeldOutRows.of(Reference(on_grid.model()), text.rows, folder=self._folder,
                                                   progress=self._counter("student on its grid in PyTorch"))

    def _counter(self, what: str) -> Callable[[int], None]:
        return lambda n_tokens: self._advance(f"{what}: reference logits", n_tokens)

    def _counted(self, logits_of: Callable[[np.ndarray], np.ndarray], what: str) -> Callable[[np.ndarray], np.ndarray]:
        def counted(ids: np.ndarray) -> np.ndarray:
            logits = logits_of(ids)
            self._advance(what, ids.size)
            return logits
        return counted

    def _affordable(self, seconds_per_token: float) -> Iterator[np.ndarray]:
        """Return the long rows, cut to what PyTorch reads in parity.long_seconds (attention grows with T^2)."""
        shape, length = self._student.shape, self._text.rows.shape[1]

        def flops(n_tokens: int) -> float:
            attention = 2 * shape.q_size * shape.num_hidden_layers * n_tokens
            return n_tokens * (2.0 * shape.n_params + attention)

        rate = flops(length) / (length * seconds_per_token)
        longest = 0
        for row in self._text.long_rows:
            n_tokens = len(row)
            while n_tokens > length and flops(n_tokens) > rate * self._recipe.parity.long_seconds:
                n_tokens = n_tokens * 7 // 8
            if n_tokens > max(length, longest):
                longest = n_tokens
                yield row[:n_tokens]

    def _spread(self, n_tokens: int) -> list[int]:
        """Return positions spread over a row, including its last one."""
        n = min(2 * self._recipe.parity.long_positions, n_tokens)
        return sorted({int(p) for p in np.linspace(0, n_tokens, n + 1)[1:] - 1})

    def _sample(self, who: str, generate: Callable[[list[int], int, Any], list[int]]) -> list[list[int]]:
        made = []
        for row, prompt in zip(self.proof.samples, self._prompts, strict=True):
            made.append(generate(prompt, self._n_generated, set(self._stop)))
            self._advance(f"{who}: generation", len(prompt) + self._n_generated)
            row["outputs"].append({"who": who, "text": self._tokenizer.decode(self._known(made[-1]),
                                                                            skip_special_tokens=True)})
        return made

    def _known(self, ids: list[int]) -> list[int]:
        return [token for token in ids if 0 <= token < len(self._tokenizer)]

    def _store(self) -> None:
        """Store the student's outputs for checks on devices, which need no PyTorch."""
        texts = corpus_of(self._tokenizer)
        StoredReference.of(
            self._held_out.ids, self._held_out.logits, [normalize(self._tokenizer, text) for text in texts],
            [self._tokenizer.encode(text, verbose=False) for text in texts], self._student.shape
        ).save(self._folder / REFERENCE_FILE)

    # Artifacts

    def prove_artifact(self, artifact: Artifact) -> None:
        """Verify one file, part by part. If the runtime fails in a part, that part's gates fail; others continue."""
        first, others = verifiers_of(artifact.format)
        entry: dict[str, Any] = {**artifact.as_dict(), "runtime": first.name, "parity": {}}
        self.proof.artifacts.append(entry)
        with self._runtime(artifact, first) as runtime:
            self._logits_parity(artifact, runtime, entry)
            for rows in self._long or ():
                self._length_parity(artifact, runtime, entry, rows)
            if first.caches:
                entry["kv_cache"] = self._kv_cache(artifact, runtime)
            runtime.context(self._n_ctx)
            entry["generation"] = self._generation(artifact, runtime)
            if first.tokenizes:
                self._token_parity(artifact, runtime)
                self._chat_parity(artifact, runtime)
                self._stop_tokens(artifact, runtime)
            entry["runtime"] = runtime.label
        for other in others:
            with self._runtime(artifact, other) as runtime:
                self._generation(artifact, runtime, only_first=True)
                self._chat_parity(artifact, runtime)
                self._stop_tokens(artifact, runtime)

    @property
    def _n_ctx(self) -> int:
        prompt = max(map(len, self._prompts))
        return max(self._text.rows.shape[1], prompt) + self._n_generated

    def _runtime(self, artifact: Artifact, row: Runtime) -> WorkerRuntime:
        return WorkerRuntime(row.name, self._folder / artifact.path, self._n_ctx, self._threads,
                             self._student.shape.n_params, self._folder, self._student.shape.vocab_size)

    @contextmanager
    def _failing(self, fail: Callable[[str], list[Gate]]) -> Iterator[None]:
        """If the runtime fails in the block, add the failed gates that `fail` makes from the reason."""
        try:
            yield
        except WorkerFailed as error:
            self.proof.gates += fail(str(error))

    def _logits_parity(self, artifact: Artifact, runtime: WorkerRuntime, entry: dict[str, Any]) -> None:
        """Compare prefill and decode on the recipe's rows; prefill also with the student trained on the grid."""
        kind, limits, rounding = artifact.name, self._recipe.gates, self.proof.rounding
        trained = self._trained if artifact.identical_blocks is not None else None
        path, blocks = artifact.path, artifact.identical_blocks or 0.0
        for mode in ("prefill", "decode"):
            against = [self._held_out, trained] if mode == "prefill" and trained else [self._held_out]

            def fail(why: str, mode: str = mode, n: int = len(against)) -> list[Gate]:
                gates = gates_of_artifact(path, kind, mode, None, limits, rounding, why)
                return gates + (gates_of_grid(path, blocks, None, limits, why) if n > 1 else [])

            with self._failing(fail):
                metrics = self._compare(runtime, mode, against, path)
                entry["parity"][mode] = metrics[0].as_dict()
                self.proof.gates += gates_of_artifact(path, kind, mode, metrics[0], limits, rounding)
                if len(metrics) > 1:
                    entry["parity"][AS_TRAINED] = metrics[1].as_dict()
                    self.proof.gates += gates_of_grid(path, blocks, metrics[1], limits)

    def _compare(self, runtime: WorkerRuntime, mode: str, against: Sequence[HeldOutRows], path: str) -> list[Any]:
        """Return the metrics of the same rows against each of the references."""
        comparisons = [Comparison(self._recipe.parity.near_tie) for _ in against]
        ids, n_done = against[0].ids, 0
        runtime.open()
        # The first row alone, like a user's text; then several at once, where the runtime can.
        sizes = [1] * len(ids) if mode == "prefill" else [1, *[runtime.rows_at_once(ids.shape[1])] * len(ids)]
        for size in sizes:
            rows = ids[n_done:n_done + size]
            if not len(rows):
                break
            runtime.context(self._n_ctx, len(rows))
            for logits in (runtime.prefill if mode == "prefill" else runtime.decode)(rows):
                for comparison, reference in zip(comparisons, against, strict=True):
                    comparison.update(reference.logits[n_done], logits, reference.next_ids(n_done))
                n_done += 1
            self._advance(f"{path}: {mode}", rows.size)
        return [comparison.metrics() for comparison in comparisons]

    def _length_parity(self, artifact: Artifact, runtime: WorkerRuntime, entry: dict[str, Any], rows: HeldOutRows
                       ) -> None:
        """Compare one long row in one pass, at positions spread over it. Every second one is read as a single token."""
        [ids], positions = rows.ids, rows.positions or ()
        kind, limits = artifact.name, self._recipe.gates
        names = [f"{mode} at {len(ids):,} tokens" for mode in ("prefill", "decode")]

        def fail(why: str) -> list[Gate]:
            return [gate for name in names for gate in gates_of_length(artifact.path, kind, name, None, limits, why)]

        with self._failing(fail):
            runtime.open()
            runtime.context(len(ids))
            logits = runtime.read(ids, positions, positions[1::2])
            for first, name in enumerate(names):
                comparison = Comparison(self._recipe.parity.near_tie)
                comparison.update(rows.logits[0, first::2], logits[first::2], rows.next_ids(0)[first::2])
                metrics = comparison.metrics()
                entry["parity"][name] = metrics.as_dict()
                self.proof.gates += gates_of_length(artifact.path, kind, name, metrics, limits)
        self._advance(f"{artifact.path}: {len(ids):,} tokens", len(ids))

    def _caches(self, row: Runtime) -> list[str]:
        """Return the types that the KV cache can have for this model: their blocks must divide head_dim."""
        return [name for name in row.caches if self._student.shape.head_dim % format_of(f"gguf:{name}").block == 0]

    def _kv_rows(self) -> np.ndarray:
        length = self._text.rows.shape[1]
        return self._text.rows[:-(-self._recipe.parity.kv_cache_positions // length)]

    def _kv_cache(self, artifact: Artifact, runtime: WorkerRuntime) -> dict[str, float | None]:
        """Measure the mean KL with each type of KV cache; None if the model cannot have it, or the runtime failed."""
        found: dict[str, float | None] = dict.fromkeys(runtime.row.caches)
        for kind in self._caches(runtime.row):
            gate = Gate(f"KV cache in {kind}", artifact.path, "failures", 1, 0, "==")
            with self._failing(lambda why, gate=gate: [gate.because(why)]):  # type: ignore[misc]
                runtime.open()
                runtime.context(self._n_ctx, cache=kind)
                comparison = Comparison(self._recipe.parity.near_tie)
                for i, ids in enumerate(self._kv_rows()):
                    comparison.update(self._held_out.logits[i], runtime.prefill(ids[None])[0],
                                      self._held_out.next_ids(i))
                    self._advance(f"{artifact.path}: KV cache in {kind}", ids.size)
                found[kind] = comparison.metrics().as_dict()["kl_mean"]
        return found

    def _generation(self, artifact: Artifact, runtime: WorkerRuntime, only_first: bool = False) -> dict[str, str]:
        """Generate sample texts. A runtime that returns no ids, or ids outside the vocabulary, has failed."""
        gate = Gate(f"smoke generation{runtime.row.gate_suffix}", artifact.path, "tokens", None, 1, ">=")
        made: list[int] = []
        with self._failing(lambda why: [gate.because(why)]):
            if only_first:
                made = runtime.generate(self._prompts[0], self._n_generated, self._stop)
            else:
                made = self._sample(artifact.path, runtime.generate)[0]
            known = self._known(made)
            self.proof.gates.append(gate.judged(len(known) if len(known) == len(made) else None))
        return {"prompt": self._text.prompts[0],
                "text": str(self._tokenizer.decode(self._known(made), skip_special_tokens=True))}

    def _token_parity(self, artifact: Artifact, runtime: WorkerRuntime) -> None:
        self._advance(f"{artifact.path}: token ids and chat template")
        gate = Gate("token ids", artifact.path, "mismatches", None, 0, "==")
        with self._failing(lambda why: [gate.because(why)]):
            found = compare_token_ids(self._tokenizer, runtime.tokenize)
            self.proof.tokenizer.append({"artifact": artifact.path, "n_strings": found.n_strings,
                                         "n_mismatches": found.n_mismatches, "n_normalized": found.n_normalized,
                                         "examples": [example.as_dict() for example in found.examples]})
            self.proof.gates.append(gate.judged(found.n_mismatches))

    def _chat_parity(self, artifact: Artifact, runtime: WorkerRuntime) -> None:
        """Compare the chat template as rendered by each engine of the runtime."""
        name = f"chat template{runtime.row.gate_suffix}"
        gates, row = self._chat.judge(artifact.path, runtime, name, self._folder / artifact.path)
        self.proof.gates += gates
        if row is not None:
            self.proof.chat_template.append(row)

    def _stop_tokens(self, artifact: Artifact, runtime: WorkerRuntime) -> None:
        """Check that the runtime ends a text at every token that ends it in Hugging Face, or it would never stop."""
        gate = Gate(f"stop tokens{runtime.row.gate_suffix}", artifact.path, "missing", None, 0, "==")
        with self._failing(lambda why: [gate.because(why)]):
            missing = sorted(set(self._stop) - runtime.end_tokens())
            texts = ", ".join(f"{self._tokenizer.decode([i])!r} ({i})" for i in missing)
            self.proof.gates.append(gate.judged(len(missing)).because(
                f"{runtime.name} does not end a text at {texts}" if missing else ""))
