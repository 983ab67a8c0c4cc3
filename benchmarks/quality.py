"""Quality of each encoding, with and without importance matrix and quantization-aware training, and of a baseline.

    make demo && python benchmarks/quality.py demo-out/student examples/demo/storyteller \
        --data examples/demo/stories.jsonl --judge unseen.jsonl --work quality

`lrc-edge export` writes every file except the baseline's (onnxruntime-genai's model builder, int4 in blocks of 32 at
accuracy_level 4). Each file is evaluated in its own runtime against the PyTorch model in float32, on --judge, which
must not have been used for training or calibration. Perplexities have standard errors of the difference, on the same
tokens. Models that are already in --work are not made again.
"""
from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from export import genai_builder
from lrc_edge.artifact import Artifact
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.parity import Metrics
from lrc_edge.targets.proof.reference import HeldOutRows, Reference
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime

GGUF = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")
MIXED = "4.25"
ONNX = ("q8", "q4")
NEAR_TIE = 0.01


@dataclass(frozen=True)
class Row:
    """One file. Perplexity differences are from the unquantized model."""

    model: str
    file: str  # "GGUF Q4_0"
    imatrix: bool
    on_grid: bool  # made from the model after quantization-aware training
    bytes: int
    bits_per_weight: float
    metrics: Metrics
    identical_blocks: float | None = None


@dataclass(frozen=True)
class Export:
    """One run of `lrc-edge export`."""

    name: str
    formats: tuple[str, ...]
    settings: tuple[str, ...] = ()
    label: str = ""  # after the encoding
    begins_as: str = ""  # another export, whose finished stages are reused

    @property
    def imatrix(self) -> bool:
        return "export.calibration_tokens=0" not in self.settings


def exports(grid_tokens: int) -> list[Export]:
    without = "export.calibration_tokens=0"
    grid = f"quantize.tokens={grid_tokens}"
    gguf = tuple(f"gguf:{e}" for e in GGUF)
    onnx = tuple(f"onnx:{e}" for e in ONNX)
    return [Export("imatrix", (*gguf, *onnx), (f"export.bits_per_weight={MIXED}",), ", level 4"),
            Export("plain", (*gguf, *onnx), (without,), ", level 4"),
            Export("level0", onnx, ("export.onnx_accuracy_level=0",), ", level 0"),
            Export("grid", ("gguf:q4_0", "onnx:q4"), (grid, without), ", level 4"),
            Export("grid-level0", ("onnx:q4",), (grid, without, "export.onnx_accuracy_level=0"), ", level 0", "grid")]


def run_export(model: Path, export: Export, data: str, out: Path, seq_len: int) -> list[Artifact]:
    """Return the artifacts of the export, which runs unless they exist. A failed gate does not matter here."""
    if not (out / "report.json").exists():
        if export.begins_as:
            shutil.copytree(out.with_name(export.begins_as), out, ignore=shutil.ignore_patterns("report.*"))
        settings = (*export.settings, f"train.seq_len={seq_len}", "parity.positions=256")
        command = [sys.executable, "-m", "lrc_edge", "export", str(model), "--data", data, "--out", str(out),
                   "--formats", ",".join(export.formats), *(part for s in settings for part in ("--set", s))]
        status = subprocess.run(command).returncode
        if status not in (0, 1):
            sys.exit(status)
    stages = json.loads((out / "build.json").read_text())["stages"]
    tables = [table for kind in ("gguf", "onnx") if kind in stages for table in stages[kind]["result"]]
    return [Artifact.from_dict(table) for table in tables]


def rows_of(model: Path, data: str, judge_on: str, work: Path, grid_tokens: int, positions: int) -> Iterator[Row]:
    checkpoint = DenseCheckpoint.open(model)
    seq_len = min(256, checkpoint.shape.max_position_embeddings)
    wanted = exports(grid_tokens)
    made = {export.name: run_export(model, export, data, work / export.name, seq_len) for export in wanted}
    texts = documents([judge_on], Fields())
    unseen = HeldOut.from_texts(texts, checkpoint.tokenizer(), positions + 1).rows(seq_len, positions, None)
    reference = HeldOutRows.of(Reference(checkpoint.model()), unseen)

    def judge(open_: Callable[[], LlamaCpp | OnnxRuntime]) -> Metrics:
        runtime = open_()
        try:
            return reference.compare(runtime.prefill, NEAR_TIE)
        finally:
            runtime.close()

    for export in wanted:
        for artifact in made[export.name]:
            path = work / export.name / artifact.path
            if artifact.format == "gguf":
                metrics, label = judge(lambda path=path: LlamaCpp(path, n_ctx=seq_len, threads=1)), ""  # type: ignore
            else:
                metrics, label = judge(lambda path=path: OnnxRuntime(path)), export.label  # type: ignore[misc]
            yield Row(checkpoint.name, f"{artifact.format.upper()} {artifact.encoding.upper()}{label}", export.imatrix,
                      "grid" in export.name, artifact.bytes, artifact.bits_per_weight, metrics,
                      artifact.identical_blocks)
    peer = work / "builder"
    if not (peer / "model.onnx").exists():
        subprocess.run(genai_builder(model, peer), check=True, stdout=subprocess.DEVNULL)
    n_bytes = sum(file.stat().st_size for file in peer.glob("model.onnx*"))
    metrics = judge(lambda: BuilderModel(peer / "model.onnx", checkpoint))
    yield Row(checkpoint.name, "ONNX genai builder int4, level 4", False, False, n_bytes,
              8 * n_bytes / checkpoint.shape.n_params, metrics)


