"""The table of report.json: the results that the stages recorded in build.json, with names, shapes and versions."""
from __future__ import annotations

import math
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from lrc_edge import __version__
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.formats import mixed_encoding
from lrc_edge.machine import processors
from lrc_edge.report.schema import ArtifactRow, HeldOutFigures, ModelRow, Report


def report_table(stages: dict[str, Any], student: DenseCheckpoint, teacher: DenseCheckpoint | None,
                 curve: list[dict[str, Any]]) -> Report:
    """Return the contents of report.json.

    stages: as recorded in build.json, including "check". curve: rows of metrics.jsonl; empty if nothing was trained.
    """
    check = stages["check"]["result"]
    training = stages["train"]["result"] if "train" in stages else None
    gates = [gate for stage in ("identity", "fold") if stage in stages for gate in stages[stage]["result"]]
    table: Report = {
        "lrc_edge": __version__, "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf", "llama-cpp-python", "onnx",
                                                      "onnxruntime", "onnxruntime-genai")},
        "machine": f"{processors()} processors",
        "teacher": _describe(teacher) if teacher else None,
        "student": _describe(student), "artifacts": check["artifacts"], "gates": gates + check["gates"],
        "calibration": stages["imatrix"]["result"] if "imatrix" in stages else None,
        "grid": stages["quantize"]["result"] if "quantize" in stages else None,
        "allocation": _allocation(stages["allocate"]["result"], check["artifacts"]) if "allocate" in stages else None,
        "rounding": check["rounding"], "lengths": check["lengths"], "notes": check["notes"],
        "tokenizer": check["tokenizer"], "chat_template": check["chat_template"], "samples": check["samples"]}
    full = training.get("full_vocabulary") if training else None  # only if the student has fewer tokens
    if table["teacher"]:
        # The measured teacher has the student's vocabulary, the described one its own.
        table["teacher"]["proof_perplexity"] = None if full else check["teacher_perplexity"]
        if full:
            table["teacher"]["full_vocabulary"] = _held_out_figures(full["held_out_loss"], full["bytes_per_token"])
    if training is not None:
        table["student"]["training"] = {**training, "curve": curve}
        for who, row in (("teacher", table["teacher"]), ("student", table["student"])):
            if row:
                row["held_out"] = _held_out_figures(training[f"{who}_held_out_loss"], training["bytes_per_token"])
    return table


def _allocation(table: dict[str, Any], artifacts: list[ArtifactRow]) -> dict[str, Any] | None:
    """Return the planned mixed precision with what its file measured; None if the file is not written yet."""
    file = next((a for a in artifacts if a["encoding"] == mixed_encoding(table["bits_per_weight"])), None)
    return file and {**table, "measured_bits_per_weight": file["bits_per_weight"],
                     "measured_kl": file["parity"]["prefill"]["kl_mean"]}


def _describe(model: DenseCheckpoint) -> ModelRow:
    shape = model.shape.as_dict()
    family = shape.pop("family")
    return {"name": model.name, "path": model.path.name, "family": family, "shape": shape,
            "n_params": model.shape.n_params, "license": model.card.get("license"), "provenance": model.provenance}


def _held_out_figures(loss: float, bytes_per_token: float) -> HeldOutFigures:
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / bytes_per_token}
