"""Several processes, as torchrun or `accelerate launch` start them: accelerate joins them, FSDP2 shards the clone."""
from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lrc_edge.train.clone import Clone

T = TypeVar("T")

# The first process tokenizes while the others wait, and that can take a day.
TIMEOUT = timedelta(days=2)
# While all train, a process waits for another to compile, or for the first to write a checkpoint (50 GB for edge-4b).
STEP_TIMEOUT = timedelta(minutes=30)


def join(device: torch.device) -> PartialState:
    """Join all processes that train together (only this one, unless a launcher started several); return its state.

    Later calls return the same state.
    """
    joined = bool(PartialState._shared_state)
    state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    if state.num_processes > 1 and not joined:
        atexit.register(state.destroy_process_group)  # left open, its threads abort the exit now and then
    return state


@contextmanager
def in_step(device: torch.device) -> Iterator[PartialState]:
    """Wait for all processes; then, while the block runs, end them if a collective takes longer than STEP_TIMEOUT."""
    state = join(device)
    state.wait_for_everyone()
    if state.num_processes == 1:
        yield state
        return
    _set_pg_timeout(STEP_TIMEOUT)
    try:
        yield state
    finally:
        _set_pg_timeout(TIMEOUT)


def leave(state: PartialState) -> None:
    """End this process once all have called this. There is no teardown: threads of the collectives library sometimes
    abort a process after all work is done, and the launcher would report a failed run."""
    if state.num_processes > 1:
        state.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def shard(clone: Clone, state: PartialState) -> None:
    """Shard every parameter over the processes. Rank 0's values are used. Does nothing for one process."""
    if state.num_processes == 1:
        return
    for parameter in clone.parameters():
        dist.broadcast(parameter.data, 0)
    shard_over(clone, init_device_mesh(state.device.type, (state.num_processes,)))


def shard_over(clone: Clone, mesh: DeviceMesh) -> None:
    """Apply FSDP2: one unit per pair of layers, one for embedding and LM head, one each for the trained tensors and
    for the teacher's matrices that no forward pass reads."""
    # The residual stream stays float32, as in one process.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False) \
        if clone.compute_dtype == torch.bfloat16 else MixedPrecisionPolicy()
    for pair in clone.pairs:
        fully_shard(pair, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for tensors in (clone.unread, clone.mapped):
        if len(tensors):
            fully_shard(tensors, mesh=mesh)
    # Embedding and LM head are gathered in float32, so that their gradients add up in it, as in one process. Resharded
    # after the forward pass, too: compose_ writes into the shards, and gathered copies would stay old.
    fully_shard(clone, mesh=mesh, reshard_after_forward=True)
    clone.bind()


def reduce_gradients(clone: Clone, reduce: bool) -> None:
    """Decide whether the next backward pass reduces gradients over the processes. If not, each process adds its own up
    in float32 until a later pass reduces them."""
    if isinstance(clone, FSDPModule):
        clone.set_requires_gradient_sync(reduce)


def gathered(tensors: Iterable[tuple[str, torch.Tensor]], state: PartialState) -> dict[str, torch.Tensor]:
    """Gather shards to complete tensors, by name: float32 on the CPU of rank 0, nothing on the other ranks. Every rank
    must call it with the same names in the same order."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if state.is_main_process:
            found[name] = full.detach().float().cpu().contiguous()
    return found


def agreed(value: T, state: PartialState) -> T:
    """Return rank 0's `value` on all ranks, because a shared file system may show each rank a different state."""
    if state.num_processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=state.device)
    return box[0]


def put(values: torch.Tensor, into: torch.Tensor) -> None:
    """Copy a complete tensor into a parameter or a shard of one."""
    if isinstance(into, DTensor):
        values = distribute_tensor(values.to(into.device, into.dtype), into.device_mesh, into.placements,
                                   src_data_rank=None)
    into.data.copy_(values)
