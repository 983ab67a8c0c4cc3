"""Training speed of a clone compared with alternatives: tokens/s, FLOPs utilisation, peak memory, in one run.

    python benchmarks/train_throughput.py --shape tiny               # on a CPU, under 5 minutes
    python benchmarks/train_throughput.py --shape llama-3.2-3b       # LRC-1.5B's shape; needs a GPU of 80 GB

Weights and tokens are random. Each row runs in its own process, and is printed as it ends:

    plain       the student alone on cross entropy, as a dense model, with the same layers, head loss and optimizer
    dense phase lrc_edge's trainer with the default method: it trains the student's matrices, with the clone loss
    fp8 teacher the same with train.teacher_precision=fp8 (a CPU emulates that, slowly)
    no terms    the default method without the clone loss
    clone phase the same trainer training projections; the matrices are composed once per step
    KD          `plain` with the teacher's complete forward pass and KL
    reference   the operations of the published code, reimplemented: it applies projection and teacher's weight to
                every token, keeps the log-softmaxes of all tokens, and reads each clone term on the host

Utilisation is the model FLOP/s of a row divided by those of a large matrix product, which is measured first. Model
FLOPs are those of the student's forward and backward pass and, except for `plain`, of the teacher's forward pass,
with attention.
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lrc_edge.families import family_of
from lrc_edge.lineage import Lineage
from lrc_edge.recipe import load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train import losses
from lrc_edge.train.clone import Clone, Tap
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import Trainer
from lrc_edge.train.phases import CLONE, DENSE, Phase


@dataclass(frozen=True)
class Setup:
    """A teacher's shape, the student's width, and how a step is split."""

    hidden_size: int
    student_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    seq_len: int
    rows: int  # sequences per optimizer step
    micro_batch: int

    def config(self, width: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size, tie_word_embeddings=True, max_position_embeddings=131_072, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})

    def flops(self, width: int, passes: int) -> float:
        """Model FLOPs per token: 2 per weight and pass (backward is two), and causal attention (half the square)."""
        shape = self.shape(width)
        return passes * (2 * shape.n_params + 2 * self.layers * self.seq_len * shape.q_size)

    def shape(self, width: int) -> ModelShape:
        return ModelShape.from_config(self.config(width).to_dict(), "setup")


SHAPES = {
    "llama-3.2-3b": Setup(3072, 1536, 28, 24, 8, 128, 8192, 128_256, 2048, 16, 2),
    "tiny": Setup(512, 256, 4, 8, 2, 64, 1024, 8192, 256, 16, 4),
}
Step = Callable[[torch.Tensor], Any]


def model(setup: Setup, width: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with device:
        torch.manual_seed(0)
        # Made in `dtype`, not cast to it, so that RoPE's frequencies stay float32.
        built: PreTrainedModel = AutoModelForCausalLM.from_config(setup.config(width), dtype=dtype)
    return built


def lrc_edge(setup: Setup, device: torch.device, dtype: torch.dtype, args: argparse.Namespace, phase: Phase,
             **train: Any) -> Step:
    """A step of the trainer in a phase. `train`: settings of the recipe's [train]."""
    lineage = Lineage.of(setup.shape(setup.hidden_size), setup.shape(setup.student_size))
    teacher = model(setup, setup.hidden_size, device, dtype)
    clone = Clone(teacher, lineage, dtype, args.gradient_checkpointing, phase).to(device)
    for p in clone.trainable().values():
        nn.init.normal_(p, std=0.02)
    clone.compose_()
    settings = load_recipe(None, (), train={
        "micro_batch": args.micro_batch or setup.micro_batch, "seq_len": setup.seq_len, "compile": args.compile,
        "spike_factor": 0.0, **train}).train
    schedule = Schedule(setup.seq_len, setup.rows, 1000, 1000, 10, 1e-4, 10, 1e-4)
    trainer = Trainer(clone, settings, schedule, range(10**6), np.zeros((1, 2)),  # type: ignore[arg-type]
                      Path(tempfile.mkdtemp()), lambda row: None)
    count = iter(range(10**6))
    return lambda ids: trainer._step(next(count), {"input_ids": ids, "labels": shifted(ids)})


