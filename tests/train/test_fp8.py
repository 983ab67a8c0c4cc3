"""The teacher's linears in fp8: the rounding, the products, what the losses see of it, what is refused."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from starts import start_of
from tiny_models import make_tiny, tiny_data
from torch import nn
from train_runs import run

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.train import fp8
from lrc_edge.train.losses import Objective

CPU = torch.device("cpu")


def some_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (5, 48))
    x[1] *= 1e-3  # a row of its own scale
    x[2] = 0
    return x, weight


def test_rows_are_rounded_to_three_bits_of_their_own_scale() -> None:
    x, _ = some_matrices()
    rows, scale = fp8.in_rows(x)
    rounded = rows.float() * scale
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    assert torch.equal(rows.float().abs().amax(1), torch.tensor([448.0, 448.0, 0.0, 448.0, 448.0]))
    large = x.abs() > x.abs().amax(1, keepdim=True) / 1000  # smaller ones are subnormal
    assert ((rounded - x).abs() <= x.abs() / 16 + 1e-12)[large].all()
    assert 0.01 < (rounded - x).norm() / x.norm() < 0.04


def test_the_product_is_that_of_the_rounded_rows() -> None:
    x, weight = some_matrices()
    a, b = (rows.double() * scale for rows, scale in map(fp8.in_rows, (x, weight)))
    got = fp8.multiplied_by_cpu(x, weight)
    torch.testing.assert_close(got, (a @ b.T).float(), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8.multiplied_by_cpu(x, weight), got)


def test_the_gpus_instruction_gets_its_operands_as_the_cpu_does() -> None:
    """torch has this instruction for CPUs, too, from some version on."""
    x, weight = (matrix.bfloat16() for matrix in some_matrices())
    try:
        got = fp8.multiplied_by_gpu(x, weight)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} cannot on a CPU: {str(error).splitlines()[0]:.80}")
    torch.testing.assert_close(got, fp8.multiplied_by_cpu(x, weight), rtol=1e-2, atol=1e-3)


def test_a_clone_of_a_teacher_in_fp8(tiny_llama: Path) -> None:
    teacher = DenseCheckpoint.open(tiny_llama)
    ids = torch.randint(0, 500, (2, 33), generator=torch.Generator().manual_seed(0))
    clone = start_of(teacher, ids, hidden_size=32).clone(teacher.model())
    before, names = clone(ids), set(clone.teacher_weights)
    weights = {name: weight.clone() for name, weight in clone.teacher_weights.items()}
    fp8.multiply_in_fp8_(clone.teacher_parts.layers, CPU)
    after = clone(ids)
    for name in ("kl", "clone"):
        assert 0 < abs(after.parts[name] - before.parts[name]) < 0.05 * before.parts[name], name
    assert torch.equal(after.parts["lm"], before.parts["lm"]), "the student is not rounded"
    clone.bind()
    assert set(clone.teacher_weights) == names
    assert all(torch.equal(weight, clone.teacher_weights[name]) for name, weight in weights.items())
    after.total.backward()
    assert all(p.grad is None for p in clone.teacher_weights.values())
    alone = Objective(kl=0.0, clone=0.0)
    assert torch.isfinite(clone(ids, objective=alone).total)


def test_a_run_with_a_teacher_in_fp8(tiny_llama: Path, tmp_path: Path) -> None:
    data = tiny_data(tiny_llama, tmp_path)
    plain, rounded = (run(tiny_llama, data, tmp_path / name, "train.tokens=1280", "train.precision=fp32",
                          f"train.teacher_precision={name}")[-1]["held_out_loss"] for name in ("auto", "fp8"))
    assert 0 < abs(plain - rounded) < 0.02


def test_hardware_that_cannot_or_does_it_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on other devices\n  at ...")

    for product, problem in ((cannot, "torch._scaled_mm is only supported on other devices"),
                             (lambda x, weight: x @ weight.T * 1.02, "its product is off by [2-4]")):
        monkeypatch.setitem(fp8.PRODUCTS, "cpu", product)
        with pytest.raises(UserError, match=rf"cpu cannot multiply e4m3 with a scale per row \({problem}.*=auto"):
            fp8.multiply_in_fp8_([nn.Linear(16, 16)], CPU)


def test_a_weight_that_the_instruction_cannot_read_is_named(tmp_path: Path) -> None:
    model = DenseCheckpoint.open(make_tiny(tmp_path / "t", intermediate_size=100)).model()
    with pytest.raises(UserError, match=r"the teacher's mlp.gate_proj is 64 -> 100; need multiples of 16; use --set"):
        fp8.multiply_in_fp8_(model.model.layers, CPU)
