"""What each axis of a student costs, and what starts in closed form gain over plain ones.

    python benchmarks/axes.py --teacher DIR --text stories.jsonl --text books.txt --held-out other.jsonl --out OUT

Each axis is cut alone, and all together. Three starts of every student: ours refitted after every cut, ours never
refitted, and a plain one (mean pooling of key/value heads, neurons by their mean absolute activation, layers by how
little they change the stream, no refit); for all axes together also the default. All train weights on LM and KL. Four
learning rates are tried with seed 0; the one with the lowest loss on one part of --held-out is used for --seeds runs,
which are evaluated on the other part.

Last, students that are smaller along several axes are trained at once and in steps (hops) with the same number of
tokens. Each step cuts at most a third of the parameters. "Minitron-like" takes these steps with plain starts, and keeps
the strongest channels of the width (arXiv 2408.11796).

Finished runs are stored in OUT/runs.jsonl and not repeated; --render only writes the table. --untrained only prints the
losses of the starts.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sample_efficiency import DEMO, prepare_data

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.recipe import Recipe, load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.student import SIZES
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.hops import train_in_hops
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.stage import load_trained
from lrc_edge.train.loop.trainer import TRAINED_FILE, Trainer, held_out_loss
from lrc_edge.train.start.build import Choices, Start
from lrc_edge.train.start.heads import Merge, head_maps
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.stage import load_start, make_start, save_start
from lrc_edge.train.start.statistics import LayerStatistics, Statistics
from lrc_edge.train.start.width import INITS

RATES = (1e-4, 3e-4, 9e-4, 2.7e-3)


def mean_pooled(found: LayerStatistics, o_QDH: torch.Tensor, n_kept: int) -> list[Merge]:
    """Merge neighbouring groups by their means, as for grouped-query attention (arXiv 2305.13245)."""
    size, eye = found.keys_PGG.shape[1] // n_kept, torch.eye(o_QDH.shape[-1])
    mean, same = (eye / size).expand(size, -1, -1), eye.expand(size, -1, -1)
    return [Merge(tuple(range(i * size, (i + 1) * size)), mean, same, mean, same) for i in range(n_kept)]


def least_influential(model: Layers, found: Statistics, n_kept: int, *_: Any) -> tuple[int, ...]:
    """Leave out the layers whose output is most like their input (ShortGPT, arXiv 2403.03853), never the first."""
    influence = [float(layer.likeness) for layer in found.layers]
    gone = sorted(range(1, len(influence)), key=lambda i: -influence[i])[:len(influence) - n_kept]
    return tuple(i for i in range(len(influence)) if i not in gone)


OURS = Choices()
PLAIN = Choices(layers=least_influential, neurons=lambda found, down_DF: found.neurons_abs_F,
                heads=partial(head_maps, merge=mean_pooled), refits=False)
STARTS = {"refitted": replace(OURS, refits_all=True), "not refitted": replace(OURS, refits=False), "plain": PLAIN,
          "default": OURS}
MINITRON = replace(PLAIN, width=INITS["selection"])
SMALLER = ((3 / 4, 5 / 6, 5 / 6), (5 / 8, 2 / 3, 5 / 6), (1 / 2, 1 / 2, 2 / 3))  # shares of width, layers and neurons


def cuts_of(teacher: ModelShape) -> dict[str, ModelShape]:
    """Return the students, by name. Sizes are multiples that every format can store."""
    def part(size: int, share: float, unit: int = 1) -> int:
        return max(unit, round(size * share / unit) * unit)

    alone = {
        "width": dict(hidden_size=part(teacher.hidden_size, 1 / 2, 32)),
        "layers": dict(num_hidden_layers=part(teacher.num_hidden_layers, 2 / 3)),
        "neurons": dict(intermediate_size=part(teacher.intermediate_size, 1 / 2, 32)),
        "query heads": dict(num_attention_heads=part(teacher.num_attention_heads, 1 / 2)),
        "key/value heads": dict(num_key_value_heads=part(teacher.num_key_value_heads, 1 / 2))}
    together = dict(hidden_size=part(teacher.hidden_size, 3 / 4, 32), intermediate_size=part(
        teacher.intermediate_size, 2 / 3, 32), num_hidden_layers=part(teacher.num_hidden_layers, 5 / 6),
        num_attention_heads=part(teacher.num_attention_heads, 3 / 4, 2),
        num_key_value_heads=part(teacher.num_key_value_heads, 1 / 2))
    return {name: replace(teacher, **sizes) for name, sizes in {**alone, "all": together}.items()}


@dataclass(frozen=True)
class Run:
    cut: str
    start: str  # of STARTS or of ways_to
    rate: float
    seed: int
    judged: str  # `pick` or `eval`
    tokens: int
    n_params: int
    before: float  # held-out loss
    after: float
    seconds: float  # CPU time of start and training

    @property
    def key(self) -> tuple[Any, ...]:
        return self.cut, self.start, self.rate, self.seed, self.judged


def read_runs(out: Path) -> list[Run]:
    file = out / "runs.jsonl"
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def recipe_of(rate: float, seed: int, tokens: int, args: argparse.Namespace) -> Recipe:
    return load_recipe(None, (), train={
        "tokens": tokens, "seq_len": args.seq_len, "batch_tokens": args.batch_tokens, "seed": seed, "dense_alpha": 0.0,
        "dense_learning_rate": rate, "dense_warmup_share": 0.05, "checkpoint_every": 10**9, "eval_every": 10**9,
        "spike_factor": 0.0, "on_bad_batch": "skip", "compile": args.compile})


def start_of(teacher: DenseCheckpoint, shape: ModelShape, choices: Choices, args: argparse.Namespace
             ) -> tuple[Start, float]:
    """Return a student's start and its CPU seconds. It is the same for every learning rate, so it is kept in OUT."""
    name = next(name for name, known in (STARTS | {"minitron": MINITRON}).items() if replace(choices, seed=0) == known)
    sizes = [getattr(shape, size) for size in SIZES]
    folder = args.out / "starts" / "-".join(map(str, [name, choices.seed, *sizes]))
    if not (folder / "seconds").exists():
        folder.mkdir(parents=True, exist_ok=True)
        before = time.process_time()
        train = recipe_of(RATES[0], choices.seed, args.tokens, args).train
        save_start(make_start(Layers.of(teacher, choose_device("auto")), shape, train, args.out / "data", folder,
                              choices=choices), folder)
        (folder / "seconds").write_text(str(time.process_time() - before))
    return load_start(folder), float((folder / "seconds").read_text())


