"""Is a planned student better than a narrower or a shallower one of the same measured speed?

    python benchmarks/planner.py --teacher DIR --text stories.jsonl --text books.txt --held-out other.jsonl --out OUT

For each bin, a share of the teacher's time per token, the ways to a shape are: width only, depth only, Minitron-like
(width and neurons by the same share, plain starts, at most a third of the parameters at a time; arXiv 2408.11796), the
planner (short search), and the best of as many random shapes in as many trials as the planner made. Tiny models time
only overhead, so speeds are those of their twins: random weights, four times the width, neurons, heads and vocabulary.
All students are trained with the default settings and the same number of tokens; as trials cost tokens, "width only,
longer" also has those of the planner's trials.

Each student's Q4_0 file is judged in llama.cpp on three quarters of --held-out that picked nothing; the other quarter
judges the trials. Differences from "width only" have 95 % intervals over all seeds, bootstrapped by document (by
passage of a longer text). For the rank correlation of a trial with the final loss, all of the planner's shapes of the
first bin and seed are trained. Finished runs are stored in OUT/runs.jsonl and not repeated; --render only writes the
table.
"""
from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axes import MINITRON
from sample_efficiency import DEMO, prepare_data
from torch.nn import functional as F

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.export.fold import fold
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.machine import threads_for
from lrc_edge.recipe import load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.shape_search import Search, search
from lrc_edge.targets.profile import load_profile
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
from lrc_edge.targets.runtimes.table import native_start
from lrc_edge.targets.timing.anchors import anchors_of, time_shapes
from lrc_edge.targets.timing.measured import measured_here, runtime_here
from lrc_edge.targets.timing.price import Device, Limits, Price, offers
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.hops import train_in_hops
from lrc_edge.train.loop.trainer import TRAINED_FILE
from lrc_edge.train.start.build import Choices
from lrc_edge.train.start.depth import SharedGreedy
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.stage import make_start, save_start
from lrc_edge.train.trials import run_trials

BINS = (0.7, 0.5)  # shares of the teacher's time per token
TWIN = 4
FORMAT, CONTEXT = "gguf:q4_0", 1024
PASSAGE = 1200  # characters of one unit of the bootstrap, about a story
UNITS = 450  # a quarter of them judge the trials, the others the students: more than 65,536 tokens
ALL_TRIALS = "each of the planner's trials"  # for the rank correlation
WAYS = ("width only", "depth only", "Minitron-like", "planner", "best of random", "width only, longer")


def twin(shape: ModelShape) -> ModelShape:
    return shape.resized({size: TWIN * getattr(shape, size) for size in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")} | {
            "max_position_embeddings": 2 * CONTEXT})


class Twins(Device):
    """The device, for which a shape costs what its twin does."""

    def price(self, shape: ModelShape) -> Price:
        return super().price(twin(shape))


@dataclass(frozen=True)
class Run:
    """kind: `trial` (one loss, in 4 bits) or `final` (the loss and tokens of each unit of text, of the Q4_0 file)."""

    kind: str
    bin: float
    way: str
    seed: int
    shape: dict[str, Any]
    tokens: int
    losses: list[float]
    counts: list[int]

    @property
    def size(self) -> ModelShape:
        return ModelShape.from_dict(self.shape)

    @property
    def loss(self) -> float:
        return float(np.dot(self.losses, self.counts) / np.sum(self.counts))


