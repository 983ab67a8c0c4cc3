"""Sample efficiency of ways to train a student: same teacher, text, order, student shape and steps.

    python benchmarks/sample_efficiency.py --quick                     # about 15 minutes on 2 cores
    python benchmarks/sample_efficiency.py --text stories.jsonl --text books.txt --held-out other.jsonl --out OUT

Every method uses lrc_edge's own trainer. Six settings are tried for each method, with --tune-tokens and seed 0: six
learning rates, or with a clone loss four rates, and then two other weights (alpha) of that loss at the best rate. The
setting with the lowest loss on one part of --held-out (default: a fifth of the documents of --text) is used for the
final runs, which are evaluated on the other part. Finished runs are stored in OUT/runs.jsonl and not repeated, so a
killed benchmark resumes, and several processes may share OUT with different --methods. --long runs the best methods
once more with ten times the tokens. --render only writes the tables and, if matplotlib is installed, the plot.
"""
from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficiency_table import Pair, Run, Teacher, best_pair, leaders, read_runs, render
from torch import nn

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.lineage import Holds, Lineage
from lrc_edge.recipe import load_recipe
from lrc_edge.train import losses
from lrc_edge.train.clone import Clone
from lrc_edge.train.data.tokenize import PackedRows, prepare
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import Trainer, held_out_loss
from lrc_edge.train.masks import positions_of
from lrc_edge.train.start.build import Choices, build_start, first_phase
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.width import INITS

DEMO = Path(__file__).parent.parent / "examples" / "demo"
PICK_TOKENS, EVAL_TOKENS, CALIBRATION_ROWS, POINTS = 16_384, 65_536, 16, 4
PUBLISHED_LENGTH = 2048  # the weight 1.28 of the published KL holds at this sequence length, and falls with it


@dataclass(frozen=True)
class Method:
    """`start`: how the student starts, None for random weights. `settings` override the recipe's [train]."""

    name: str
    start: Choices | None
    settings: dict[str, Any]
    rates: tuple[float, ...]
    alphas: tuple[float, ...] = (0.0,)  # the rates are tried with the first, the others at the best rate
    kind: type[Clone] = Clone


from_random = None
gaussian, selection, pca = (Choices(width=INITS[init], refits=False) for init in ("gaussian", "selection", "pca"))
refitted = Choices(refits_all=True)


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
                above, below, _ = pair(above, below, losses.Objective(clone=0.0), [None], rope)
                features = features + losses.clone_term(below @ self.align[str(i)], above, "relative")
            total, terms = losses.head_losses(
                student.norm(below).flatten(0, 1), student.head.weight, teacher.norm(above).flatten(0, 1),
                teacher.head.weight, labels.flatten(), objective, n_labels)
        return losses.Losses.of(total, terms, features * share, objective)


PROJECTIONS, WEIGHTS = {"dense_share": 0.0}, {"dense_share": 1.0}
THEN_WEIGHTS = {"dense_share": 0.75}
ABSOLUTE, PER_TOKEN = {"clone_terms": "absolute"}, {"clone_terms": "per_token"}
PUBLISHED_KL = {"kl_temperature": 40.0}


def rates(lowest: float, n: int) -> tuple[float, ...]:
    return tuple(lowest * 2**i for i in range(n))


RELATIVE, OF_SQUARES = (0.05, 0.2, 0.0125), (0.02, 0.2, 0.002)  # alphas of relative and of absolute terms
METHODS = {method.name: method for method in (
    Method("from scratch", from_random, WEIGHTS | {"kl_weight": 0.0}, rates(4e-4, 6)),
    Method("KD from scratch", from_random, WEIGHTS, rates(4e-4, 6)),
    Method("TinyBERT-like", from_random, WEIGHTS, rates(8e-4, 4), RELATIVE, Aligned),
    Method("hard pruning + KD", selection, WEIGHTS, rates(2e-4, 6)),
    Method("SliceGPT start + KD", pca, WEIGHTS, rates(1e-4, 6)),
    Method("LRC as published", gaussian, PROJECTIONS | ABSOLUTE | PUBLISHED_KL, rates(1.6e-3, 4), OF_SQUARES),
    Method("RED", selection, PROJECTIONS | ABSOLUTE, rates(8e-4, 4), OF_SQUARES),
    Method("RED, then dense", selection, THEN_WEIGHTS | ABSOLUTE, rates(8e-4, 4), OF_SQUARES),
    Method("components, clone, then dense", pca, THEN_WEIGHTS, rates(2e-4, 4), RELATIVE),
    Method("components, dense, terms", pca, WEIGHTS, rates(2e-4, 4), RELATIVE),
    Method("components, dense, terms per token", pca, WEIGHTS | PER_TOKEN, rates(2e-4, 4), RELATIVE),
    # Only for the table of attribution, whose other cells are methods above.
    Method("components, clone, terms", pca, PROJECTIONS, rates(4e-4, 4), RELATIVE),
    Method("components, clone", pca, PROJECTIONS, rates(2e-4, 6)),
    Method("selection, dense, terms", selection, WEIGHTS, rates(4e-4, 4), RELATIVE),
    Method("selection, clone, terms", selection, PROJECTIONS, rates(8e-4, 4), RELATIVE),
    Method("selection, clone", selection, PROJECTIONS, rates(4e-4, 6)),
    Method("gaussian, dense, terms", gaussian, WEIGHTS, rates(8e-4, 4), RELATIVE),
    Method("gaussian, dense", gaussian, WEIGHTS, rates(4e-4, 6)),
    Method("gaussian, clone, terms", gaussian, PROJECTIONS, rates(1.6e-3, 4), RELATIVE),
    Method("gaussian, clone", gaussian, PROJECTIONS, rates(8e-4, 6)),
    Method("components, refitted, dense", refitted, WEIGHTS, rates(1e-4, 6)),
    Method("components, refitted, dense, terms", refitted, WEIGHTS, rates(2e-4, 4), RELATIVE),
)}