def untrained(args: argparse.Namespace) -> Iterator[str]:
    """Yield a table of the losses of all starts on held-out text."""
    teacher, held_out_BL = DenseCheckpoint.open(args.teacher), np.load(args.out / "data" / "eval.npy")
    loss = held_out_loss(teacher.model(), held_out_BL, torch.float32)
    yield f"Teacher `{teacher.path.name}`: loss {loss:.3f}.\n\n| cut | {' | '.join(STARTS)} |"
    yield "|---|" + "---|" * len(STARTS)
    for cut, shape in cuts_of(teacher.shape).items():
        losses = []
        for start in STARTS if not args.cuts or cut in args.cuts else ():
            clone = start_of(teacher, shape, STARTS[start], args)[0].clone(teacher.model())
            losses.append(f"{held_out_loss(clone.student, held_out_BL, torch.float32):.3f}")
        if losses:
            yield f"| {cut} | {' | '.join(losses)} |"


def train_once(cut: str, shape: ModelShape, start: str, rate: float, seed: int, judged: str, args: argparse.Namespace
               ) -> Run:
    teacher, device = DenseCheckpoint.open(args.teacher), choose_device("auto")
    dtype, rows = choose_precision("auto", device), PackedRows(args.out / "data", args.seq_len)
    settings = recipe_of(rate, seed, args.tokens, args).train
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        begun, seconds = start_of(teacher, shape, replace(STARTS[start], seed=seed), args)
        before = time.process_time()
        clone = begun.clone(teacher.model(dtype).to(device), dtype)
        trainer = Trainer(clone, settings, Schedule.of(settings, shape, 0), rows,
                          np.load(args.out / "data" / f"{judged}.npy"), Path(folder),
                          lambda row: losses.append(row["held_out_loss"]) if "held_out_loss" in row else None)
        trainer.run()
        seconds += time.process_time() - before
    return Run(cut, start, rate, seed, judged, args.tokens, shape.n_params, losses[0], losses[-1], round(seconds, 1))


