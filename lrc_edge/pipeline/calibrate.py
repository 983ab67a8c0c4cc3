"""The stages that quantizers learn from: importance matrix, sensitivity, and the types of a mixed precision."""
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import Task
from lrc_edge.corpus.held_out import Calibration
from lrc_edge.pipeline.base import Stages
from lrc_edge.workspace import replace_tree

if TYPE_CHECKING:
    from lrc_edge.export.quantize.mixed_precision import Allocation


class CalibrationStages(Stages):
    """All on the same calibration text, which the proof does not see."""

    def calibrate(self, student: DenseCheckpoint, student_hashes: list[str], needed: bool) -> None:
        """What the recipe's formats need of it; what an earlier recipe needed is dropped."""
        mixed = self.recipe.export.bits_per_weight > 0
        if needed:
            calibration = self.calibration(student)
            self._importance_matrix(student, student_hashes, calibration)
            if mixed:
                self._sensitivity(student, student_hashes, calibration)
                self._allocate(student)
        else:
            self.drop("imatrix")
        if not mixed:
            self.drop("sensitivity")
            self.drop("allocate")

    def calibration(self, model: DenseCheckpoint) -> Calibration:
        """Rows of the build's training text, or of what the given text holds behind the proof's rows."""
        row_len = self._row_len(model)
        held_out = self._held_out(model).ids
        if (self.out / "data" / "data.json").exists():
            from lrc_edge.train.data.tokenize import PackedRows

            rows, source = PackedRows(self.out / "data", row_len), "training text"
            candidates = (rows[i]["input_ids"].numpy() for i in range(len(rows)))
        else:
            source = "--data, behind the proof's" if self.recipe.data.sources else "Python's documentation"
            n_proof = self.held_out_rows(model).size
            held_out, rest = held_out[:n_proof], held_out[n_proof:]
            candidates = (rest[i:i + row_len] for i in range(0, len(rest) - row_len + 1, row_len))
        n_rows = max(1, self.recipe.export.calibration_tokens // row_len)
        return Calibration.choose(candidates, (n_rows, row_len), held_out, source)

    def _importance_matrix(self, student: DenseCheckpoint, student_hashes: list[str], calibration: Calibration) -> None:
        """How strongly each weight's inputs fire, for the quantizers, on text that the proof does not see."""
        file = self._imatrix_file(student)

        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.export.quantize.imatrix import collect
            from lrc_edge.export.quantize.imatrix_file import write_imatrix

            with self.dir.partial("imatrix") as partial:
                partial.mkdir()
                importance = collect(student, calibration.rows, task)
                n_rows, row_len = calibration.rows.shape
                write_imatrix(partial / file.name, student, importance, n_rows, row_len,
                              f"sha256:{calibration.sha256}")
                replace_tree(partial, file.parent)
            left_out = f"; {calibration.n_left_out} rows left out that share text with the proof's"
            return calibration.as_dict(), (f"importance of inputs on {calibration.rows.size:,} tokens"
                                           + left_out * bool(calibration.n_left_out))

        self._stage("imatrix", [student_hashes, file.name, calibration.as_dict()], [file], work)

    def _sensitivity(self, student: DenseCheckpoint, student_hashes: list[str], calibration: Calibration) -> None:
        """What each matrix suffers from each type, for a mixed precision of any size."""
        from lrc_edge.export.quantize.sensitivity import SAMPLE, measure

        file = self.out / "sensitivity" / "sensitivity.json"
        rows = calibration.rows[:SAMPLE[0], :SAMPLE[1]]
        imatrix = self._imatrix_file(student)

        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.export.quantize.imatrix_file import read_imatrix

            with self.dir.partial("sensitivity") as partial:
                partial.mkdir()
                costs = measure(student, rows, read_imatrix(imatrix, student), task)
                (partial / file.name).write_text(json.dumps({"tokens": rows.size, "kl": costs}, indent=1) + "\n")
                replace_tree(partial, file.parent)
            return None, f"KL of {len(costs)} matrices in each type, on {rows.size:,} tokens"

        inputs = [student_hashes, self.dir.hash(imatrix), calibration.as_dict(), SAMPLE]
        self._stage("sensitivity", inputs, [file], work)

    def _allocate(self, student: DenseCheckpoint) -> None:
        """The type of every matrix in the file of mixed precision."""
        from lrc_edge.export.gguf.to_gguf import gguf_name

        bits_per_weight = self.recipe.export.bits_per_weight

        def work(task: Task) -> tuple[Any, str]:
            allocation = self._allocation(student)
            types = {gguf_name(weight): allocation.types[weight.name].name for weight in student.weights()
                     if weight.name in allocation.types}
            told = ", ".join(f"{n} x {type}" for type, n in sorted(Counter(types.values()).items()))
            table = {"bits_per_weight": bits_per_weight, "predicted_kl": allocation.predicted_kl, "types": types}
            return table, f"{bits_per_weight:g} bits a weight: {told}; predicted KL {allocation.predicted_kl:.4f}"

        self._stage("allocate", [bits_per_weight, self.dir.output_hashes("sensitivity")], [], work)

    def _allocation(self, student: DenseCheckpoint) -> Allocation:
        from lrc_edge.export.gguf.to_gguf import rope_factor_bytes
        from lrc_edge.export.quantize.mixed_precision import allocate

        costs = json.loads((self.out / "sensitivity" / "sensitivity.json").read_text())["kl"]
        return allocate(student.weights(), costs, self.recipe.export.bits_per_weight, rope_factor_bytes(student))

    def _imatrix_file(self, student: DenseCheckpoint) -> Path:
        from lrc_edge.export.gguf.to_gguf import file_stem

        return self.out / "imatrix" / f"{file_stem(student)}.imatrix.gguf"