class TimedTrainer(Trainer):
    """Counts the CPU seconds of evaluations, which are not the method's."""

    evaluating = 0.0

    def evaluate(self, step: int) -> float:
        before = time.process_time()
        loss = super().evaluate(step)
        self.evaluating += time.process_time() - before
        return loss


def train_once(method: Method, pair: Pair, seed: int, tokens: int, judged: str, args: argparse.Namespace) -> Run:
    """`judged`: the name of the file of held-out rows."""
    teacher, (rate, alpha) = DenseCheckpoint.open(args.teacher), pair
    steps = tokens // args.batch_tokens
    settings = load_recipe(None, (), train={
        "tokens": tokens, "seq_len": args.seq_len, "batch_tokens": args.batch_tokens, "seed": seed,
        "dense_learning_rate": rate, "learning_rate": rate, "alpha": alpha, "dense_alpha": alpha,
        "warmup_share": 0.05, "dense_warmup_share": 0.05, "log_every": 10, "checkpoint_every": 10**9,
        "eval_every": max(1, steps // POINTS) if judged == "eval" else 10**9,
        "spike_factor": 0.0, "on_bad_batch": "skip", "compile": args.compile,
        **({"kl_weight": 1.28 * args.seq_len / PUBLISHED_LENGTH} if "kl_temperature" in method.settings else {}),
        **method.settings}).train
    rows = PackedRows(args.out / "data", args.seq_len)
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]
    sample = torch.stack([rows[int(i)]["input_ids"] for i in picked])
    held_out_BL = np.load(args.out / "data" / f"{judged}.npy")
    with tempfile.TemporaryDirectory() as folder:
        metrics: list[dict[str, Any]] = []
        before = time.process_time()
        clone = new_clone(method, teacher, args.hidden_size, sample, seed, Path(folder))
        trainer = TimedTrainer(clone, settings, Schedule.of(settings, clone.lineage.student, 0), rows, held_out_BL,
                               Path(folder), metrics.append)
        trainer.run()
        seconds = time.process_time() - before - trainer.evaluating
    return Run(args.hidden_size, method.name, rate, alpha, seed, tokens, judged, round(seconds, 1),
               [(row["tokens"], round(row["held_out_loss"], 5)) for row in metrics if "held_out_loss" in row],
               sum("skipped" in row for row in metrics))


def new_clone(method: Method, teacher: DenseCheckpoint, width: int, sample: torch.Tensor, seed: int, folder: Path
              ) -> Clone:
    device = choose_device("auto")
    dtype, student = choose_precision("auto", device), teacher.shape.with_hidden_size(width)
    holds: Holds = "weights" if method.settings["dense_share"] == 1 else "projections"
    model = teacher.model(dtype).to(device)
    clone = method.kind(model, Lineage.of(teacher.shape, student), dtype, phase=first_phase(holds)).to(device)
    if method.start is None:  # as transformers initializes a model, without weights of the teacher
        torch.manual_seed(seed)
        clone.student.apply(clone.student._init_weights)
    else:
        choices = replace(method.start, seed=seed)
        build_start(Layers.of(teacher, device), student, sample, folder, holds, choices).load_into(clone)
    return clone