def between(teacher: ModelShape, shares: tuple[float, float, float], way: float) -> ModelShape:
    """Return a shape on the way (0 to 1) from the teacher to these shares of its width, layers and neurons."""
    width, layers, neurons = (1 - (1 - share) * way for share in shares)
    return replace(teacher, hidden_size=round(teacher.hidden_size * width / 32) * 32,
                   num_hidden_layers=max(1, round(teacher.num_hidden_layers * layers)),
                   intermediate_size=round(teacher.intermediate_size * neurons / 32) * 32)


def ways_to(teacher: ModelShape, shares: tuple[float, float, float]) -> dict[str, tuple[list[ModelShape], Choices]]:
    """Return the shapes on each way to a student, and how their starts choose."""
    last = between(teacher, shares, 1)
    n_steps = math.ceil(math.log(teacher.n_params / last.n_params) / math.log(1.5))
    steps = [between(teacher, shares, (step + 1) / n_steps) for step in range(n_steps)]
    return {"at once": ([last], OURS), "in steps": (steps, OURS), "Minitron-like, in steps": (steps, MINITRON)}


def train_in_steps(cut: str, start: str, shapes: list[ModelShape], choices: Choices, rate: float, seed: int,
                   judged: str, args: argparse.Namespace) -> Run:
    """Train through these shapes, or, if there is only one, at once."""
    teacher = DenseCheckpoint.open(args.teacher)
    tokens = args.long_tokens if judged == "eval" else args.tokens
    recipe, choices = recipe_of(rate, seed, tokens, args), replace(choices, seed=seed)
    held_out_BL = np.load(args.out / "data" / f"{judged}.npy")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun, seconds = start_of(teacher, shapes[0], choices, args)
        save_start(begun, folder)
        before = time.process_time()
        train_in_hops(teacher, recipe, shapes, folder, args.out / "data", folder / "train", lambda row: None, choices)
        seconds += time.process_time() - before
        losses = [held_out_loss(clone.student, held_out_BL, torch.float32) for clone in (
            begun.clone(teacher.model()), load_trained(teacher, folder / "train" / TRAINED_FILE))]
    return Run(cut, start, rate, seed, judged, tokens, shapes[-1].n_params, *losses, round(seconds, 1))


