"""Training: the HF Trainer with the clone's losses, its optimizer over projections, and metrics.jsonl."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from lrc_edge import recipe as recipes
from lrc_edge.errors import UserError
from lrc_edge.train.clone import Clone
from lrc_edge.train.data import PackedRows

PROJECTIONS_FILE = "projections.safetensors"  # every trainable tensor, by the name of the weight that it makes
METRICS_FILE = "metrics.jsonl"
COMPLETE_MARK = "complete"  # written last into a checkpoint: one without it was cut off by a kill
EVAL_TOKENS = 32_768

Progress = Callable[[dict[str, float]], None]  # gets each logged row


@dataclass(frozen=True)
class Schedule:
    """The recipe's token counts as the steps and batches that the Trainer runs."""

    seq_len: int
    micro_batch: int
    accumulation: int
    steps: int

    @classmethod
    def of(cls, train: recipes.Train, max_position_embeddings: int, n_tokens: int) -> Schedule:
        """`n_tokens`: what the data holds, which is the budget when the recipe names none."""
        seq_len = min(train.seq_len, max_position_embeddings)
        budget = train.tokens or n_tokens
        batch_tokens = train.batch_tokens or min(32_768, max(4_096, budget // 400))
        rows = max(1, round(batch_tokens / seq_len))
        micro = math.gcd(rows, train.micro_batch)
        return cls(seq_len, micro, rows // micro, max(1, round(budget / (rows * seq_len))))

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.micro_batch * self.accumulation


def peak_learning_rate(train: recipes.Train, teacher_width: int) -> float:
    """The recipe's, or the default. A projection's entries are about 1 / sqrt(teacher width), and Adam moves each by
    the learning rate: 0.024 / sqrt(width) moves it by 2.4 % a step at every width."""
    return train.learning_rate or 0.024 / math.sqrt(teacher_width)


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': this machine has no usable GPU; use --set train.device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU and on processors that multiply in it (AVX512-BF16 or AMX); elsewhere it is slower."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@torch.inference_mode()
def held_out_loss(model: nn.Module, rows_BL: np.ndarray, dtype: torch.dtype) -> float:
    """Mean cross entropy in nats a token of a Hugging Face model on rows of held-out ids."""
    device = next(model.parameters()).device
    nats = 0.0
    for row in torch.from_numpy(rows_BL).split(4):
        ids = row.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        nats += nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(),
                                            reduction="sum").item()
    return nats / (rows_BL.shape[0] * (rows_BL.shape[1] - 1))


class CloneTrainer(Trainer):
    """Trains a Clone: composes before each step's first micro-batch, pulls gradients back after its last."""

    def __init__(self, clone: Clone, settings: recipes.Train, schedule: Schedule, rows: PackedRows,
                 held_out_BL: np.ndarray, folder: Path, progress: Progress):
        self.settings, self.schedule, self.held_out_BL, self.folder = settings, schedule, held_out_BL, folder
        self.learning_rate = peak_learning_rate(settings, clone.teacher_width)
        self.progress = progress
        self._parts = torch.zeros(3)  # lm, kl, clone: summed since the last log, on the device, without a sync
        self._n_parts = 0
        self._started = time.monotonic()
        self._tokens_at_start = 0
        super().__init__(model=clone, args=_arguments(settings, schedule, folder, clone, self.learning_rate),
                         train_dataset=rows, callbacks=[_Callback(self)])

    @property
    def clone(self) -> Clone:
        model = self.model
        assert isinstance(model, Clone)
        return model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.clone.trainable().values(), lr=self.learning_rate,
                                           betas=(0.9, 0.999), weight_decay=0.0)
        self.optimizer.register_step_post_hook(lambda *_: self.clone.compose_())
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        s = self.settings
        parts = model(inputs["input_ids"], temperature=s.kl_temperature)
        loss = s.lm_weight * parts.lm + s.kl_weight * parts.kl + s.alpha * parts.clone
        self._parts = self._parts.to(loss.device) + torch.stack([parts.lm, parts.kl, parts.clone]).detach()
        self._n_parts += 1
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.clone.pull_back_()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Turns the Trainer's row into ours, appends it to metrics.jsonl and shows it. Stops on NaN."""
        if "loss" not in logs:
            return
        lm, kl, clone = (self._parts / max(1, self._n_parts)).tolist()
        self._parts, self._n_parts = torch.zeros(3), 0
        s, step = self.settings, self.state.global_step
        tokens = step * self.schedule.tokens_per_step
        seconds = time.monotonic() - self._started
        self.row({"step": step, "tokens": tokens, "loss": s.lm_weight * lm + s.kl_weight * kl + s.alpha * clone,
                  "lm": lm, "kl": kl, "clone": clone, "lr": logs.get("learning_rate", 0.0),
                  "tokens_per_second": (tokens - self._tokens_at_start) / seconds})
        for term, value in (("lm", lm), ("kl", kl), ("clone", clone)):
            if not math.isfinite(value):
                raise UserError(f"train: the {term} loss is {value} at step {step} of {self.schedule.steps}; lower "
                                f"train.learning_rate (now {self.learning_rate:g}), then run the same command again")

    def row(self, row: dict[str, float]) -> None:
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.progress(row)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_projections(self.clone, Path(output_dir) / PROJECTIONS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.clone.initialize(load_file(Path(resume_from_checkpoint) / PROJECTIONS_FILE))


class _Callback(TrainerCallback):
    """Evaluates on held-out text, and marks a checkpoint as whole once everything of it is on disk."""

    def __init__(self, trainer: CloneTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._started = time.monotonic()
        self.trainer._tokens_at_start = state.global_step * self.trainer.schedule.tokens_per_step
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.trainer.settings.eval_every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        t = self.trainer
        loss = held_out_loss(t.clone.student, t.held_out_BL, t.clone.compute_dtype)
        t.row({"step": step, "tokens": step * t.schedule.tokens_per_step, "held_out_loss": loss})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_MARK).touch()


def save_projections(clone: Clone, path: Path) -> None:
    save_file({name: p.detach().float().cpu().contiguous() for name, p in clone.trainable().items()}, path)


def _arguments(settings: recipes.Train, schedule: Schedule, folder: Path, clone: Clone, learning_rate: float
               ) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=schedule.steps, seed=settings.seed,
        per_device_train_batch_size=schedule.micro_batch, gradient_accumulation_steps=schedule.accumulation,
        learning_rate=learning_rate, lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup_share * schedule.steps), max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every, logging_nan_inf_filter=False, save_strategy="steps",
        save_steps=settings.checkpoint_every, save_total_limit=2, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, use_cpu=next(clone.parameters()).device.type == "cpu",
        dataloader_drop_last=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole."""
    marks = (folder / "checkpoints").glob(f"checkpoint-*/{COMPLETE_MARK}")
    return max((mark.parent for mark in marks), key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
