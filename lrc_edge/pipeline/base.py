"""What every stage of a build shares: running only what is not done, hashes of inputs, held-out text."""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lrc_edge import __version__
from lrc_edge.checkpoint import TOKENIZER_PARTS, DenseCheckpoint, resolve_model
from lrc_edge.console import Task, running, stage_line
from lrc_edge.corpus.held_out import HeldOut, built_in_text
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.parity import Gate
from lrc_edge.recipe import Recipe
from lrc_edge.workspace import BuildDir


@dataclass(frozen=True)
class Teacher:
    """A teacher as the user named it, and what is behind the name."""

    source: str
    revision: str
    checkpoint: DenseCheckpoint

    @classmethod
    def of(cls, source: str) -> Teacher:
        path, name, revision = resolve_model(source)
        return cls(source, revision, DenseCheckpoint.open(path, name))


class Stages:
    """One output directory being built: where it is, of what, and how a stage runs."""

    def __init__(self, out: Path, recipe: Recipe, console: Console, teacher: Teacher | None = None,
                 leads: bool = True):
        """`leads`: off in all but the first of several processes that train together; they write nothing here."""
        self.recipe, self.console, self.teacher, self.leads = recipe, console, teacher, leads
        self.dir = BuildDir.create(out) if leads else BuildDir(out)
        self.out = out
        self._stage_work = 0  # stages that really ran

    def _stage(self, name: str, inputs: Any, outputs: list[Path], work: Callable[[Task], tuple[Any, str]],
               total: int | None = None) -> None:
        """Run `work` unless it is done. It returns the stage's result and the line that tells of it."""
        fingerprint = self.dir.fingerprint(name, inputs)
        if self.dir.is_done(name, fingerprint):
            stage_line(self.console, name, "unchanged, nothing to do")
            return
        if not self.leads:
            work(Task(self.console, name, None))
            return
        self.dir.forget(name)
        started = time.monotonic()
        with running(self.console, name, total) as task:
            result, line = work(task)
        self.dir.record(name, fingerprint, outputs, result)
        self._stage_work += 1
        stage_line(self.console, name, line, time.monotonic() - started)

    def drop(self, stage: str) -> None:
        """A stage that this recipe has not: what an earlier one left would be taken for its work."""
        self.dir.forget(stage)
        shutil.rmtree(self.out / stage, ignore_errors=True)

    def describe_job(self, **facts: Any) -> None:
        """Remember what this directory is of, for commands that are given the directory alone."""
        self.dir.manifest["job"] = {"recipe": self.recipe.as_dict(), **facts}
        self.dir.manifest["lrc_edge"] = __version__
        self.dir.save()

    # -- inputs of stages ----------------------------------------------------------------------------------------------

    @property
    def _teacher(self) -> DenseCheckpoint:
        assert self.teacher is not None
        return self.teacher.checkpoint

    def _hashes(self, model: DenseCheckpoint) -> list[str]:
        return [self.dir.hash(file) for file in (model.path / "config.json", *model.weight_files())]

    def _tokenizer_hashes(self, checkpoint: DenseCheckpoint) -> list[str]:
        return [self.dir.hash(checkpoint.path / n) for n in TOKENIZER_PARTS if (checkpoint.path / n).exists()]

    def _check_settings(self) -> list[Any]:
        return [asdict(self.recipe.parity), asdict(self.recipe.gates)]

    def _held_out(self, model: DenseCheckpoint) -> HeldOut:
        """The build's held-out text; for a model that came without a build, --data or Python's own documentation."""
        if (self.out / "data" / "held_out.npz").exists():
            return HeldOut.load(self.out / "data" / "held_out.npz")
        sources = self.recipe.data.sources
        fields = Fields(self.recipe.data.text_field, self.recipe.data.messages_field)
        texts = documents(sources, fields) if sources else built_in_text()
        n_tokens = 2 * self.recipe.parity.positions + self.recipe.export.calibration_tokens
        return HeldOut.from_texts(texts, model.tokenizer(), n_tokens)

    def held_out_rows(self, model: DenseCheckpoint) -> Any:
        return self._held_out(model).rows(self._row_len(model), self.recipe.parity.positions, self._bos(model))

    @staticmethod
    def _bos(model: DenseCheckpoint) -> int | None:
        """The BOS, where the tokenizer writes it before a text."""
        tokenizer = model.tokenizer()
        adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return tokenizer.bos_token_id if adds_bos else None

    def _prompts(self, model: DenseCheckpoint) -> list[str]:
        """The recipe's, or the beginnings of held-out documents; Python's documentation would begin no sentence."""
        if self.recipe.parity.prompts:
            return list(self.recipe.parity.prompts)
        return list(self._held_out(model).openings[:2] if self.recipe.data.sources else ()) or ["Once upon a time"]

    def _row_len(self, model: DenseCheckpoint) -> int:
        return min(self.recipe.parity.row_len, model.shape.max_position_embeddings)

    @staticmethod
    def _gates(gates: list[Gate]) -> list[dict[str, Any]]:
        return [gate.as_dict() for gate in gates]
