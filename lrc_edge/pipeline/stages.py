"""The stages of a build, in order. Each command runs a selection of them.

    teacher -> weights vocabulary data identity start train fold -> student
    student -> quantize imatrix sensitivity allocate gguf onnx -> files -> check -> report

A stage reads and writes files, and is skipped if its named inputs and its outputs are unchanged (stage.py).
"""
from __future__ import annotations

from lrc_edge.pipeline import check_stages, export_stages, training_stages
from lrc_edge.pipeline.stage import ON_GRID, STUDENT, VOCABULARY, Stage
from lrc_edge.stored_reference import REFERENCE_FILE, TEACHER_FILE

STAGES = (
    Stage("weights", 1, check_stages.weights, check_stages.weights_inputs),
    Stage("vocabulary", 1, training_stages.vocabulary, training_stages.vocabulary_inputs, outputs=(VOCABULARY,),
          wanted=lambda plan: plan.trims_vocabulary, is_optional=True),
    Stage("data", 4, training_stages.data, training_stages.data_inputs, outputs=("data",),
          wanted=lambda plan: plan.trains or plan.trains_on_grid, total=lambda build: build.recipe.train.tokens or None,
          finish=training_stages.data_finished),
    Stage("identity", 2, training_stages.identity, training_stages.identity_inputs, is_gate=True,
          wanted=lambda plan: plan.trains),
    Stage("start", 3, training_stages.start, training_stages.start_inputs, outputs=("start",),
          wanted=lambda plan: plan.trains),
    Stage("train", 4, training_stages.train, training_stages.train_inputs,
          outputs=("train/trained.safetensors", "train/metrics.jsonl", "train/training.json"),
          wanted=lambda plan: plan.trains, finish=training_stages.train_finished),
    Stage("fold", 2, training_stages.fold, training_stages.fold_inputs, outputs=(STUDENT,),
          wanted=lambda plan: plan.trains),
    Stage("quantize", 2, training_stages.quantize, training_stages.quantize_inputs, outputs=(ON_GRID,),
          scratch=("quantize",), wanted=lambda plan: plan.trains_on_grid, is_optional=True,
          total=lambda build: build.recipe.quantize.tokens, finish=training_stages.quantize_finished),
    Stage("imatrix", 2, export_stages.imatrix, export_stages.calibration_inputs, outputs=("imatrix",),
          wanted=lambda plan: plan.calibrates("gguf") or plan.calibrates("onnx"), is_optional=True),
    Stage("sensitivity", 1, export_stages.sensitivity, export_stages.sensitivity_inputs,
          outputs=("sensitivity",), wanted=lambda plan: plan.mixes_types, is_optional=True),
    Stage("allocate", 1, export_stages.allocate, export_stages.allocate_inputs, wanted=lambda plan: plan.mixes_types,
          is_optional=True),
    Stage("gguf", 2, export_stages.gguf, export_stages.gguf_inputs, outputs=("gguf",),
          wanted=lambda plan: plan.writes("gguf"), is_optional=True),
    Stage("onnx", 2, export_stages.onnx, export_stages.onnx_inputs, outputs=("onnx",),
          wanted=lambda plan: plan.writes("onnx"), is_optional=True),
    Stage("check", 3, check_stages.check, check_stages.check_inputs, outputs=(REFERENCE_FILE,)),
    Stage("teacher", 1, export_stages.teacher, export_stages.teacher_inputs, outputs=(TEACHER_FILE,),
          wanted=lambda plan: plan.times_teacher, is_optional=True),
)


def stages(first: str = STAGES[0].name, last: str = STAGES[-1].name) -> tuple[Stage, ...]:
    """Return the stages from `first` to `last`, both included. Raises ValueError for an unknown name."""
    names = [stage.name for stage in STAGES]
    return STAGES[names.index(first):names.index(last) + 1]
