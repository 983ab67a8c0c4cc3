"""Time and peak memory of computing a student's start from a teacher with random weights.

    python benchmarks/start.py --work WORK                                            5 GB of disk for the teacher
    python benchmarks/start.py --work WORK --cut num_hidden_layers=12 --tokens 4096

The teacher (random_student.py, by default of the shape of Llama-3.2-1B) is made once, in --work. Prints the seconds of
each part, and the process's peak memory (resident, mapped files included) in units of the teacher's size in float32.
"""
from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from random_student import SHAPES, make_student

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.train.device import choose_device
from lrc_edge.train.start.build import build_start
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.stage import CALIBRATION_TOKENS, save_start

CUT = "hidden_size=1024 num_hidden_layers=12 intermediate_size=4096 num_attention_heads=16 num_key_value_heads=4"


def peak_bytes() -> int:
    """Return the peak of resident memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


class Parts:
    """Prints the seconds of each part of the work: progress lines that begin with the same word."""

    def __init__(self) -> None:
        self.part, self.since = "", time.monotonic()

    def __call__(self, line: str) -> None:
        if (part := line.split()[0]) != self.part:
            self.end()
            self.part = part

    def end(self) -> None:
        now = time.monotonic()
        if self.part:
            print(f"| {self.part} | {now - self.since:.0f} s | {peak_bytes() / 1e9:.2f} GB |", flush=True)
        self.since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument("--cut", default=CUT, help="sizes of the student")
    parser.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS, help="of calibration text")
    parser.add_argument("--row-len", type=int, default=2048)
    args = parser.parse_args()
    teacher = DenseCheckpoint.open(make_student(args.work, args.shape))
    student = teacher.shape.resized({name: int(size) for name, size in (part.split("=") for part in args.cut.split())})
    rows_BL = torch.randint(0, teacher.shape.vocab_size, (max(1, args.tokens // args.row_len), args.row_len),
                            generator=torch.Generator().manual_seed(0))
    size = 4 * teacher.shape.n_params
    print(f"Teacher: {teacher.shape.n_params:,} parameters, {size / 1e9:.2f} GB in float32. Student: "
          f"{student.n_params:,}. {rows_BL.numel():,} tokens, {torch.get_num_threads()} threads, device "
          f"{choose_device('auto')}.\n\n| part | time | peak so far |\n|---|---|---|", flush=True)
    began, parts = time.monotonic(), Parts()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        start = build_start(Layers.of(teacher, choose_device("auto")), student, rows_BL, Path(folder), "weights",
                            progress=parts)
        parts.end()
        save_start(start, Path(folder))
        streams = sum(file.stat().st_size for file in Path(folder).glob("*.stream"))
    print(f"\n{time.monotonic() - began:.0f} s, peak {peak_bytes() / 1e9:.2f} GB ({peak_bytes() / size:.2f} x the "
          f"teacher in float32), streams {streams / 1e9:.2f} GB on disk; layers {start.lineage.layers}")


if __name__ == "__main__":
    main()