def shifted(ids: torch.Tensor) -> torch.Tensor:
    return F.pad(ids[:, 1:], (0, 1), value=losses.NO_LABEL)


def dense(setup: Setup, device: torch.device, dtype: torch.dtype, args: argparse.Namespace, with_teacher: bool) -> Step:
    """Ordinary training of the student on cross entropy, or on cross entropy and the KL to a teacher."""
    student = model(setup, setup.student_size, device, torch.float32)
    teacher = model(setup, setup.hidden_size, device, dtype).requires_grad_(False) if with_teacher else None
    per_token = losses.token_losses
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
        per_token = torch.compile(per_token)
        for layer in [*student.model.layers, *(teacher.model.layers if teacher is not None else ())]:
            layer.compile()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    objective = losses.Objective(kl=1.0 if with_teacher else 0.0, clone=0.0)

    def step(ids: torch.Tensor) -> None:
        n_labels = torch.tensor(ids.numel() - len(ids), device=device)
        for part in ids.split(args.micro_batch or setup.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                target = target_head = None
                if teacher is not None:
                    with torch.no_grad():
                        target = teacher.model(part, use_cache=False).last_hidden_state.flatten(0, 1)
                    target_head = teacher.lm_head.weight
                hidden = student.model(part, use_cache=False).last_hidden_state.flatten(0, 1)
                loss, _ = losses.head_losses(hidden, student.lm_head.weight, target, target_head,
                                             shifted(part).flatten(), objective, n_labels, per_token)
            loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Projected(nn.Module):
    """A student's linear as in the published code: projection and teacher's weight, both applied to every token."""

    def __init__(self, linear: nn.Linear, student_width: int, writes_stream: bool):
        super().__init__()
        object.__setattr__(self, "linear", linear)  # the teacher's
        self.writes_stream = writes_stream
        width = linear.out_features if writes_stream else linear.in_features
        self.p = nn.Parameter(torch.randn(width, student_width, device=linear.weight.device) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.linear.weight) @ self.p if self.writes_stream else \
            F.linear(x @ self.p.T, self.linear.weight)


def reference(setup: Setup, device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> Step:
    """The published code's operations, reimplemented; lrc_edge computes the same losses."""
    teacher = model(setup, setup.hidden_size, device, dtype).requires_grad_(False)
    student = model(setup, setup.student_size, device, torch.float32).requires_grad_(False)
    writes_stream = {role.module: role.writes_stream for role in family_of("llama").matrices}
    layers = list(zip(teacher.model.layers, student.model.layers, strict=True))
    taps = [(Tap(a, writes_stream), Tap(b, writes_stream)) for a, b in layers]
    both = [tap for pair in taps for tap in pair]
    for a, b in layers:
        for name in writes_stream:
            parent, _, leaf = name.rpartition(".")
            projected = Projected(a.get_submodule(name), setup.student_size, writes_stream[name])
            hooks = b.get_submodule(name)._forward_hooks
            setattr(b.get_submodule(parent), leaf, projected)
            projected._forward_hooks.update(hooks)
    p_embed = nn.Parameter(torch.randn(setup.hidden_size, setup.student_size, device=device) * 0.02)
    norms = [p.requires_grad_(True) for name, p in student.named_parameters() if "norm" in name]
    trained = [p_embed, *norms, *(m.p for m in student.modules() if isinstance(m, Projected))]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    table = teacher.model.embed_tokens.weight

    def step(ids: torch.Tensor) -> None:
        n_parts = len(ids) // (args.micro_batch or setup.micro_batch)
        for part in ids.chunk(n_parts):
            for tap in both:
                tap.keeps = True
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                with torch.no_grad():
                    target = teacher(part, use_cache=False).logits
                stream = F.embedding(part, table) @ p_embed
                hidden = student.model(inputs_embeds=stream, use_cache=False).last_hidden_state
                logits = (hidden @ p_embed.T) @ table.T
                clone = torch.zeros((), device=device)
                for (a, b), layer in zip(taps, student.model.layers, strict=True):
                    goals, outputs = a.take(), b.take()
                    for name, goal in goals.items():
                        if writes_stream[name]:
                            goal = goal @ layer.get_submodule(name).p
                        term = F.mse_loss(outputs[name].float(), goal.float())
                        term.item()
                        clone = clone + term
                kl = F.kl_div(F.log_softmax(logits.float() / 40, -1).flatten(0, 1),
                              F.log_softmax(target.float() / 40, -1).flatten(0, 1), log_target=True,
                              reduction="batchmean")
                lm = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten())
            ((lm + kl + 0.2 * clone) / n_parts).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


ROWS: dict[str, tuple[Callable[..., Step], bool]] = {  # row -> (how to build its step, whether the teacher runs)
    "plain": (lambda *a: dense(*a, with_teacher=False), False),
    "dense phase": (lambda *a: lrc_edge(*a, DENSE), True),
    "fp8 teacher": (lambda *a: lrc_edge(*a, DENSE, teacher_precision="fp8"), True),
    "no terms": (lambda *a: lrc_edge(*a, DENSE, dense_alpha=0.0), True),
    "clone phase": (lambda *a: lrc_edge(*a, CLONE), True),
    "KD": (lambda *a: dense(*a, with_teacher=True), True),
    "reference": (reference, True),
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of several large matrix products."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def measure(name: str, args: argparse.Namespace, pipe: Any) -> None:
    """Measure a row; runs in its own process. Sends (median seconds per step, peak bytes), or the error in one line."""
    setup, device = SHAPES[args.shape], choose_device("auto")
    dtype = choose_precision("auto", device)
    try:
        step = ROWS[name][0](setup, device, dtype, args)
        ids = torch.randint(0, setup.vocab_size, (setup.rows, setup.seq_len), device=device)
        seconds = []
        for _ in range(args.warmup + args.steps):
            synchronize(device)
            started = time.perf_counter()
            step(ids)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    except Exception as error:
        traceback.print_exc()
        what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        pipe.send(f"{what}: {' '.join(str(error).split())[:80]}")
        return
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((sorted(seconds[args.warmup:])[args.steps // 2], peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, `plain` first if others are to be "
                        "compared with it; default: all")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per forward pass; default: the shape's")
    parser.add_argument("--warmup", type=int, default=3, help="steps before timing starts")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for lrc-edge's rows")
    args = parser.parse_args()
    setup, device = SHAPES[args.shape], choose_device("auto")
    dtype = choose_precision("auto", device)
    ceiling = matmul_ceiling(device, dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tokens = setup.rows * setup.seq_len
    print(f"{args.shape}: {setup.hidden_size} -> {setup.student_size}, {tokens:,} tokens a step, {setup.seq_len} a "
          f"row, {str(dtype).removeprefix('torch.')}; {where}; matrix product {ceiling / 1e12:.2f} TFLOP/s\n")
    print("| | tokens/s | to plain | FLOPs utilisation | peak memory |\n|---|---|---|---|---|", flush=True)
    plain = None
    for name in args.rows.split(","):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(name, args, theirs))
        process.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            result = None
        process.join()
        result = result or f"ended with status {process.exitcode}"  # -9: the system had no memory left
        plain = result if name == "plain" else plain
        print(row(name, result, plain, setup, tokens, ceiling), flush=True)


def row(name: str, result: Any, plain: Any, setup: Setup, tokens: int, ceiling: float) -> str:
    if isinstance(result, str):
        return f"| {name} | {result} | | | |"
    seconds, peak = result
    flops = setup.flops(setup.student_size, 3) + (setup.flops(setup.hidden_size, 1) if ROWS[name][1] else 0.0)
    ratio = f"{plain[0] / seconds:.2f}" if plain is not None and not isinstance(plain, str) else ""
    return (f"| {name} | {tokens / seconds:,.0f} | {ratio} | {flops * tokens / seconds / ceiling:.0%} | "
            f"{peak / 1e9:.1f} GB |")


if __name__ == "__main__":
    main()
