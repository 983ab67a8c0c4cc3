"""Check artifacts in a profile's runtimes against the stored outputs of the PyTorch student, without PyTorch."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc_edge.artifact import Artifact, sha256_of
from lrc_edge.errors import UserError
from lrc_edge.parity import CHANGES, Gate, gates_of_device
from lrc_edge.recipe import Recipe
from lrc_edge.stored_reference import DeviceComparison, StoredReference
from lrc_edge.targets.devices import kits
from lrc_edge.targets.memory import memory_of
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.runtimes.table import DeviceRuntime
from lrc_edge.targets.runtimes.worker import Worker

Progress = Callable[[str], None]
SCORE_SECONDS = 20.0  # after them no further row, or part of the corpus, is begun
TEXT_PARTS = 16  # of the corpus, taken in turn while there is time: wllama needs a tenth of a second per text
SLOW_CONTEXT = 512  # tokens under emulation: llama.cpp's batch, where its matrix kernels are at work
LEFT = 8  # tokens between the end of the long prompt and the end of the context
SLOWEST_SECONDS = 3600.0  # of one answer: a row of a large model under emulation


@dataclass(frozen=True)
class CheckInput:
    """The input of every check of a build."""

    out: Path  # the folder that artifacts' paths are relative to
    reference: StoredReference
    recipe: Recipe
    threads: int


def check_artifact(artifact: Artifact, runtime: DeviceRuntime, profile: Profile, facts: CheckInput,
                   progress: Progress) -> dict[str, Any]:
    """Return a row of the target's table: figures, gates, and `state` (passed, failed, or not checked with `why`)."""
    row: dict[str, Any] = {"target": profile.name, "artifact": artifact.path, "format": artifact.format,
                           "encoding": artifact.encoding, "runtime": runtime.name, "emulated": runtime.emulated,
                           "label": runtime.name, "gates": []}
    if why := kits.missing(runtime.kits):
        return {**row, "state": "not checked", "why": f"{why}; lrc-edge targets setup {profile.name_or_path}"}
    check = _Check(artifact, runtime, profile, facts, progress, row)
    try:
        check.run()
    except UserError as error:  # of the worker, or an answer of the wrong shape
        row["why"] = str(error)
    check.judge("device run", "failures", int("why" in row), 0, "==")
    check.judge("file as built", CHANGES, int(not is_as_built(artifact, facts.out)), 0, "==")
    row["gates"] = [{**gate.as_dict(), "target": profile.name} for gate in check.gates]
    row["state"] = "passed" if all(gate.passed for gate in check.gates) else "failed"
    return row


