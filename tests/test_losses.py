"""The losses against torch's own functions on whole tensors."""
from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lrc_edge.train import losses


def make(n: int = 50, v: int = 37, d: int = 8) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    student = torch.randn(n, d, generator=g).requires_grad_()
    head = torch.randn(v, d, generator=g).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g)
    labels[::7] = -100
    return student, head, torch.randn(n, 2 * d, generator=g), torch.randn(v, 2 * d, generator=g), labels


@pytest.mark.parametrize("temperature", [1.0, 2.0, 40.0])
@pytest.mark.parametrize("chunk", [7, 50, 2048])
def test_chunked_losses_and_gradients_equal_whole_ones(temperature: float, chunk: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    student, head, teacher, teacher_head, labels = make()
    lm, kl = losses.head_losses(student, head, teacher, teacher_head, labels, temperature)
    (lm + kl).backward()
    got = (student.grad.clone(), head.grad.clone())  # type: ignore[union-attr]
    student.grad = head.grad = None
    logits, target = student @ head.T, teacher @ teacher_head.T
    p = F.softmax(target / temperature, -1)
    whole_kl = (p * (p.log() - F.log_softmax(logits / temperature, -1))).sum(-1).mean() * temperature**2
    whole_lm = F.cross_entropy(logits, labels)
    (whole_lm + whole_kl).backward()
    assert lm.item() == pytest.approx(whole_lm.item(), rel=1e-5)
    assert kl.item() == pytest.approx(whole_kl.item(), rel=1e-4)
    torch.testing.assert_close(got[0], student.grad)
    torch.testing.assert_close(got[1], head.grad)


def test_kl_of_equal_logits_is_zero_and_of_others_is_not() -> None:
    logits = torch.randn(5, 9)
    assert losses.kl_divergence(logits, logits, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.kl_divergence(logits, logits.flip(-1), 1.0).item() > 0.1


def test_mse_is_the_mean_in_float32() -> None:
    assert losses.mse(torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.zeros(2)).item() == 5.0
