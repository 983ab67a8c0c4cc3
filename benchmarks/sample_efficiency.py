"""Sample efficiency of ways to train a student: same teacher, text, order, student shape and steps.

    python benchmarks/sample_efficiency.py --quick                     # under 15 minutes on 2 cores
    python benchmarks/sample_efficiency.py --text stories.jsonl --held-out other.jsonl --out OUT

Every method uses lrc_edge's own trainer, with seed 0 at each learning rate of a small grid, then with the other seeds
at the best rate. Finished runs are stored in OUT/runs.jsonl and not repeated, so a killed benchmark resumes, and
several processes may share OUT with different --methods. At the end it writes the table OUT/table.md and, if matplotlib
is installed, OUT/curves.png; --render does only that.
"""
from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from efficiency_table import Run, best_rate, read_runs, render
from torch import nn

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.lineage import Lineage
from lrc_edge.recipe import load_recipe
from lrc_edge.train import losses
from lrc_edge.train.clone import Clone
from lrc_edge.train.data.tokenize import PackedRows, prepare
from lrc_edge.train.initialize import INITS
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import Trainer, choose_device, choose_precision, held_out_loss
from lrc_edge.train.masks import positions_of
from lrc_edge.train.phases import DENSE

DEMO = Path(__file__).parent.parent / "examples" / "demo"
EVAL_TOKENS, CALIBRATION_ROWS = 8_192, 16
WEIGHT_GRID, PROJECTION_GRID = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Method:
    """`start` sets the initial values of a new clone; `settings` override the recipe's [train]."""

    name: str
    start: Callable[[Clone, torch.Tensor, int], None]
    settings: dict[str, Any]
    grid: tuple[float, ...]
    kind: type[Clone] = Clone


def from_random(clone: Clone, rows: torch.Tensor, seed: int) -> None:
    """Initialize a student as transformers does, without weights of the teacher."""
    torch.manual_seed(seed)
    clone.start(DENSE)
    clone.student.apply(clone.student._init_weights)


def from_projections(clone: Clone, rows: torch.Tensor, seed: int, init: str) -> None:
    clone.initialize(INITS[init](clone, rows, seed))


gaussian, selection, pca = (partial(from_projections, init=name) for name in ("gaussian", "selection", "pca"))