class _Check:
    """The check of one artifact in one runtime. Each result is stored in `row` at once, so that a crash loses none."""

    def __init__(self, artifact: Artifact, runtime: DeviceRuntime, profile: Profile, facts: CheckInput,
                 progress: Progress, row: dict[str, Any]):
        self._artifact, self._runtime, self._profile, self._facts, self._row = artifact, runtime, profile, facts, row
        self._progress = lambda text: progress(f"{artifact.path} in {runtime.name}: {text}")
        planned = min(profile.context, SLOW_CONTEXT) if runtime.emulated else profile.context
        row_len = facts.reference.ids.shape[1]  # the reference's own rows must have room
        self._n_ctx = min(facts.reference.shape.max_position_embeddings, max(planned, row_len))
        self.gates: list[Gate] = []

    def judge(self, name: str, metric: str, value: float | None, limit: float, relation: Any) -> None:
        self.gates.append(Gate(name, f"{self._artifact.path} ({self._row['label']})", metric, value, limit, relation))

    def run(self) -> None:
        path = self._facts.out / self._artifact.path
        folder = self._facts.out / self._artifact.format  # of an ONNX file: with its config and tokenizer
        with self._runtime.start(folder) as command, Worker(command) as worker:
            self._progress("loading")
            self._row |= worker.ask("open", path=str(path.resolve()), n_ctx=self._n_ctx, threads=self._facts.threads)
            self._score(worker)
            if self._runtime.row.tokenizes:
                self._token_ids(worker)
            self._fill_context(worker)
            self._memory(worker)
            if self._runtime.row.in_page:
                foreign = worker.ask("requests")["foreign"]
                self._row["foreign_requests"] = foreign
                self.judge("requests of the page", "foreign", len(foreign), 0, "==")

    def _score(self, worker: Worker) -> None:
        reference, near_tie = self._facts.reference, self._facts.recipe.parity.near_tie
        comparison, started = DeviceComparison(reference, near_tie), time.monotonic()
        for i, ids in enumerate(reference.ids):
            self._progress(f"row {i + 1} of {len(reference.ids)}")
            comparison.update(i, **worker.ask("score", SLOWEST_SECONDS, ids=ids.tolist(),
                                              wanted=reference.wanted(i).tolist()))
            if time.monotonic() - started > SCORE_SECONDS:
                break
        figures = comparison.figures()
        self._row |= figures
        kind = self._artifact.name
        self.gates += gates_of_device(f"{self._artifact.path} ({self._row['label']})", kind, figures,
                                      self._facts.recipe.gates)

    def _token_ids(self, worker: Worker) -> None:
        """Compare the token ids of texts spread over the corpus that fit the context, as many as time allows."""
        self._progress("token ids")
        reference, started = self._facts.reference, time.monotonic()
        asked = [(text, list(ids)) for text, ids in zip(reference.texts, reference.text_ids, strict=True)
                 if len(ids) < self._row["n_ctx"]]
        n_texts, wrong = 0, []
        for i in range(TEXT_PARTS):
            part = asked[i::TEXT_PARTS]
            got = worker.ask("tokenize", texts=[text for text, _ in part])["ids"]
            wrong += [text for (text, expected), ids in zip(part, got, strict=True) if expected != ids]
            n_texts += len(part)
            if time.monotonic() - started > SCORE_SECONDS:
                break
        self._row |= {"n_texts": n_texts, "token_mismatches": len(wrong), "mismatched": wrong[:3]}
        self.judge("token ids", "mismatches", len(wrong), 0, "==")

    def _fill_context(self, worker: Worker) -> None:
        """Read a prompt that nearly fills the context in one pass, then request more tokens than fit."""
        self._progress(f"{self._row['n_ctx']} tokens of context")
        prompt = self._facts.reference.long_prompt(self._row["n_ctx"] - LEFT)
        made = worker.ask("generate", SLOWEST_SECONDS, ids=prompt, n_tokens=8 * LEFT, stop=[])["ids"]
        self._row["context"] = {"prompt": len(prompt), "made": len(made)}
        self.judge("end of context", "tokens", len(made), LEFT + 1, "<=")
        if not self._runtime.row.ends_texts:  # an end of text may be what comes next
            self.judge("end of context", "tokens", len(made), 1, ">=")

    def _memory(self, worker: Worker) -> None:
        """Predict memory; measure it too unless emulated, since an emulator's memory is not the device's."""
        profile, shape = self._profile, self._facts.reference.shape
        memory = memory_of(shape, self._artifact.name, self._runtime.name,
                           min(shape.max_position_embeddings, profile.context), profile.features)
        self._row["memory"] = {"predicted_bytes": memory.needed}
        self.judge("predicted memory", "bytes", memory.needed, profile.usable_bytes, "<=")
        if not self._runtime.emulated:
            self._row["memory"] |= (measured := worker.ask("memory"))
            if measured["peak_bytes"]:
                self.judge("peak memory", "bytes", measured["peak_bytes"], profile.usable_bytes, "<=")


def is_as_built(artifact: Artifact, out: Path) -> bool:
    """Whether the files are, byte for byte, what the build wrote."""
    path = out / artifact.path
    shards = sorted(path.parent.glob(f"{path.name}_data*"), key=lambda shard: (len(shard.name), shard.name))
    return sha256_of(path, *shards) == artifact.sha256