def run_all(args: argparse.Namespace) -> None:
    shape = DenseCheckpoint.open(args.teacher).shape
    jobs: list[tuple[str, str, Callable[[float, int, str], Run]]] = [
        (cut, start, partial(train_once, cut, student, start, args=args))
        for cut, student in cuts_of(shape).items() for start in STARTS if start != "default" or cut == "all"]
    for shares in SMALLER:
        for start, (way, choices) in ways_to(shape, shares).items():
            cut = f"{shape.n_params / way[-1].n_params:.1f} x fewer parameters"
            jobs.append((cut, start, partial(train_in_steps, cut, start, way, choices, args=args)))
    known = list(dict.fromkeys(cut for cut, _, _ in jobs))
    if unknown := set(args.cuts) - set(known):
        raise SystemExit(f"--cuts: {', '.join(unknown)}; known: {', '.join(known)}")
    for cut, start, run in (job for job in jobs if not args.cuts or job[0] in args.cuts):
        def once(rate: float, seed: int, judged: str, cut: str = cut, start: str = start,
                 run: Callable[[float, int, str], Run] = run) -> None:
            if any(found.key == (cut, start, rate, seed, judged) for found in read_runs(args.out)):
                return
            found = run(rate, seed, judged)
            with (args.out / "runs.jsonl").open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")
            print(f"{cut}, {start}, rate {rate:g}, seed {seed}: {found.before:.4f} -> {found.after:.4f} ({judged}) in "
                  f"{found.seconds:.0f} CPU s", flush=True)

        for rate in RATES:
            once(rate, 0, "pick")
        for seed in range(args.seeds):
            once(best_rate(read_runs(args.out), cut, start), seed, "eval")


def best_rate(runs: list[Run], cut: str, start: str) -> float:
    tried = [run for run in runs if (run.cut, run.start, run.judged) == (cut, start, "pick")]
    return min(tried, key=lambda run: run.after).rate


def table(runs: list[Run], teacher: DenseCheckpoint, teacher_loss: float) -> str:
    rows = [f"Teacher `{teacher.path.name}`: {teacher.shape.n_params:,} parameters, loss {teacher_loss:.3f}.", "",
            "| cut | start | parameters | rate | before training* | after | spread | tokens | CPU s |",
            "|---|---|---|---|---|---|---|---|---|"]
    finals = [run for run in runs if run.judged == "eval"]
    for cut, start in dict.fromkeys((run.cut, run.start) for run in finals):
        mine = [run for run in finals if (run.cut, run.start) == (cut, start)]
        edge = {RATES[0]: " (lowest)", RATES[-1]: " (highest)"}.get(mine[0].rate, "")
        after = [run.after for run in mine]
        rows.append(f"| {cut} | {start} | {mine[0].n_params:,} | {mine[0].rate:g}{edge} | "
                    f"{statistics.fmean(run.before for run in mine):.3f} | {statistics.fmean(after):.3f} | "
                    f"± {(max(after) - min(after)) / 2:.3f} ({len(mine)} seeds) | {mine[0].tokens:,} | "
                    f"{statistics.fmean(run.seconds for run in mine):.0f} |")
    return "\n".join([*rows, "", "\\* In steps: the first student's."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=DEMO / "storyteller", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, action="append", help="training text, in equal shares; repeatable")
    parser.add_argument("--held-out", type=Path, action="append",
                        help="evaluation text, in equal shares; repeatable; default: a fifth of --text")
    parser.add_argument("--data-tokens", type=int, default=2_500_000, help="training tokens to prepare")
    parser.add_argument("--tokens", type=int, default=102_400, help="tokens of a run of one axis")
    parser.add_argument("--long-tokens", type=int, default=204_800, help="tokens of a judged run at once or in steps")
    parser.add_argument("--batch-tokens", type=int, default=1_024, help="tokens per optimizer step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cuts", type=lambda text: text.split(","), default=[], help="comma-separated; default: all")
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--out", type=Path, default=Path("axes-out"))
    parser.add_argument("--untrained", action="store_true", help="only print the losses of the starts")
    parser.add_argument("--render", action="store_true", help="only write the table of finished runs")
    args = parser.parse_args()
    args.text, args.held_out = args.text or [DEMO / "stories.jsonl"], args.held_out or []
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_data(args)
    if args.untrained:
        for line in untrained(args):
            print(line, flush=True)
        return
    if not args.render:
        run_all(args)
    teacher = DenseCheckpoint.open(args.teacher)
    loss = held_out_loss(teacher.model(), np.load(args.out / "data" / "eval.npy"), torch.float32)
    text = table(read_runs(args.out), teacher, loss)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
