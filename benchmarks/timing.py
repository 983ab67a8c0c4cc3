"""How well the planner predicts the speed and memory of shapes that its cost model was not fitted to.

    python benchmarks/timing.py --teacher DIR --target laptop-x86 --out OUT     3 GB of disk per billion parameters
    python benchmarks/timing.py --teacher llama-3.2-1b/config.json --target laptop-x86 --context 2048 --out OUT

Files with random weights are timed in llama.cpp, so only the teacher's config.json is read. The anchors and --shapes
other students are timed in the same rounds, and the cost model is fitted to the anchors alone. The others are those
students that `lrc-edge plan` considers which are nearest to a quasi-random sequence (R5) over the shares of all five
sizes. Then each file is opened again and reads a prompt that fills the context except for the last tokens, and the peak
of its resident set is compared with the prediction.

OUT/runs.json has the timings and peaks. --render fits and predicts again with them, and only writes OUT/table.md.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fit import machine_features, measured_peak

from lrc_edge.config_file import read_table, shape_of
from lrc_edge.figures import figure, human_count
from lrc_edge.formats import format_of
from lrc_edge.machine import threads_for
from lrc_edge.shape import ModelShape
from lrc_edge.targets.memory import memory_of
from lrc_edge.targets.profile import load_profile
from lrc_edge.targets.timing.anchors import anchors_of, time_shapes
from lrc_edge.targets.timing.cost import CostModel, Timing
from lrc_edge.targets.timing.measured import library_of, machine_name, runtime_here
from lrc_edge.targets.timing.price import SMALLEST, grid
from lrc_edge.targets.timing.random_gguf import write_random_gguf

RUNTIME = "llama.cpp"
AXES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
RATIO = 1.1347241384015194  # the root of x**6 = x + 1, of which the R5 sequence is made


@dataclass(frozen=True)
class Runs:
    """Timings and peaks of the anchors, which come first, and of the other shapes, on one machine."""

    teacher: ModelShape
    machine: str
    library: str
    features: tuple[str, ...]  # the processor's, as profiles name them
    load: float  # average of the last minute, at the start
    threads: int
    format: str
    context: int  # tokens
    n_anchors: int
    shapes: tuple[ModelShape, ...]
    timings: tuple[Timing, ...]
    peaks: tuple[int, ...]  # bytes, by shape

    def save(self, file: Path) -> None:
        table = vars(self) | {"teacher": self.teacher.as_dict(), "shapes": [shape.as_dict() for shape in self.shapes],
                              "timings": [timing.as_dict() for timing in self.timings]}
        file.write_text(json.dumps(table, indent=1) + "\n")

    @classmethod
    def load_from(cls, file: Path) -> Runs:
        table = json.loads(file.read_text())
        return cls(**table | {"teacher": ModelShape.from_dict(table["teacher"]), "features": tuple(table["features"]),
                              "shapes": tuple(map(ModelShape.from_dict, table["shapes"])),
                              "timings": tuple(map(Timing.from_dict, table["timings"])),
                              "peaks": tuple(table["peaks"])})


def others_of(teacher: ModelShape, format_: str, n: int) -> list[ModelShape]:
    """Return up to n students that are no anchors, spread over all axes."""
    anchors = set(anchors_of(teacher))
    students = [shape for shapes in grid(teacher, format_) for shape in shapes if shape not in anchors]
    sizes_NA, whole_A = (np.array([[getattr(shape, axis) for axis in AXES] for shape in shapes])
                         for shapes in (students, [teacher]))
    distances_PN = np.linalg.norm((sizes_NA / whole_A)[None] - points(10 * n)[:, None], axis=-1)
    return [students[i] for i in list(dict.fromkeys(distances_PN.argmin(-1).tolist()))[:n]]


def points(n: int) -> np.ndarray:
    """Return (n, 5) shares of the teacher's sizes, evenly spread."""
    steps_A = RATIO ** -np.arange(1.0, len(AXES) + 1)
    return SMALLEST + (1 - SMALLEST) * ((0.5 + np.arange(1, n + 1)[:, None] * steps_A) % 1)


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> Runs:
    config = args.teacher / "config.json" if args.teacher.is_dir() else args.teacher
    teacher = shape_of(read_table(config), config)
    profile = load_profile(args.target)
    format_ = args.format or profile.recommended
    runtime = runtime_here(profile, format_)
    if runtime is None or format_of(format_).kind != "gguf":
        raise SystemExit(f"{format_} on {profile.name}: only GGUF files are timed, and only devices with this "
                         "machine's kind of processor")
    anchors = anchors_of(teacher)
    shapes = [*anchors, *others_of(teacher, format_, args.shapes)]
    context = min(args.context or profile.context, teacher.max_position_embeddings)
    threads, load = args.threads or threads_for(anchors[0]), os.getloadavg()[0]
    timings = time_shapes(shapes, format_, runtime.start, context, threads, say, args.out)
    peaks = [peak_of(shape, format_, context, threads, args.out, say) for shape in shapes]
    return Runs(teacher, machine_name(), library_of(runtime, format_),
                tuple(sorted(machine_features())), load, threads, format_, context, len(anchors), tuple(shapes),
                tuple(timings), tuple(peaks))


