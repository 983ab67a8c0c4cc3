"""The training loop: its steps, logging, evaluation and checkpoints.

This is our own loop on accelerate's processes, torch's FSDP2, AdamW and DataLoader, instead of the HF Trainer: the
trained tensors change between the phases, weights are composed once per step, a bad batch is skipped on the device, and
a resumed run ends with the same bits (docs/LOG.md).
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from lrc_edge import recipe as recipes
from lrc_edge.errors import UserError
from lrc_edge.train.clone import Clone
from lrc_edge.train.data.tokenize import PackedRows
from lrc_edge.train.fp8 import multiply_in_fp8_
from lrc_edge.train.loop import checkpoints, processes
from lrc_edge.train.loop.guard import MOST_SKIPPED, BadBatch, Guard
from lrc_edge.train.loop.preemption import ignore_sigterm, sigterms
from lrc_edge.train.loop.schedule import ProcessBatches, RowOrder, Schedule
from lrc_edge.train.losses import NO_LABEL, TERMS, Objective
from lrc_edge.train.phases import CLONE, DENSE, PHASES
from lrc_edge.workspace import write_atomically

TRAINED_FILE = "trained.safetensors"  # every trained tensor by its weight's name; the lineage in its metadata
METRICS_FILE = "metrics.jsonl"
EVAL_TOKENS = 32_768

Progress = Callable[[dict[str, float]], None]  # gets each logged row


@torch.inference_mode()
def held_out_loss(model: nn.Module, rows_BL: np.ndarray, dtype: torch.dtype) -> float:
    """Return the mean cross entropy, in nats per token, of a Hugging Face model on rows of held-out ids."""
    device = next(model.parameters()).device
    nats = 0.0
    for row in torch.from_numpy(rows_BL).split(4):
        ids = row.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        nats += nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(),
                                            reduction="sum").item()
    return nats / (rows_BL.shape[0] * (rows_BL.shape[1] - 1))


@dataclass
class Clock:
    """Seconds spent in steps by this run, including before it was resumed. Evaluations and checkpoints do not count."""

    seconds: float = 0.0
    tokens: int = 0
    _since: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        self._since = time.monotonic()

    def stop(self, tokens: int) -> None:
        self.seconds += time.monotonic() - self._since
        self.tokens += tokens
        self.resume()

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """Trains a Clone over a Schedule. `run` resumes from the folder's last checkpoint."""

    def __init__(self, clone: Clone, settings: recipes.Train, schedule: Schedule, rows: PackedRows,
                 held_out_BL: np.ndarray, folder: Path, progress: Progress):
        self.clone, self.settings, self.schedule, self.rows = clone, settings, schedule, rows
        self.held_out_BL, self.folder, self.progress = held_out_BL, folder, progress
        self.device = next(clone.parameters()).device
        self.processes = processes.join(self.device)
        self.rows_here, self.micro_batch = schedule.rows_of_process(self.processes.num_processes, settings.micro_batch)
        self.order = RowOrder(len(rows), schedule.rows, settings.seed)
        self.guard = Guard(self.device, settings.spike_factor)
        self.clock = Clock()
        if settings.teacher_precision == "fp8":
            multiply_in_fp8_(clone.teacher_parts.layers, self.device)
        if settings.compile == "on" or (settings.compile == "auto" and self.device.type == "cuda"):
            clone.compile_()
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.AdamW:
        # Fused: one kernel on either device, and the only one that skips a step when `found_inf` is set.
        return torch.optim.AdamW(self.clone.trainable().values(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0,
                                 fused=True)

    @property
    def objective(self) -> Objective:
        return Objective.of(self.settings, self.clone.phase.name)

    @property
    def is_main(self) -> bool:
        return bool(self.processes.is_main_process)

    def run(self) -> None:
        checkpoint = processes.agreed(checkpoints.latest(self.folder / "checkpoints"), self.processes)
        step = self._continue_from(checkpoint) if checkpoint else 0
        if checkpoint is None:
            if self.schedule.dense_from == 0:
                self._start_dense_phase(0)  # before sharding, which would hold the projections that this phase frees
            processes.shard(self.clone, self.processes)
            self.optimizer = self._new_optimizer()
            self._forget_metrics(-1)
            self.evaluate(0)
        self.clock.resume()
        with sigterms(alone=self.processes.num_processes == 1) as stops:
            for batch in self._batches(step):
                if step == self.schedule.dense_from:
                    self._start_dense_phase(step)
                self._step(step, batch)
                step += 1
                stopping = bool(stops)
                self._after(step, stopping)
                if stopping:
                    raise KeyboardInterrupt

    def _start_dense_phase(self, step: int) -> None:
        """Leave the clone phase, unless the clone is in a later one."""
        if self.clone.phase is CLONE:
            self._report(step)  # no row mixes two objectives
            self.clone.start(DENSE)
            self.optimizer = self._new_optimizer()

    def _batches(self, first: int) -> DataLoader[dict[str, torch.Tensor]]:
        on_gpu = self.device.type == "cuda"
        here = ProcessBatches(self.order, range(first, self.schedule.steps), self.processes.process_index,
                              self.processes.num_processes)
        return DataLoader(self.rows, batch_sampler=here, num_workers=self.settings.workers if on_gpu else 0,
                          pin_memory=on_gpu, worker_init_fn=ignore_sigterm)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self, step: int, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step: forward and backward passes of its batches, gradients of trained tensors, the update."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        world = self.processes.num_processes
        n_labels = (batch["labels"] != NO_LABEL).sum()
        if world > 1:
            dist.all_reduce(n_labels)
        n_labels = n_labels.clamp(min=1)
        terms = torch.zeros(len(TERMS), device=self.device)
        for start in range(0, self.rows_here, self.micro_batch):
            part = {name: tensor[start:start + self.micro_batch] for name, tensor in batch.items()}
            processes.reduce_gradients(self.clone, start + self.micro_batch == self.rows_here)
            losses = self.clone(**part, objective=self.objective, n_labels=n_labels,
                                share=self.micro_batch / self.schedule.rows)
            (losses.total * world).backward()  # FSDP takes the mean over processes where the step wants the sum
            terms += torch.stack([*losses.parts.values()])
            del losses  # its graph would live through the next forward pass
        if world > 1:
            dist.all_reduce(terms)
        self.clone.pull_back_()
        self._update(step, terms)

    def _update(self, step: int, terms: torch.Tensor) -> None:
        norm = nn.utils.clip_grad_norm_(self.clone.trainable().values(), self.settings.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, processes.DTensor) else norm
        self.optimizer.found_inf = self.guard.judge(step, torch.cat([terms, norm.detach()[None]]))  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clone.compose_()

    # -- between steps -------------------------------------------------------------------------------------------------

    def _after(self, step: int, stopping: bool) -> None:
        """Report, evaluate and save if due after `step` steps. `stopping`: this process ends after this step."""
        s, last = self.settings, step == self.schedule.steps
        saves = stopping or (step % s.checkpoint_every == 0 and not last)
        evaluates = last or step % s.eval_every == 0
        reports = saves or last or step % s.log_every == 0
        if self.device.type == "cuda" and (reports or evaluates):
            torch.cuda.synchronize(self.device)  # the clock must include the steps that were queued
        self.clock.stop(self.schedule.tokens_per_step)
        if reports:
            self._report(step)
        if evaluates:
            self.evaluate(step)
        if saves:
            self._save(step)
        self.clock.resume()

    def _report(self, step: int) -> None:
        """Log the means since the last row; stop at a bad batch, or log it. The host waits for the device only here."""
        means, bad = self.guard.report()
        if means is not None:
            *values, norm = means
            terms = dict(zip(TERMS, values, strict=True))
            loss = sum(self.objective.weight(name) * value for name, value in terms.items())
            self.row({"step": step, "tokens": step * self.schedule.tokens_per_step, "loss": loss, **terms,
                      "grad_norm": norm, "lr": self.schedule.learning_rate(step - 1),
                      "tokens_per_second": self.clock.rate})
        for batch in bad:
            if self.settings.on_bad_batch == "stop" or batch.in_a_row >= MOST_SKIPPED:
                raise UserError(self._stopped(batch))
            self.row({"step": batch.step + 1, "skipped": str(batch)})  # type: ignore[dict-item]

    def _stopped(self, bad: BadBatch) -> str:
        rows = ", ".join(map(str, self.order.of_step(bad.step)[:4]))
        last = checkpoints.latest(self.folder / "checkpoints")
        kept = f"continues from {last.name}" if last else "starts again"
        rate = self.schedule.learning_rate(bad.step)
        return (f"train: {bad} of {self.schedule.steps} (rows {rows}, ... of the data); the update was skipped. Leave "
                f"such batches out with --set train.on_bad_batch=skip: the same command {kept}. Or lower the learning "
                f"rate (now {rate:.3g}) and start again")

    @torch.no_grad()
    def evaluate(self, step: int) -> float:
        """Held-out loss of the student, in nats per token; every process evaluates its part of the rows.

        All batches have the size of training's, so that torch.compile sees one size.
        """
        world, rank = self.processes.num_processes, self.processes.process_index
        rows = torch.from_numpy(self.held_out_BL)
        n = len(rows)
        # Every process must take part equally often, with full batches: rows repeated for that have no labels.
        per_pass = world * self.micro_batch
        rows = rows[torch.arange(-(-n // per_pass) * per_pass) % n]
        labels = nn.functional.pad(rows[:, 1:], (0, 1), value=NO_LABEL)
        labels[n:] = NO_LABEL
        total = torch.zeros(2, device=self.device)
        alone = Objective(lm=1.0, kl=0.0, clone=0.0)
        for ids, wanted in zip(*(x[rank::world].split(self.micro_batch) for x in (rows, labels)), strict=True):
            count = (wanted != NO_LABEL).sum().to(self.device)
            part = self.clone(ids.to(self.device), wanted.to(self.device), objective=alone)
            total += torch.stack([part.parts["lm"] * count, count])
        if world > 1:
            dist.all_reduce(total)
        loss = (total[0] / total[1]).item()
        self.row({"step": step, "tokens": step * self.schedule.tokens_per_step, "held_out_loss": loss})
        return loss

    def row(self, row: dict[str, float]) -> None:
        if self.is_main:
            with (self.folder / METRICS_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.progress(row)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the tensors of a checkpoint, by their names in it."""
        for name, parameter in self.clone.trainable().items():
            yield f"trained.{name}", parameter
            for key, value in self.optimizer.state[parameter].items():
                yield f"{key}.{name}", value
        if self.objective.compares_activations:
            for name, parameter in self.clone.phase.kept(self.clone).items():
                yield f"kept.{name}", parameter
        yield "guard.average", self.guard.average

    def _save(self, step: int) -> None:
        tensors = processes.gathered(self._tensors(), self.processes)
        if self.is_main:
            facts = {"phase": self.clone.phase.name, "seconds": self.clock.seconds}
            checkpoints.save(self.folder / "checkpoints", step, tensors, facts, self.settings.keep_checkpoints)
        self.processes.wait_for_everyone()

    def _continue_from(self, checkpoint: Path) -> int:
        """Restore every tensor of a checkpoint; return the number of steps that are done."""
        file, facts = checkpoints.load(checkpoint)
        tensor = file.get_tensor
        if facts.get("phase") not in PHASES:
            raise UserError(f"{checkpoint}: another version of lrc-edge wrote this checkpoint; remove {self.folder} "
                            "to start again")
        if facts["phase"] != self.clone.phase.name:
            self.clone.start(PHASES[facts["phase"]])
        if self.objective.compares_activations:
            for name, p in self.clone.phase.kept(self.clone).items():
                p.data.copy_(tensor(f"kept.{name}"))
        processes.shard(self.clone, self.processes)
        self.optimizer = self._new_optimizer()
        for name, parameter in self.clone.trainable().items():
            processes.put(tensor(f"trained.{name}"), parameter)
            state = self.optimizer.state[parameter]
            state["step"] = tensor(f"step.{name}").to(self.device, copy=True)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter.detach())
                processes.put(tensor(f"{key}.{name}"), state[key])
        self.clone.compose_()
        self.guard.average = tensor("guard.average").to(self.device, copy=True)
        self.clock = Clock(facts["seconds"], facts["step"] * self.schedule.tokens_per_step)
        self._forget_metrics(facts["step"])
        return int(facts["step"])

    def _forget_metrics(self, step: int) -> None:
        """Drop the rows after `step`: a killed run logged past its last checkpoint, and logs those steps again."""
        file = self.folder / METRICS_FILE
        if self.is_main and file.exists():
            kept = [row for row in read_metrics(file) if row["step"] <= step]
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept))


def save_trained(clone: Clone, path: Path) -> None:
    """Write the result of the clone's phase, with the lineage in the metadata. Every process must call it."""
    state = processes.join(next(clone.parameters()).device)
    tensors = processes.gathered(clone.phase.result(clone).items(), state)
    if state.is_main_process:
        save_file(tensors | clone.lineage.tensors(), path, metadata=clone.lineage.metadata(clone.phase.holds))


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Return the rows, without an incomplete last line."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


