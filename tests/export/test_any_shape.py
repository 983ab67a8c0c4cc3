"""Students of other shapes, each axis alone and all together: fold, GGUF and ONNX have the logits of the clone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from starts import start_of
from test_to_gguf import exported, kl_and_top1, torch_logits
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.fold import fold
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.lineage import Holds
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime
from lrc_edge.train.loop.stage import load_trained
from lrc_edge.train.loop.trainer import save_trained
from lrc_edge.train.start.build import Choices

# Of a teacher that is 64 wide, with 3 layers, 96 neurons, 4 query heads and 2 key/value heads of 24.
CUTS: dict[str, dict[str, int]] = {
    "width": dict(hidden_size=32), "layers": dict(num_hidden_layers=2), "neurons": dict(intermediate_size=64),
    "query heads": dict(num_attention_heads=2), "key/value heads": dict(num_key_value_heads=1, num_attention_heads=2),
    "all": dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
                num_key_value_heads=1)}


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(0))


def folded(teacher: DenseCheckpoint, holds: Holds, sizes: dict[str, int], folder: Path) -> tuple[DenseCheckpoint, Any]:
    """The student's checkpoint, and the clone that its trained file makes."""
    start = start_of(teacher, ids_of(2, 40), holds, **sizes)
    save_trained(start.clone(teacher.model()), folder / "trained.safetensors")
    student = fold(teacher, folder / "trained.safetensors", folder / "student", {"name": "tiny", "teacher": "t"})
    return student, load_trained(teacher, folder / "trained.safetensors")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_fold_gguf_and_onnx_have_the_clones_logits(name: str, cut: str, tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "teacher", layers=3, **FAMILIES[name]))
    # Both kinds of trained files fold: weights after the dense phase, projections before it.
    holds: Holds = "projections" if cut in ("width", "all") else "weights"
    student, clone = folded(teacher, holds, CUTS[cut], tmp_path)
    assert {field: getattr(student.shape, field) for field in CUTS[cut]} == CUTS[cut]
    ids = ids_of(1, 40)[0].numpy()
    reference = torch_logits(student, ids)
    with torch.no_grad():
        expected = clone.student(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(reference, expected, rtol=0, atol=1e-4)
    with LlamaCpp(exported(student, tmp_path), n_ctx=64, threads=1) as runtime:
        kl, top1 = kl_and_top1(reference, runtime.prefill(ids))
    assert kl <= 1e-6 and top1 == 1
    [artifact] = export_onnx(student, tmp_path / "onnx", ["fp32"])
    kl, top1 = kl_and_top1(reference, OnnxRuntime(tmp_path / artifact.path).decode(ids))
    assert kl <= 1e-8 and top1 == 1


@pytest.mark.parametrize("layers", [3, 4])
def test_kinds_of_attention_follow_their_layers(layers: int, tmp_path: Path) -> None:
    """The student's second layer is a later one of the teacher, with a window that the teacher's second has not."""
    teacher = DenseCheckpoint.open(make_tiny(
        tmp_path / "teacher", family="qwen2", tied=True, tokenizer="qwen2", layers=layers, use_sliding_window=True,
        sliding_window=5, max_window_layers=layers - 1))
    choices = Choices(layers=lambda *_: (0, layers - 1))
    start = start_of(teacher, ids_of(2, 40), "weights", choices, num_hidden_layers=2)
    save_trained(start.clone(teacher.model()), tmp_path / "trained.safetensors")
    student = fold(teacher, tmp_path / "trained.safetensors", tmp_path / "student", {"name": "tiny", "teacher": "t"})
    clone = load_trained(teacher, tmp_path / "trained.safetensors")
    ids = ids_of(1, 40)
    with torch.no_grad():
        logits = student.model()(ids).logits
        torch.testing.assert_close(logits, clone.student(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(clone(ids).parts["lm"], torch.nn.functional.cross_entropy(
            logits[0, :-1], ids[0, 1:]), rtol=0, atol=1e-4)
    kinds = student.check_config().layer_types
    assert kinds == ["full_attention", "sliding_attention"]