class Aligned(Clone):
    """TinyBERT's feature distillation (arXiv 1909.10351): the student's residual stream after every layer, mapped by
    one trained matrix per layer, is fitted to the teacher's, plus the KL at the head. Terms are relative to the
    teacher's mean square.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        width, teacher_width = self.lineage.student.hidden_size, self.lineage.teacher.hidden_size
        self.align = nn.ParameterDict({str(i): nn.Parameter(
            torch.randn(width, teacher_width, generator=generator) / width**0.5) for i in range(len(self.pairs))})

    def trainable(self) -> dict[str, nn.Parameter]:
        return super().trainable() | {f"align.{i}": p for i, p in self.align.items()}

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None,
                documents: torch.Tensor | None = None, *, objective: losses.Objective | None = None,
                n_labels: torch.Tensor | None = None, share: float = 1.0) -> losses.Losses:
        objective = objective or losses.Objective()
        if not objective.needs_teacher:
            return super().forward(input_ids, labels, objective=objective, n_labels=n_labels, share=share)
        assert labels is not None
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            teacher, student = self.teacher_parts, self.student_parts
            above, below = teacher.embedding(input_ids), student.embedding(input_ids)
            rope = student.rope(below.to(self.compute_dtype), positions_of(input_ids, None))
            features = below.new_zeros(1)
            for i, pair in enumerate(self.pairs):
                above, below, _ = pair(above, below, losses.Objective(clone=0.0), None, rope)
                features = features + losses.clone_term(below @ self.align[str(i)], above, relative=True)
            total, terms = losses.head_losses(
                student.norm(below).flatten(0, 1), student.head.weight, teacher.norm(above).flatten(0, 1),
                teacher.head.weight, labels.flatten(), objective, n_labels)
        return losses.Losses.of(total, terms, features * share, objective)


CLONE, KD = {"dense_share": 0.0}, {"dense_share": 1.0, "dense_alpha": 0.0}
ABSOLUTE = {"clone_terms": "absolute"}
METHODS = {method.name: method for method in (
    Method("from scratch", from_random, KD | {"kl_weight": 0.0}, WEIGHT_GRID),
    Method("KD from scratch", from_random, KD, WEIGHT_GRID),
    Method("TinyBERT-like", from_random, {"dense_share": 1.0, "dense_alpha": 1.0}, WEIGHT_GRID, Aligned),
    Method("hard pruning + KD", selection, KD, WEIGHT_GRID),
    Method("LRC as published", gaussian, CLONE | ABSOLUTE | {"kl_temperature": 40.0, "kl_weight": 1.28},
           PROJECTION_GRID),
    Method("LRC, selection (RED)", selection, CLONE | ABSOLUTE, PROJECTION_GRID),
    Method("LRC, selection, then dense", selection, ABSOLUTE | {"dense_share": 0.75}, WEIGHT_GRID),
    Method("LRC, components, absolute terms", pca, CLONE | ABSOLUTE, PROJECTION_GRID),
    Method("LRC, components, no terms", pca, CLONE | {"alpha": 0.0}, PROJECTION_GRID),
    Method("LRC, components", pca, CLONE, PROJECTION_GRID),
    Method("LRC, components, then dense", pca, {"dense_share": 0.75}, WEIGHT_GRID),
    Method("components, dense, no terms", pca, KD, WEIGHT_GRID),
    Method("components, dense, absolute terms", pca, ABSOLUTE, WEIGHT_GRID),
    Method("components, dense (default)", pca, {}, WEIGHT_GRID),
)}


def train_once(method: Method, rate: float, seed: int, args: argparse.Namespace, data: Path) -> Run:
    teacher = DenseCheckpoint.open(args.teacher)
    settings = load_recipe(None, (), train={
        "tokens": args.tokens, "seq_len": args.seq_len, "batch_tokens": args.batch_tokens, "seed": seed,
        "dense_learning_rate": rate,
        "learning_rate": rate if method.settings.get("dense_share") == 0 else args.clone_rate,
        "log_every": 10, "eval_every": max(1, args.tokens // args.batch_tokens // 20), "checkpoint_every": 10**9,
        "spike_factor": 0.0, "on_bad_batch": "skip", **method.settings}).train
    device = choose_device("auto")
    dtype = choose_precision("auto", device)
    rows = PackedRows(data, args.seq_len)
    lineage = Lineage.of(teacher.shape, teacher.shape.with_hidden_size(args.hidden_size))
    schedule = Schedule.of(settings, lineage.student, 0)
    clone = method.kind(teacher.model().to(device, dtype), lineage, dtype).to(device)
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]
    sample = torch.stack([rows[int(i)]["input_ids"] for i in picked]).to(device)
    started = time.monotonic()
    method.start(clone, sample, seed)
    held_out_BL = HeldOut.load(data / "held_out.npz").rows(args.seq_len, EVAL_TOKENS, None)
    with tempfile.TemporaryDirectory() as folder:
        metrics: list[dict[str, Any]] = []
        trainer = Trainer(clone, settings, schedule, rows, held_out_BL, Path(folder), metrics.append)
        trainer.run()
    return Run(method.name, rate, seed, args.tokens, time.monotonic() - started, trainer.clock.rate,
               [(row["tokens"], row["held_out_loss"]) for row in metrics if "held_out_loss" in row],
               sum("skipped" in row for row in metrics))


def prepare_data(args: argparse.Namespace) -> Path:
    """Return the packed tokens of the text, and held-out documents of it or of another text."""
    data: Path = args.out / "data"
    if (data / "held_out.npz").exists():
        return data
    partial_folder = args.out / ".data"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    tokenizer = DenseCheckpoint.open(args.teacher).tokenizer()
    texts = documents([str(args.text)], Fields())
    prepare([("text", texts)], tokenizer, partial_folder, held_out_share=0.05, max_tokens=None, seq_len=args.seq_len,
            progress=lambda n: None)
    if args.held_out:
        HeldOut.from_texts(documents([str(args.held_out)], Fields()), tokenizer).save(
            partial_folder / "held_out.npz")
    partial_folder.rename(data)
    return data


def teacher_loss(args: argparse.Namespace, data: Path) -> float:
    rows = HeldOut.load(data / "held_out.npz").rows(args.seq_len, EVAL_TOKENS, None)
    return held_out_loss(DenseCheckpoint.open(args.teacher).model(), rows, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=DEMO / "storyteller", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, default=DEMO / "stories.jsonl")
    parser.add_argument("--held-out", type=Path, help="text to evaluate on; default: a twentieth of --text")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=409_600, help="tokens per run")
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="tokens per optimizer step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--clone-rate", type=float, default=3e-3, help="rate of a clone phase before a dense phase")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="", help="comma-separated learning rates, instead of each method's grid")
    parser.add_argument("--methods", default="", help=f"comma-separated numbers, 0 to {len(METHODS) - 1}; default: all")
    parser.add_argument("--out", type=Path, default=Path("sample-efficiency-out"))
    parser.add_argument("--quick", action="store_true", help="81,920 tokens, one seed, the middle rate of each grid")
    parser.add_argument("--render", action="store_true", help="only write the table and the plot of finished runs")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.seeds, args.out = 81_920, 1, args.out.with_name("sample-efficiency-quick")
        shutil.rmtree(args.out, ignore_errors=True)
    methods = list(METHODS.values())
    chosen = [methods[int(i)] for i in args.methods.split(",")] if args.methods else methods
    args.out.mkdir(parents=True, exist_ok=True)
    data = prepare_data(args)
    if not args.render:
        run_all(chosen, args, data)
    shape = DenseCheckpoint.open(args.teacher).shape
    print(render(args.out, list(METHODS), teacher_loss(args, data),
                 f"teacher {shape.hidden_size} wide ({shape.n_params:,} parameters), student {args.hidden_size} wide "
                 f"({shape.with_hidden_size(args.hidden_size).n_params:,})"))


def run_all(methods: list[Method], args: argparse.Namespace, data: Path) -> None:
    def once(method: Method, rate: float, seed: int) -> None:
        if any((r.method, r.rate, r.seed, r.tokens) == (method.name, rate, seed, args.tokens)
               for r in read_runs(args.out)):
            return
        run = train_once(method, rate, seed, args, data)
        with (args.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(vars(run)) + "\n")
        print(f"{method.name}, rate {rate:g}, seed {seed}: {run.loss:.4f} in {run.seconds:.0f} s", flush=True)

    for method in methods:
        grid = [float(rate) for rate in args.rates.split(",")] if args.rates else method.grid
        for rate in grid[1:2] if args.quick else grid:
            once(method, rate, 0)
    for seed in range(1, args.seeds):
        for method in methods:
            once(method, best_rate(read_runs(args.out), method.name), seed)


if __name__ == "__main__":
    main()
