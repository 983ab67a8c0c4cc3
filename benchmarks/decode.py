"""Prefill and decoding speed of the 4-bit files in their runtimes, all measured in one run on one student.

    python benchmarks/decode.py --work WORK                    the shape of LRC-1.5B: 10 GB of disk, about 10 GB of RAM
    python benchmarks/decode.py --work WORK --shape tiny --repeats 1 --rows "llama.cpp Q4_0"

The student has random weights (random_student.py); --work keeps it and the files made from it. Each measurement runs in
its own process. Rounds over all rows are repeated, and the median is shown. A measurement loads the model, warms it up,
decodes after one token, prefills, and decodes after that. Each runtime is used efficiently: llama.cpp with its defaults
(F16 cache, flash attention), onnxruntime with a cache that is extended in place. The rows named "default" use the
session settings stored in the folder, whatever the number of threads.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from export import genai_builder, make_student, our_export

VOCAB_SIZE = 512
Speeds = dict[str, float]  # "decode", "prefill", "decode after it" -> tokens per second


class Client(Protocol):
    def restart(self) -> None:
        """Forget every token."""
        ...

    def feed(self, ids: list[int]) -> None:
        """Feed these tokens after the earlier ones, and compute the logits of the last."""
        ...


class LlamaCpp:
    """llama.cpp with the default context settings."""

    def __init__(self, folder: Path, threads: int | None, n_ctx: int):
        import llama_cpp

        from lrc_edge.targets.runtimes.llama_probe import sound_buffers

        with sound_buffers():
            self.llama = llama_cpp.Llama(str(next(folder.glob("*.gguf"))), n_ctx=n_ctx, n_threads=threads,
                                         n_threads_batch=threads, verbose=False)

    def restart(self) -> None:
        self.llama.reset()

    def feed(self, ids: list[int]) -> None:
        self.llama.eval(ids)


class Ort:
    """onnxruntime with a cache of n_ctx tokens that every step extends in place."""

    def __init__(self, folder: Path, threads: int | None, n_ctx: int):
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.np, self.n_past = np, 0
        self.session = onnxruntime.InferenceSession(folder / "onnx" / "model_q4.onnx", options)
        self.binding = self.session.io_binding()
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros((1, value.shape[1], n_ctx, value.shape[3]), np.float32))
                self.binding.bind_ortvalue_input(value.name, cache)
                self.binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)

    def restart(self) -> None:
        self.n_past = 0

    def feed(self, ids: list[int]) -> None:
        np, total = self.np, self.n_past + len(ids)
        self.binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        self.binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        self.binding.bind_cpu_input("position_ids", np.arange(self.n_past, total, dtype=np.int64)[None])
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        self.n_past = total


class Genai:
    """onnxruntime-genai on a folder. threads = None: the session options of its genai_config.json."""

    def __init__(self, folder: Path, threads: int | None, n_ctx: int):
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        if threads:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.og, self.n_ctx, self.model = og, n_ctx, og.Model(config)

    def restart(self) -> None:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.n_ctx, do_sample=False)
        self.generator = self.og.Generator(self.model, params)

    def feed(self, ids: list[int]) -> None:
        self.generator.append_tokens(ids)
        self.generator.get_logits()


OURS, LEVEL_0, BUILDER = "lrc-edge", "lrc-edge-level-0", "builder"  # folders with files
ROWS: dict[str, tuple[Callable[[Path, int | None, int], Client], str]] = {
    "llama.cpp Q4_0": (LlamaCpp, f"{OURS}/gguf"),
    "lrc-edge ONNX q4 in onnxruntime": (Ort, f"{OURS}/onnx"),
    "lrc-edge ONNX q4 at level 0 in onnxruntime": (Ort, f"{LEVEL_0}/onnx"),
    "lrc-edge ONNX q4 in genai": (Genai, f"{OURS}/onnx"),
    "lrc-edge ONNX q4 in genai default": (Genai, f"{OURS}/onnx"),
    "builder int4 in genai": (Genai, BUILDER),
    "builder int4 in genai default": (Genai, BUILDER),
}


def make_files(student: Path, work: Path, wanted: set[str]) -> Path:
    """Return the folders that the rows need, each written once by its tool."""
    files = work / f"{student.name}-files"
    commands = {
        f"{OURS}/gguf": our_export(student, files / OURS, "gguf", "q4_0"),
        f"{OURS}/onnx": our_export(student, files / OURS, "onnx", "q4"),
        f"{LEVEL_0}/onnx": our_export(student, files / LEVEL_0, "onnx", "q4", "accuracy_level=0"),
        BUILDER: genai_builder(student, files / BUILDER),
    }
    for name, command in commands.items():
        if name in wanted and not (files / name).exists():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                shutil.rmtree(files / name, ignore_errors=True)
                sys.exit(f"{name}: status {done.returncode}\n{done.stdout.decode(errors='replace')[-3000:]}")
    return files


def measure(row: str, files: Path, threads: int, args: argparse.Namespace, pipe: Any) -> None:
    make, folder = ROWS[row]
    ids = [3 + 7 * i % (VOCAB_SIZE - 3) for i in range(args.prompt + args.tokens)]
    client = make(files / folder, None if row.endswith("default") else threads, len(ids) + 1)
    client.restart()
    client.feed(ids[:16])
    client.restart()
    client.feed(ids[:1])
    speeds: Speeds = {"decode": decode(client, ids[1:1 + args.tokens])}
    client.restart()
    started = time.perf_counter()
    client.feed(ids[:args.prompt])
    speeds["prefill"] = args.prompt / (time.perf_counter() - started)
    pipe.send(speeds | {"decode after it": decode(client, ids[args.prompt:])})


def decode(client: Client, ids: list[int]) -> float:
    started = time.perf_counter()
    for token in ids:
        client.feed([token])
    return len(ids) / (time.perf_counter() - started)


def in_process(row: str, files: Path, threads: int, args: argparse.Namespace) -> Speeds:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(row, files, threads, args, theirs))
    process.start()
    theirs.close()
    try:
        speeds: Speeds = ours.recv()
    except EOFError:
        sys.exit(f"{row}: no result; the traceback stands above")
    process.join()
    return speeds


def render(found: dict[tuple[int, str], list[Speeds]], args: argparse.Namespace) -> str:
    titles = {"decode": "decode", "prefill": f"prefill of {args.prompt}", "decode after it": "decode after it"}
    lines = []
    for threads in args.threads:
        medians = {row: {key: statistics.median(one[key] for one in speeds) for key in titles}
                   for (n, row), speeds in found.items() if n == threads}
        first = next(iter(medians.values()))
        heads = " | ".join(f"{title} | to first" for title in titles.values())
        lines += [f"| tokens/s, threads: {threads} | {heads} |", "|---" * (1 + 2 * len(titles)) + "|"]
        for row, speeds in medians.items():
            cells = " | ".join(f"{speeds[key]:.1f} | {speeds[key] / first[key]:.2f}" for key in titles)
            lines.append(f"| {row} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for student, files and results")
    parser.add_argument("--shape", default="lrc-1.5b", help="lrc-1.5b or tiny")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; default: all")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512, help="tokens to prefill")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode at each place")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    names = [name.strip() for name in args.rows.split(",")]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {unknown}; known: {list(ROWS)}")
    args.work.mkdir(parents=True, exist_ok=True)
    student = make_student(args.work.resolve(), args.shape)
    files = make_files(student, args.work.resolve(), {ROWS[name][1] for name in names})
    found: dict[tuple[int, str], list[Speeds]] = {(n, name): [] for n in args.threads for name in names}
    loads = []
    for round_number in range(args.repeats):
        for threads, name in found:
            loads.append(os.getloadavg()[0])
            found[threads, name].append(in_process(name, files, threads, args))
            speeds = {key: round(value, 1) for key, value in found[threads, name][-1].items()}
            print(f"round {round_number + 1}, threads: {threads}, {name}: {speeds}", file=sys.stderr, flush=True)
    text = (f"{args.shape}, medians of {args.repeats}; load average {min(loads):.1f} to {max(loads):.1f}\n\n"
            f"{render(found, args)}")
    (args.work / "decode.md").write_text(text)
    (args.work / "decode.json").write_text(json.dumps(
        [{"threads": threads, "row": name, "tokens_per_second": speeds} for (threads, name), speeds in found.items()],
        indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
