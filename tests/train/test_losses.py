"""The losses against torch's own functions on whole tensors."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.lineage import Lineage
from lrc_edge.recipe import LOSS_WEIGHTS
from lrc_edge.train import losses
from lrc_edge.train.clone import Clone


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
    objective = losses.Objective(lm=0.7, kl=0.4, temperature=temperature)
    total, (lm, kl) = losses.head_losses(student, head, teacher, teacher_head, labels, objective)
    (3.0 * total).backward()
    got = (student.grad.clone(), head.grad.clone())  # type: ignore[union-attr]
    student.grad = head.grad = None
    logits, target = student @ head.T, teacher @ teacher_head.T
    p = F.softmax(target / temperature, -1)
    whole_kl = (p * (p.log() - F.log_softmax(logits / temperature, -1))).sum(-1)[labels != -100].mean() * temperature**2
    whole_lm = F.cross_entropy(logits, labels)
    (3.0 * (0.7 * whole_lm + 0.4 * whole_kl)).backward()
    assert total.item() == pytest.approx((0.7 * whole_lm + 0.4 * whole_kl).item(), rel=1e-4)
    assert lm.item() == pytest.approx(whole_lm.item(), rel=1e-5)
    assert kl.item() == pytest.approx(whole_kl.item(), rel=1e-4)
    torch.testing.assert_close(got[0], student.grad)
    torch.testing.assert_close(got[1], head.grad)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("chunk", [64, 256])
def test_no_tensor_of_all_tokens_by_vocabulary(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: the largest thing made is one chunk's logits. 2,048 tokens x 5,000 would be 10M."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    student, head, teacher, teacher_head, labels = make(n=2048, v=5000, d=4)
    with LargestTensor() as seen:
        losses.head_losses(student, head, teacher, teacher_head, labels, losses.Objective())[0].backward()
    assert seen.elements == chunk * 5000


def test_the_largest_tensor_of_plain_losses_is_seen() -> None:
    """The negative of the above: what a plain implementation allocates is found."""
    student, head, _, _, labels = make(n=2048, v=5000, d=4)
    with LargestTensor() as seen:
        F.cross_entropy(student @ head.T, labels).backward()
    assert seen.elements == 2048 * 5000


def test_a_whole_training_step_makes_no_logits_of_all_tokens(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
                                                             ) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 32)
    teacher = DenseCheckpoint.open(tiny_llama)
    clone = Clone(teacher.model(), Lineage.of(teacher.shape, teacher.shape.with_hidden_size(32)))
    ids = torch.randint(0, 500, (8, 128), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as seen:
        clone(ids).total.backward()
        clone.pull_back_()
    vocabulary = teacher.shape.vocab_size
    assert 32 * vocabulary <= seen.elements < 8 * 128 * vocabulary / 4


def test_tokens_without_label_count_for_nothing() -> None:
    student, head, teacher, teacher_head, labels = make()
    some = labels != -100
    whole = losses.head_losses(student, head, teacher, teacher_head, labels, losses.Objective())
    part = losses.head_losses(student[some], head, teacher[some], teacher_head, labels[some], losses.Objective())
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_teacher_there_is_no_kl() -> None:
    student, head, _, _, labels = make()
    total, (lm, kl) = losses.head_losses(student, head, None, None, labels, losses.Objective(lm=2.0))
    assert kl.item() == 0 and total.item() == pytest.approx(2 * lm.item())


def test_a_target_of_zeros_counts_nothing() -> None:
    """A layer that writes nothing yet (zero o_proj) has no size to be relative to."""
    mine = torch.ones(2, 4, 3, requires_grad=True)
    for terms in ("relative", "per_token"):
        term = losses.clone_term(mine, torch.zeros(2, 4, 3), terms)
        term.backward()
        assert term == 0 and mine.grad is not None and torch.equal(mine.grad, torch.zeros(2, 4, 3))


@pytest.mark.parametrize("terms", losses.CLONE_ERRORS)
def test_clone_term_is_summed_in_float32(terms: str) -> None:
    ones = torch.ones(2, 50, 1000, dtype=torch.bfloat16)  # bfloat16 cannot count to 1000
    term = losses.clone_term(3 * ones, 2 * ones, terms)
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(1.0 if terms == "absolute" else 0.25, rel=1e-6)


@pytest.mark.parametrize("terms", ["relative", "per_token"])
def test_relative_clone_terms_do_not_depend_on_scale(terms: str) -> None:
    a, b = torch.randn(2, 2, 5, 7)
    torch.testing.assert_close(losses.clone_term(a, b, terms), losses.clone_term(9 * a, 9 * b, terms))


def test_an_attention_sink_rules_the_term_of_a_sequence_but_not_the_terms_of_its_tokens() -> None:
    """The first token of a large model has activations thousands of times larger than those of the other tokens."""
    mine, theirs = torch.randn(2, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    for x in (mine, theirs):
        x[:, 0] *= 1000
    shares = {}
    for terms in ("relative", "per_token"):
        student = mine.clone().requires_grad_(True)
        losses.clone_term(student, theirs, terms).backward()
        assert student.grad is not None
        # The gradient relative to each token's size: what its error weighs.
        weight_L = (student.grad * mine).norm(dim=-1)[0]
        shares[terms] = (weight_L[0] / weight_L.sum()).item()
    assert shares["relative"] > 0.99 and shares["per_token"] < 0.1


def test_a_token_of_almost_no_activation_does_not_rule_the_terms_of_tokens() -> None:
    mine, theirs = torch.randn(2, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    before = losses.clone_term(mine, theirs, "per_token")
    theirs[:, 0] *= 1e-4
    assert losses.clone_term(mine, theirs, "per_token") < 4 * before


@pytest.mark.parametrize("terms", losses.CLONE_ERRORS)
def test_clone_term_keeps_no_float32_copy_for_the_backward_pass(terms: str) -> None:
    kept: list[torch.Tensor] = []
    mine, theirs = (torch.randn(4, 50, 300).bfloat16().requires_grad_(own) for own in (True, False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        losses.clone_term(mine, theirs, terms)
    assert sum(t.nbytes for t in kept) < 1.1 * mine.nbytes


def test_a_row_counts_the_same_whatever_rows_are_beside_it() -> None:
    """One row of a teacher a hundred times as loud as the other's must not drown it."""
    mine, theirs = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    theirs[1] *= 100
    for terms in losses.CLONE_ERRORS:
        apart = [losses.clone_term(mine[i:i + 1], theirs[i:i + 1], terms) for i in (0, 1)]
        torch.testing.assert_close(losses.clone_term(mine, theirs, terms), sum(apart) / 2)


def test_the_recipe_knows_the_weights_of_every_term() -> None:
    for phase, names in LOSS_WEIGHTS.items():
        assert sorted(names) == sorted(term.settings[phase] for term in losses.TERMS.values())
