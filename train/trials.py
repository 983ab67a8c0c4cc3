"""Short training runs of several students beside each other: one frozen teacher, one forward pass of it for each batch.

They choose between shapes; the student itself is trained by train/loop. All weights learn from LM and KL. Each student
is judged with its weights rounded to the Q4_0 grid, as it will run. Shapes: B rows, L positions, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.families import weights_of
from lrc_edge.train.clone import config_of
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.grids import BLOCK, on_grid
from lrc_edge.train.loop.schedule import MIN_BATCH, default_rate
from lrc_edge.train.loop.trainer import held_out_loss
from lrc_edge.train.start.build import Start

WARMUP = 0.1  # of the steps


@dataclass(frozen=True)
class Trial:
    """What a student reached, in nats per token of held-out text."""

    loss: float
    loss_in_4_bits: float


class Candidate:
    """A student in training."""

    def __init__(self, start: Start, teacher: DenseCheckpoint, steps: int, device: torch.device):
        self.shape = start.lineage.student
        config = config_of(teacher.check_config(), start.lineage)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.load_state_dict(start.tensors, strict=False)
        self.model.tie_weights()
        self.model.to(device)  # type: ignore[arg-type]
        rate = default_rate(self.shape.hidden_size, steps, MIN_BATCH, start.kl)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        warmup = max(1, round(WARMUP * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)))

    def step(self, ids_BL: torch.Tensor, labels_BL: torch.Tensor, log_p_BLV: torch.Tensor, dtype: torch.dtype) -> None:
        with torch.autocast(ids_BL.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        log_q = F.log_softmax(logits_BLV.float(), -1)
        lm = F.nll_loss(log_q.flatten(0, 1), labels_BL.flatten())
        kl = F.kl_div(log_q.flatten(0, 1), log_p_BLV.flatten(0, 1), reduction="batchmean", log_target=True)
        (lm + kl).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()

    @torch.no_grad()
    def judged(self, held_out_BL: np.ndarray, dtype: torch.dtype) -> Trial:
        loss = held_out_loss(self.model, held_out_BL, dtype)
        for weight in weights_of(self.shape):
            if weight.role.is_matrix and weight.shape[-1] % BLOCK == 0:
                parameter = self.model.get_parameter(weight.name)
                parameter.copy_(on_grid(weight, parameter))
        return Trial(loss, held_out_loss(self.model, held_out_BL, dtype))


def run_trials(teacher: DenseCheckpoint, starts: Sequence[Start], rows: PackedRows, held_out_BL: np.ndarray,
               tokens: int, dtype: torch.dtype, device: torch.device, progress: Callable[[int, int], None],
               seed: int = 0) -> list[Trial]:
    """Train a student from each start on the same `tokens` tokens. progress: gets the steps done and their number.

    The starts hold weights. Needs memory for all students and their optimizers at once.
    """
    per_step = max(1, MIN_BATCH // rows.seq_len)
    steps = max(1, tokens // (per_step * rows.seq_len))
    model = teacher.model(dtype).to(device)  # type: ignore[arg-type]
    candidates = [Candidate(start, teacher, steps, device) for start in starts]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        batch = [rows[order[(step * per_step + i) % len(order)]] for i in range(per_step)]
        ids_BL, labels_BL = (torch.stack([row[key] for row in batch]).to(device) for key in ("input_ids", "labels"))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            log_p_BLV = F.log_softmax(model(input_ids=ids_BL, use_cache=False).logits.float(), -1)
        for candidate in candidates:
            candidate.step(ids_BL, labels_BL, log_p_BLV, dtype)
        progress(step + 1, steps)
    return [candidate.judged(held_out_BL, dtype) for candidate in candidates]