class Benchmark:
    def __init__(self, args: argparse.Namespace):
        self.args, self.file = args, args.out / "runs.jsonl"
        self.teacher = DenseCheckpoint.open(args.teacher)
        self.data, self.greedy = args.out / "data", SharedGreedy(0)

    @cached_property
    def device(self) -> Twins:
        shape, profile = twin(self.teacher.shape), load_profile(self.args.target)
        runtime = runtime_here(profile, FORMAT)
        if runtime is None:
            raise SystemExit(f"--target {profile.name}: not this machine")
        found = measured_here(runtime, anchors_of(shape), FORMAT, CONTEXT, threads_for(shape), print)
        return Twins(profile, FORMAT, CONTEXT, found.model())

    @cached_property
    def units(self) -> dict[str, list[list[int]]]:
        """The ids of passages of --held-out, from all of its files alike: those that judge and those of the trials."""
        tokenizer, bos = self.teacher.tokenizer(), self.teacher.bos()
        found: dict[str, list[list[int]]] = {"eval": [], "pick": []}
        for text in self.args.held_out:
            parts = (document[i:i + PASSAGE] for document in documents([str(text)], Fields())
                     for i in range(0, len(document), PASSAGE))
            for i, part in zip(range(UNITS // len(self.args.held_out)), parts, strict=False):
                ids = tokenizer.encode(part, add_special_tokens=False)[:self.args.seq_len - 1]
                found["eval" if i % 4 else "pick"].append([*([bos] if bos is not None else []), *ids])
        return found

    def runs(self) -> list[Run]:
        return [Run(**json.loads(line)) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def known(self, kind: str, bin_: float, way: str, seed: int, shape: ModelShape) -> Run | None:
        return next((run for run in self.runs() if (run.kind, run.bin, run.way, run.seed, run.size) == (
            kind, bin_, way, seed, shape)), None)

    def keep(self, run: Run) -> Run:
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        print(f"{run.kind} {run.bin:g} {run.way}, seed {run.seed}: {run.loss:.4f}  {sizes(run.size)}", flush=True)
        return run

    # -- ways to a shape --

    def limits(self, bin_: float) -> Limits:
        return Limits(token_ms=bin_ * self.device.price(self.teacher.shape).token_ms)

    def largest(self, bin_: float, shapes: Iterator[ModelShape]) -> ModelShape:
        """Return the first shape within the bin."""
        return next(shape for shape in shapes if not self.limits(bin_).excess(self.device.price(shape)))

    def narrower(self) -> Iterator[ModelShape]:
        for width in range(self.teacher.shape.hidden_size - 32, 0, -32):
            yield self.teacher.shape.resized({"hidden_size": width})

    def shallower(self) -> Iterator[ModelShape]:
        for n in range(self.teacher.shape.num_hidden_layers - 1, 0, -1):
            yield self.teacher.shape.resized({"num_hidden_layers": n})

    def smaller(self) -> Iterator[ModelShape]:
        for share in np.arange(0.99, 0.1, -0.01):
            yield self.shared(share)

    def shared(self, share: float) -> ModelShape:
        return self.teacher.shape.resized({size: max(1, round(share * getattr(self.teacher.shape, size) / 32)) * 32
                                           for size in ("hidden_size", "intermediate_size")})

    # -- trials and training --

    def trial(self, bin_: float, way: str, seed: int, shapes: list[ModelShape]) -> dict[ModelShape, float]:
        found = {shape: self.known("trial", bin_, way, seed, shape) for shape in shapes}
        new = [shape for shape, run in found.items() if run is None]
        train = load_recipe(None, (), train=self.settings(self.args.trial_tokens, seed)).train
        device = choose_device("auto")
        layers = Layers.of(self.teacher, device)
        starts = [make_start(layers, shape, train, self.data, self.args.out,
                             choices=Choices(layers=self.greedy, seed=seed)) for shape in new]
        held_out_BL = np.array([unit[:128] for unit in self.units["pick"] if len(unit) >= 128])
        trials = run_trials(self.teacher, starts, PackedRows(self.data, self.args.seq_len), held_out_BL,
                            self.args.trial_tokens, choose_precision("auto", device), device, lambda *_: None, seed) \
            if new else []
        for shape, trial in zip(new, trials, strict=True):
            found[shape] = self.keep(Run("trial", bin_, way, seed, shape.as_dict(), self.args.trial_tokens,
                                         [trial.loss_in_4_bits], [1]))
        return {shape: run.loss for shape, run in found.items() if run}

    def settings(self, tokens: int, seed: int) -> dict[str, Any]:
        return {"tokens": tokens, "seq_len": self.args.seq_len, "batch_tokens": 1024, "seed": seed,
                "checkpoint_every": 10**9, "eval_every": 10**9, "compile": "on", "on_bad_batch": "skip"}

    def final(self, bin_: float, way: str, seed: int, shapes: list[ModelShape], tokens: int,
              choices: Choices | None = None) -> None:
        """Train through these shapes, mostly one, and judge the last one's Q4_0 file."""
        if self.known("final", bin_, way, seed, shapes[-1]):
            return
        recipe = load_recipe(None, (), train=self.settings(tokens, seed))
        choices = replace(choices or Choices(layers=self.greedy), seed=seed)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            layers = Layers.of(self.teacher, choose_device("auto"))
            (folder / "start").mkdir()
            save_start(make_start(layers, shapes[0], recipe.train, self.data, folder, choices=choices),
                       folder / "start")
            train_in_hops(self.teacher, recipe, shapes, folder / "start", self.data, folder / "train",
                          lambda row: None, choices)
            student = fold(self.teacher, folder / "train" / TRAINED_FILE, folder / "student", {})
            [artifact] = export_gguf(student, folder / "gguf", ["q4_0"])
            losses, counts = judge(folder / artifact.path, self.units["eval"], self.args.seq_len)
        self.keep(Run("final", bin_, way, seed, shapes[-1].as_dict(), tokens, losses, counts))

    def run(self) -> None:
        self.greedy.most = self.teacher.shape.num_hidden_layers * 3 // 4
        for bin_ in BINS:
            found = [offer.shape for offer in offers(self.teacher.shape, self.device, self.limits(bin_))]
            alone = {"width only": self.largest(bin_, self.narrower()), "depth only": self.largest(
                bin_, self.shallower())}
            for seed in range(self.args.seeds):
                for way, shape in alone.items():
                    self.final(bin_, way, seed, [shape], self.args.tokens)
                self.final(bin_, "Minitron-like", seed, self.minitron(bin_), self.args.tokens, MINITRON)
                job = Search(self.teacher.shape, [found], seed)
                search(job, lambda shapes, at=(bin_, "planner", seed): self.trial(*at, shapes), 1, 4)
                self.final(bin_, "planner", seed, [job.best(found)[0]], self.args.tokens)
                chosen = random.Random(seed).sample(found, len(job.trials))
                losses = self.trial(bin_, "best of random", seed, chosen)
                self.final(bin_, "best of random", seed, [min(losses, key=losses.__getitem__)], self.args.tokens)
                self.final(bin_, "width only, longer", seed, [alone["width only"]],
                           self.args.tokens + len(job.trials) * self.args.trial_tokens)
        for run in [run for run in self.runs() if (run.kind, run.bin, run.way, run.seed) == (
                "trial", BINS[0], "planner", 0)]:
            self.final(BINS[0], ALL_TRIALS, 0, [run.size], self.args.tokens)

    def minitron(self, bin_: float) -> list[ModelShape]:
        """Return the shapes on the way, each with at most a third fewer parameters than the one before."""
        last, way = self.largest(bin_, self.smaller()), [self.teacher.shape]
        while way[-1].n_params * 2 / 3 > last.n_params:
            way.append(next(shape for shape in map(self.shared, np.arange(0.1, 1, 0.01))
                            if shape.n_params >= way[-1].n_params * 2 / 3))
        return [*way[1:], last]

    def timed(self) -> dict[ModelShape, float]:
        """Return the measured milliseconds per token of the twins of all shapes that were trained, in one run."""
        file = self.args.out / "timed.json"
        shapes = list(dict.fromkeys(run.size for run in self.runs() if run.kind == "final"))
        if not file.exists() or len(json.loads(file.read_text())) < len(shapes) + 1:
            shapes.append(self.teacher.shape)
            timings = time_shapes([twin(shape) for shape in shapes], FORMAT, native_start("llama.cpp"), CONTEXT,
                                  threads_for(twin(self.teacher.shape)), print)
            deep = [timing for timing in timings if timing.n_prompt == max(t.n_prompt for t in timings)]
            file.write_text(json.dumps([[shape.as_dict(), 1000 / (timing.decode or 0)]
                                        for shape, timing in zip(shapes, deep, strict=True)]))
        return {ModelShape.from_dict(shape): ms for shape, ms in json.loads(file.read_text())}


def judge(path: Path, units: list[list[int]], n_ctx: int) -> tuple[list[float], list[int]]:
    """Return the mean loss of each unit in llama.cpp, and the number of tokens that it is the mean of."""
    runtime = LlamaCpp(path, n_ctx=n_ctx, threads=1)
    losses = []
    for ids in units:
        logits = torch.from_numpy(runtime.prefill(np.array(ids)))[:-1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(ids[1:]))))
    runtime.close()
    return losses, [len(ids) - 1 for ids in units]


def sizes(shape: ModelShape) -> str:
    return (f"{shape.hidden_size} wide, {shape.num_hidden_layers} layers, {shape.intermediate_size} neurons, "
            f"{shape.num_attention_heads}/{shape.num_key_value_heads} heads")


def difference(mine: list[Run], other: list[Run]) -> tuple[float, float, float]:
    """Return the mean difference in loss from the other way, and its 95 % interval: documents are drawn anew."""
    n = len(mine[0].counts)
    of_units = np.array([np.mean([run.losses for run in runs], 0) for runs in (mine, other)])
    counts, rng = np.array(mine[0].counts), np.random.default_rng(0)
    picks = rng.integers(0, n, (10_000, n))
    drawn = ((of_units[0] - of_units[1]) * counts)[picks].sum(1) / counts[picks].sum(1)
    return float(np.dot(of_units[0] - of_units[1], counts) / counts.sum()), *np.quantile(drawn, (0.025, 0.975))


def table(job: Benchmark) -> str:
    finals, ms = [run for run in job.runs() if run.kind == "final"], job.timed()
    n_tokens = sum(finals[0].counts)
    rows = [f"Teacher `{job.teacher.path.name}`: {job.teacher.shape.n_params:,} parameters, its twin "
            f"{ms[job.teacher.shape]:.1f} ms per token. Judged on {n_tokens:,} tokens, {len(finals[0].counts)} "
            "documents or passages.", "",
            "| bin | way | shapes, by seed | ms of the twin | tokens, with trials | loss of Q4_0, by seed | from width "
            "only |", "|---|---|---|---|---|---|---|"]
    by_way = {(run.bin, run.way, run.seed): run for run in finals}
    for bin_ in BINS:
        base = [run for seed in range(job.args.seeds) if (run := by_way.get((bin_, "width only", seed)))]
        for way in WAYS:
            mine = [run for seed in range(job.args.seeds) if (run := by_way.get((bin_, way, seed)))]
            if not mine:
                continue
            trials = sum((run.kind, run.bin, run.way, run.seed) == ("trial", bin_, way, 0) for run in job.runs())
            middle, low, high = difference(mine, base) if len(mine) == len(base) else (float("nan"),) * 3
            rows.append(f"| {bin_:.0%} | {way} | {'; '.join(dict.fromkeys(sizes(run.size) for run in mine))} | "
                        f"{', '.join(dict.fromkeys(f'{ms[run.size]:.1f}' for run in mine))} | "
                        f"{mine[0].tokens + trials * job.args.trial_tokens:,} | "
                        f"{', '.join(f'{run.loss:.3f}' for run in mine)} | "
                        + ("" if way == "width only" else f"{middle:+.3f} ({low:+.3f} to {high:+.3f})") + " |")
    return "\n".join([*rows, "", correlation(job)]) + "\n"


def correlation(job: Benchmark) -> str:
    """Return Spearman's rank correlation between trials and final losses, where all were trained."""
    found = {(run.kind, run.way, run.size): run for run in job.runs() if (run.bin, run.seed) == (BINS[0], 0)}
    pairs = [(run.loss, found["final", ALL_TRIALS, shape].loss) for (kind, way, shape), run in found.items()
             if (kind, way) == ("trial", "planner") and ("final", ALL_TRIALS, shape) in found]
    if len(pairs) < 3:
        return ""
    ranks = [list(np.argsort(np.argsort(column))) for column in zip(*pairs, strict=True)]
    return (f"Rank correlation of a trial of {job.args.trial_tokens:,} tokens with the final loss, {len(pairs)} shapes "
            f"of the first bin: {statistics.correlation(*ranks):.2f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=DEMO / "storyteller", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, action="append", help="training text, in equal shares; repeatable")
    parser.add_argument("--held-out", type=Path, action="append", required=True,
                        help="evaluation text, in equal shares; repeatable")
    parser.add_argument("--target", default="laptop-x86", help="this machine")
    parser.add_argument("--data-tokens", type=int, default=2_500_000, help="training tokens to prepare")
    parser.add_argument("--tokens", type=int, default=102_400, help="tokens of a final run")
    parser.add_argument("--trial-tokens", type=int, default=20_480)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("planner-out"))
    parser.add_argument("--render", action="store_true", help="only write the table of finished runs")
    args = parser.parse_args()
    args.text = args.text or [DEMO / "stories.jsonl"]
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_data(args)
    job = Benchmark(args)
    if not args.render:
        job.run()
    text = table(job)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
