"""Memory of a training step of the built-in recipes, simulated without a GPU.

    python benchmarks/train_memory.py                                            # all recipes: 4 minutes
    python benchmarks/train_memory.py --recipes lrc-1.5b --micro-batch 8         # a larger forward pass

The trainer itself runs a step in bf16 on fake tensors, which have sizes but no values, and the bytes of all live
tensors are counted. Layers are not compiled. A real GPU needs more for the CUDA context and the workspaces of matrix
products (1 GB together), and for fragmentation; compiled layers need less.
"""
from __future__ import annotations

import argparse
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from train_throughput import SHAPES, shifted
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from lrc_edge.families import weights_of
from lrc_edge.lineage import Lineage
from lrc_edge.recipe import Train, load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.clone import Clone
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import Trainer
from lrc_edge.train.phases import DENSE, PHASES, Phase

TEACHERS: dict[str, PretrainedConfig] = {  # size in a recipe's name -> the shape of its teacher
    "1.5b": SHAPES["llama-3.2-3b"].config(3072),
    "1.7b": Qwen2Config(
        hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        intermediate_size=11008, vocab_size=151_936, tie_word_embeddings=True),
    "4b": Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152_064, tie_word_embeddings=False),
}
RECIPES = [f"{method}-{size}" for size in TEACHERS for method in ("lrc", "edge")]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, scale: float, **_: Any
          ) -> torch.Tensor:
    """Compute attention with the kernel that SDPA chooses on a GPU; for CPU tensors it would choose another."""
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    return out


def lineage_of(teacher: PretrainedConfig, width: int) -> Lineage:
    shape = ModelShape.from_config(teacher.to_dict(), "teacher")
    return Lineage.of(shape, shape.with_hidden_size(width))


def bytes_between_steps(lineage: Lineage, phase: Phase) -> int:
    """Calculate the bytes that live between two steps: the table of docs/training.md, without gradients and copies.

    The teacher is in bf16. The rest is in float32: the trained tensors with two Adam moments each, the composed
    matrices (clone phase) and the projections of the clone loss (dense phase).
    """
    weights = list(weights_of(lineage.student))
    composed = [weight for weight in weights if weight.role.is_matrix]
    size_of_p = lineage.teacher.hidden_size * lineage.student.hidden_size
    n_student = sum(weight.numel for weight in weights)
    if phase is DENSE:
        trained, others = n_student, size_of_p * sum(weight.role.writes_stream for weight in composed)
    else:
        trained = size_of_p * len(composed) + n_student - sum(weight.numel for weight in composed)
        others = sum(weight.numel for weight in composed)
    return 2 * lineage.teacher.n_params + 12 * trained + 4 * others


def simulate(teacher: PretrainedConfig, lineage: Lineage, settings: Train, phase: Phase) -> tuple[int, int]:
    """Return (bytes between two steps, peak bytes) of a step of two forward passes."""
    sdpa = patch.object(torch.nn.functional, "scaled_dot_product_attention", flash)
    with sdpa, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(teacher, dtype=torch.bfloat16)
        clone = Clone(model, lineage, torch.bfloat16, settings.gradient_checkpointing, phase)
        schedule = Schedule(settings.seq_len, 2 * settings.micro_batch, 1000, 1000, 10, 1e-4, 10, 1e-4)
        trainer = Trainer(clone, replace(settings, device="cpu", compile="off"), schedule,
                          range(10**6), np.zeros((1, 2)), Path(folder), lambda row: None)  # type: ignore[arg-type]
        ids = torch.randint(0, teacher.vocab_size, (schedule.rows, schedule.seq_len))
        batch = {"input_ids": ids, "labels": shifted(ids)}
        trainer._step(0, batch)  # makes the optimizer's moments
        between, live.peak = live.now, 0
        trainer._step(1, batch)
        return between, live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated; default: all")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per forward pass; default: the recipe's")
    args = parser.parse_args()
    print("| recipe, sequences per forward pass | phase | between steps, calculated | simulated | peak | peak with "
          "checkpointing |\n|---|---|---|---|---|---|", flush=True)
    for name in args.recipes.split(","):
        recipe, teacher = load_recipe(name), TEACHERS[name.partition("-")[2]]
        lineage = lineage_of(teacher, recipe.student.hidden_size)
        settings = replace(recipe.train, micro_batch=args.micro_batch or recipe.train.micro_batch)
        for phase in (PHASES[phase] for phase in Schedule.of(settings, lineage.student, 0).phases):
            (between, peak), (_, less) = (
                simulate(teacher, lineage, replace(settings, gradient_checkpointing=on), phase) for on in (False, True))
            cells = [bytes_between_steps(lineage, phase), between, peak, less]
            print(f"| {name}, {settings.micro_batch} | {phase.name} | "
                  + " | ".join(f"{cell / 1e9:.1f} GB" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