class BuilderModel(OnnxRuntime):
    """The builder's graph: its cache has a symbolic head size, and it computes positions from the mask."""

    def __init__(self, path: Path, checkpoint: DenseCheckpoint):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        empty = np.zeros((1, checkpoint.shape.num_key_value_heads, 0, checkpoint.shape.head_dim), np.float32)
        self._empty_past = {name: empty for name in names if name.startswith("past_key_values.")}
        self._outputs = [value.name for value in session.get_outputs()]
        self._session = Without(session, {"position_ids"} - set(names))


@dataclass
class Without:
    """A session that drops some inputs."""

    session: onnxruntime.InferenceSession
    left_out: set[str]

    def run_with_ort_values(self, outputs: list[str], feeds: dict[str, onnxruntime.OrtValue]) -> list[Any]:
        kept = {name: value for name, value in feeds.items() if name not in self.left_out}
        return self.session.run_with_ort_values(outputs, kept)


def table(rows: list[Row]) -> str:
    """Return Markdown: one table per model, files in the order of writing."""
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        perplexity = mine[0].metrics.ppl - mine[0].metrics.delta_ppl
        lines += [f"{model}: perplexity {perplexity:.4f} unquantized, {mine[0].metrics.positions:,} tokens", "",
                  "| file | imatrix | MB | bits a weight | KL mean | KL p99 | top-1 | ppl difference |",
                  "|---|---|---|---|---|---|---|---|"]
        for row in mine:
            m = row.metrics
            name = row.file + (" **trained on its grid**" if row.on_grid else "")
            lines.append(f"| {name} | {'yes' if row.imatrix else 'no'} | {row.bytes / 1e6:.2f} | "
                         f"{row.bits_per_weight:.2f} | {m.kl_mean:.5f} | {m.kl_p99:.4f} | {m.top1:.4f} | "
                         f"{m.delta_ppl:+.4f} ± {m.delta_ppl_se:.4f} |")
        lines += ["", *verdict(mine), ""]
    return "\n".join(lines)


def verdict(rows: list[Row]) -> list[str]:
    """Return what quantization-aware training recovers, and the share of file blocks equal to the trained ones."""
    trained = next(row for row in rows if row.on_grid and row.file.startswith("GGUF"))
    told = []
    for imatrix in (False, True):
        plain = next(r for r in rows if r.file == trained.file and not r.on_grid and r.imatrix == imatrix)
        ppl = 1 - trained.metrics.delta_ppl / plain.metrics.delta_ppl
        kl = 1 - trained.metrics.kl_mean / plain.metrics.kl_mean
        told.append(f"{ppl:.0%} of the perplexity and {kl:.0%} of the KL that Q4_0 loses "
                    f"{'with' if imatrix else 'without'} an importance matrix")
    blocks = trained.identical_blocks if trained.identical_blocks is not None else math.nan
    return [f"Training on the grid recovers {' and '.join(told)}; {blocks:.2%} of the blocks are as trained."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="dense checkpoints")
    parser.add_argument("--data", required=True, help="text for calibration and training")
    parser.add_argument("--judge", required=True, help="text that is not in the models' training data or --data")
    parser.add_argument("--work", type=Path, required=True, help="folder for files and results")
    parser.add_argument("--grid-tokens", type=int, default=600_000, help="tokens of quantization-aware training")
    parser.add_argument("--positions", type=int, default=32_768, help="tokens to evaluate, at most those in --judge")
    args = parser.parse_args()
    rows: list[Row] = []
    for model in args.models:
        name = DenseCheckpoint.open(model).name
        rows += rows_of(model, args.data, args.judge, args.work / name, args.grid_tokens, args.positions)
        (args.work / "rows.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        (args.work / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
