"""Held-out loss, and loss of quality at 4 bits, for each initialization over the first steps.

    python benchmarks/initialization.py examples/demo/storyteller examples/demo/stories.jsonl --hidden-size 256

Each initialization trains on the same sequences in the same order. Columns: held-out cross entropy of the student, and
the KL divergence (nats per token) that Q4_0 weights with a Q8_0 embedding add, both at the start and after each third.
`components` is the PCA basis itself; `pca` is the same basis, randomly rotated (lrc_edge.train.start.width).
"""
from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, quants

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.encode import token_ids
from lrc_edge.corpus.sources import Fields, source_documents
from lrc_edge.train.clone import Clone
from lrc_edge.train.loop.trainer import held_out_loss
from lrc_edge.train.start.build import Choices, build_start
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.width import INITS, principal_components

HELD_OUT_ROWS, CALIBRATION_ROWS = 40, 16


STARTS = {**INITS, "components": partial(principal_components, turned=False)}


@torch.no_grad()
def cost_of_4_bits(clone: Clone, rows: torch.Tensor) -> float:
    """Return KL(student || student with Q4_0 matrices), mean over tokens. Matrices that Q4_0 does not fit are kept."""
    student = clone.student
    expected = torch.log_softmax(student(rows).logits.float(), -1)
    for name, p in student.named_parameters():
        if p.ndim == 2 and p.shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_0
            p.copy_(torch.from_numpy(quants.dequantize(quants.quantize(p.numpy(), kind), kind)))
    got = torch.log_softmax(student(rows).logits.float(), -1)
    clone.compose_()
    return (expected.exp() * (expected - got)).sum(-1).mean().item()


def run(teacher: DenseCheckpoint, name: str, rows: torch.Tensor, args: argparse.Namespace) -> None:
    held_out, train = rows[:HELD_OUT_ROWS], rows[HELD_OUT_ROWS:]
    with tempfile.TemporaryDirectory() as folder:
        student = teacher.shape.with_hidden_size(args.hidden_size)
        start = build_start(Layers.of(teacher, torch.device("cpu")), student, train[:CALIBRATION_ROWS], Path(folder),
                            "projections", Choices(width=STARTS[name], refits=False))
    clone = start.clone(teacher.model().to(torch.bfloat16), torch.bfloat16)
    optimizer = torch.optim.AdamW(clone.trainable().values(), lr=args.lr, weight_decay=0.0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    figures, started = [], time.monotonic()
    for step in range(args.steps + 1):
        if step % (args.steps // 3) == 0:
            loss = held_out_loss(clone.student, held_out.numpy(), torch.bfloat16)
            figures.append(f"{loss:.3f} {cost_of_4_bits(clone, held_out[:16]):.4f}")
        if step == args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 8) * (1 - step / args.steps)
        clone(train[order[(step * args.batch) % (len(train) - args.batch):][:args.batch]]).total.backward()
        clone.pull_back_()
        torch.nn.utils.clip_grad_norm_(clone.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clone.compose_()
    print(f"| {name} | " + " | ".join(figures) + f" | {time.monotonic() - started:.0f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("text")
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=90, help="a multiple of 3")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--row-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    teacher = DenseCheckpoint.open(args.teacher)
    texts = [text for text in source_documents(args.text, Fields(messages="")) if isinstance(text, str)]
    ids = [i for row in token_ids(teacher.tokenizer(), texts) for i in row]
    rows = torch.tensor(ids[:len(ids) // args.row_len * args.row_len]).view(-1, args.row_len)
    print(f"teacher: {held_out_loss(teacher.model(), rows[:HELD_OUT_ROWS].numpy(), torch.bfloat16):.3f}\n")
    thirds = [args.steps * i // 3 for i in range(4)]
    print("| init | " + " | ".join(f"loss, KL of 4 bits at {step}" for step in thirds) + " | time |")
    print("|---|" + "---|" * 5)
    for name in ("gaussian", "selection", "components", "pca"):
        run(teacher, name, rows, args)


if __name__ == "__main__":
    main()