def peak_of(shape: ModelShape, format_: str, context: int, threads: int, folder: Path, say: Callable[[str], None]
            ) -> int:
    say(f"memory of {described(shape)}")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        file = Path(name) / "random.gguf"
        write_random_gguf(shape, format_, file)
        return measured_peak(RUNTIME, file, context, threads)


def predicted_peak(shape: ModelShape, runs: Runs) -> int:
    """Return the predicted peak without the strings of a vocabulary, which files with random weights lack."""
    memory, without = (memory_of(sized, runs.format, RUNTIME, runs.context, runs.features)
                       for sized in (shape, shape.resized({"vocab_size": 1})))
    return memory.peak - memory.runtime + without.runtime


def compared(runs: Runs) -> dict[str, dict[ModelShape, tuple[float, float]]]:
    """Return, for each quantity, each shape's measured and predicted value."""
    anchors = set(runs.shapes[:runs.n_anchors])
    model = CostModel.fit([timing for timing in runs.timings if timing.shape in anchors], runs.format)
    decode: dict[str, dict[ModelShape, tuple[float, float]]] = {}
    prompt: dict[str, dict[ModelShape, tuple[float, float]]] = {}
    for timing in runs.timings:
        shape, n = timing.shape, timing.n_prompt
        assert timing.decode is not None  # llama.cpp decodes as many tokens as it is asked for
        decode.setdefault(f"ms per token after {n:,} tokens", {})[shape] = (
            1000 / timing.decode, model.decode_ms(shape, n))
        prompt.setdefault(f"ms of a prompt of {n:,} tokens", {})[shape] = (
            1000 * n / timing.prompt, model.first_token_ms(shape, n))
    peaks = zip(runs.shapes, runs.peaks, strict=True)
    return decode | prompt | {"peak memory in MB": {shape: (peak / 1e6, predicted_peak(shape, runs) / 1e6)
                                                    for shape, peak in peaks}}


def table(runs: Runs) -> str:
    """Return Markdown: one row per shape with measured and predicted values, then the errors of both groups."""
    found = compared(runs)
    groups = {"anchor": runs.shapes[:runs.n_anchors], "other": runs.shapes[runs.n_anchors:]}
    lines = [f"Students of {described(runs.teacher)} in {runs.format} with {runs.context:,} tokens of context: "
             f"{runs.library}, {runs.threads} threads, {runs.machine}, load average {runs.load:.1f} before.", "",
             "Each cell: measured / predicted (error). The cost model is fitted to the anchors' times alone; memory is "
             "predicted from the shape alone.", "",
             f"| shape | | {' | '.join(found)} |", "|---" * (len(found) + 2) + "|"]
    lines += [f"| {described(shape)} | {group} | {' | '.join(cell(column[shape]) for column in found.values())} |"
              for group, shapes in groups.items() for shape in shapes]
    for group, shapes in groups.items():
        errors = [[abs(error(column[shape])) for shape in shapes] for column in found.values()]
        lines += [f"| {name} error | {group}s | {' | '.join(f'{summary(column):.1%}' for column in errors)} |"
                  for name, summary in (("median", statistics.median), ("largest", max))]
    return "\n".join(lines) + "\n"


def error(value: tuple[float, float]) -> float:
    measured, predicted = value
    return predicted / measured - 1


def cell(value: tuple[float, float]) -> str:
    return f"{figure(value[0])} / {figure(value[1])} ({error(value):+.1%})"


def described(shape: ModelShape) -> str:
    return (f"{shape.hidden_size} × {shape.num_hidden_layers}, {shape.intermediate_size} neurons, "
            f"{shape.num_attention_heads}/{shape.num_key_value_heads} heads, {human_count(shape.n_params)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="config.json, or a folder with one")
    parser.add_argument("--target", default="laptop-x86", help="a device with this machine's kind of processor")
    parser.add_argument("--format", help="a GGUF format; default: the one that the device's profile recommends")
    parser.add_argument("--context", type=int, help="tokens; default: the device's")
    parser.add_argument("--shapes", type=int, default=8, help="shapes besides the anchors")
    parser.add_argument("--threads", type=int, default=0, help="default: as `lrc-edge plan`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--render", action="store_true", help="only write the table, from OUT/runs.json")
    args = parser.parse_args()
    if args.shapes < 1:
        parser.error("--shapes: need at least 1")
    file = args.out / "runs.json"
    if not args.render:
        args.out.mkdir(parents=True, exist_ok=True)
        measure(args, lambda text: print(text, flush=True)).save(file)
    text = table(Runs.load_from(file))
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