def prepare_data(args: argparse.Namespace) -> None:
    """Pack the training text, and write rows of other text: some to pick settings on, some to judge on."""
    data: Path = args.out / "data"
    if (data / "eval.npy").exists():
        return
    partial_folder = args.out / ".data"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    teacher = DenseCheckpoint.open(args.teacher)
    tokenizer = teacher.tokenizer()
    sources = [(str(text), documents([str(text)], Fields())) for text in args.text]
    prepare(sources, tokenizer, partial_folder, weights=[1.0] * len(sources),
            held_out_share=0.03 if args.held_out else 0.2, max_tokens=args.data_tokens, seq_len=args.seq_len,
            progress=lambda n: None)
    texts = [HeldOut.from_texts(documents([str(text)], Fields()), tokenizer) for text in args.held_out] \
        or [HeldOut.load(partial_folder / "held_out.npz")]
    rows: dict[str, list[np.ndarray]] = {"eval": [], "pick": []}
    for text in texts:
        judged, found = (text.rows(args.seq_len, tokens // len(texts), teacher.bos())
                         for tokens in (EVAL_TOKENS, EVAL_TOKENS + PICK_TOKENS))
        rows["eval"].append(judged)
        rows["pick"].append(found[len(judged):])
    for name, parts in rows.items():
        np.save(partial_folder / f"{name}.npy", np.concatenate(parts))
    shutil.rmtree(data, ignore_errors=True)
    partial_folder.rename(data)


def run_all(methods: list[Method], args: argparse.Namespace) -> None:
    def once(method: Method, pair: Pair, seed: int, tokens: int, judged: str) -> None:
        key = (args.hidden_size, method.name, *pair, seed, tokens, judged)
        if any(run.key == key for run in read_runs(args.out)):
            return
        run = train_once(method, pair, seed, tokens, judged, args)
        with (args.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        print(f"{args.hidden_size} wide, {method.name}, rate {pair[0]:g}, alpha {pair[1]:g}, seed {seed}, "
              f"{tokens:,} tokens: {run.loss:.4f} ({judged}) in {run.seconds:.0f} CPU s", flush=True)

    for method in methods:
        for rate in method.rates[1:2] if args.quick else method.rates:
            once(method, (rate, method.alphas[0]), 0, args.tune_tokens, "pick")
        best = best_pair(read_runs(args.out), args.hidden_size, method.name)
        for alpha in () if args.quick else method.alphas[1:]:
            once(method, (best[0], alpha), 0, args.tune_tokens, "pick")
        best = best_pair(read_runs(args.out), args.hidden_size, method.name)
        for seed in range(args.seeds):
            once(method, best, seed, args.tokens, "eval")
    for name in leaders(read_runs(args.out), args.hidden_size)[:args.long]:
        best = best_pair(read_runs(args.out), args.hidden_size, name)
        once(METHODS[name], best, 0, 10 * args.tokens, "eval")


def describe(args: argparse.Namespace) -> Teacher:
    teacher = DenseCheckpoint.open(args.teacher)
    loss = held_out_loss(teacher.model(), np.load(args.out / "data" / "eval.npy"), torch.float32)
    return Teacher(args.teacher.name, loss, teacher.shape.n_params,
                   lambda width: teacher.shape.with_hidden_size(width).n_params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=DEMO / "storyteller", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, action="append", help="training text, in equal shares; repeatable")
    parser.add_argument("--held-out", type=Path, action="append",
                        help="evaluation text, in equal shares; repeatable; default: a fifth of --text")
    parser.add_argument("--data-tokens", type=int, default=2_500_000, help="training tokens to prepare")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=204_800, help="tokens of a final run")
    parser.add_argument("--tune-tokens", type=int, default=102_400, help="tokens of a run that tries a pair")
    parser.add_argument("--batch-tokens", type=int, default=1_024, help="tokens per optimizer step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--long", type=int, default=0, help="run this many of the best methods with 10 x the tokens")
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--methods", default="", help="comma-separated numbers; default: all. "
                        + "; ".join(f"{i} {name}" for i, name in enumerate(METHODS)))
    parser.add_argument("--out", type=Path, default=Path("sample-efficiency-out"))
    parser.add_argument("--quick", action="store_true", help="few tokens, one seed, one pair for each method")
    parser.add_argument("--render", action="store_true", help="only write the tables and the plot of finished runs")
    args = parser.parse_args()
    args.text, args.held_out = args.text or [DEMO / "stories.jsonl"], args.held_out or []
    if args.quick:
        args.tokens = args.tune_tokens = 20_480
        args.seeds, args.out = 1, args.out.with_name("sample-efficiency-quick")
        shutil.rmtree(args.out, ignore_errors=True)
    torch._dynamo.config.recompile_limit = 256  # one for each objective
    methods = list(METHODS.values())
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_data(args)
    if not args.render:
        run_all([methods[int(i)] for i in args.methods.split(",")] if args.methods else methods, args)
    print(render(args.out, {method.name: (method.rates, method.alphas) for method in methods}, describe(args)))


if __name__ == "__main__":
    main()
