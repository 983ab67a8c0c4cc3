"""The clone: composed weights, their gradients, the seven terms, initial values."""
from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from starts import gaussian_values, identity_values, start_of
from tiny_models import make_tiny
from torch.func import functional_call
from torch.nn import functional as F
from transformers import MistralConfig, PreTrainedModel

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.families import family_of
from lrc_edge.lineage import Lineage, compose
from lrc_edge.recipe import load_recipe
from lrc_edge.train.clone import Clone
from lrc_edge.train.losses import ACTIVATION_TERMS, CLONE_ERRORS, TERMS, Objective
from lrc_edge.train.masks import attention_masks
from lrc_edge.train.phases import DENSE, PHASES
from lrc_edge.train.start.build import Choices


def make_clone(path: Path, hidden_size: int, recompute: bool = False, **options: object) -> Clone:
    teacher = DenseCheckpoint.open(make_tiny(path, **options))  # type: ignore[arg-type]
    lineage = Lineage.of(teacher.shape, teacher.shape.with_hidden_size(hidden_size))
    return Clone(teacher.model(), lineage, recompute=recompute)


def some_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 500, (2, 33), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_full_width_identity_has_no_loss_but_the_teachers(name: str, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "t", 64, **FAMILIES[name])
    clone.initialize(identity_values(clone))
    losses = clone(some_ids())
    logits = clone.teacher(some_ids()).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), some_ids()[:, 1:].flatten())
    assert losses.parts["clone"].item() < 1e-8 and losses.parts["kl"].item() < 1e-8
    assert losses.parts["lm"].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("clone_terms", CLONE_ERRORS)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2-untied", "qwen3-tied", "mistral-untied"])
def test_losses_are_those_of_two_plain_forward_passes(name: str, clone_terms: str, tmp_path: Path) -> None:
    """Hooks on transformers' own whole-model forward passes give the same LM, KL and clone losses."""
    clone = make_clone(tmp_path / "t", 32, **FAMILIES[name])
    clone.initialize(gaussian_values(clone, seed=1))
    ids, temperature = some_ids(), 2.0
    roles = family_of(clone.lineage.student.family).matrices
    taken: list[dict[str, torch.Tensor]] = []
    for model in (clone.teacher, clone.student):
        found: dict[str, torch.Tensor] = {}
        for module_name, module in model.named_modules():
            if module_name.endswith(tuple(role.module for role in roles)):
                module.register_forward_hook(lambda m, i, o, n=module_name, f=found: f.__setitem__(n, o.detach()))
        found["logits"] = model(ids).logits.detach()
        taken.append(found)
    of_teacher, of_student = taken
    terms = []
    for key in of_teacher.keys() - {"logits"}:
        target = of_teacher[key]
        if key.endswith(tuple(role.module for role in roles if role.writes_stream)):
            target = target @ clone.trainable()[f"{key}.weight"].detach()
        size = target.square().mean(-1)  # of each token
        scale = {"absolute": torch.ones(()), "relative": size.mean(1, keepdim=True),
                 "per_token": size.maximum(0.01 * size.median(1, keepdim=True).values)}[clone_terms]
        terms.append(((of_student[key] - target).square().mean(-1) / scale).mean())
    p, q = (F.log_softmax(side["logits"] / temperature, -1) for side in taken)
    objective = Objective(lm=0.5, kl=0.7, clone=0.3, temperature=temperature, clone_terms=clone_terms)
    losses = clone(ids, objective=objective)
    assert len(terms) == 7 * clone.lineage.student.num_hidden_layers
    assert losses.parts["clone"].item() == pytest.approx(sum(terms).item(), rel=1e-4)  # type: ignore[union-attr]
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1].mean().item() * temperature**2  # the last position predicts nothing here
    assert losses.parts["kl"].item() == pytest.approx(kl, rel=1e-3)
    lm = F.cross_entropy(of_student["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert losses.parts["lm"].item() == pytest.approx(lm.item(), rel=1e-4)
    whole = sum(weight * losses.parts[name] for name, weight in (("lm", 0.5), ("kl", 0.7), ("clone", 0.3)))
    assert losses.total.item() == pytest.approx(whole.item(), rel=1e-5)


def test_terms_go_through_the_lineage(tmp_path: Path) -> None:
    """Each activation is compared with that of its own layer, after its block map; the last one of a layer also stands
    for the layers that were left out."""
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "t", layers=4, **FAMILIES["qwen2-untied"]))
    choices = Choices(layers=lambda *_: (0, 3), refits=False)
    start = start_of(teacher, some_ids(), "projections", choices, num_hidden_layers=2, hidden_size=32,
                     intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    clone, lineage, ids = start.clone(teacher.model()), start.lineage, some_ids()
    roles = family_of(lineage.student.family).matrices
    of_teacher, of_student = (outputs_of(model, [role.module for role in roles] + ["post_attention_layernorm"], ids)
                              for model in (clone.teacher, clone.student))
    streams = clone.teacher(ids, output_hidden_states=True).hidden_states
    expected = 0.0
    for layer, own in enumerate(lineage.layers):
        for role in roles:
            target = of_teacher[f"model.layers.{own}.{role.module}"]
            if role.name == "ffn_down" and layer == 0:
                target = streams[3] - (streams[1] - target)  # the stream before layer 3, without what layer 0 read
            if role.writes_stream:
                target = target @ clone.trainable()[f"model.layers.{layer}.{role.module}.weight"].detach()
            elif role.axes[0] in lineage.maps:
                target = lineage.maps[role.axes[0]][layer].apply(target)
            expected += CLONE_ERRORS["relative"](of_student[f"model.layers.{layer}.{role.module}"], target).item()
    assert clone(ids).parts["clone"].item() == pytest.approx(expected, rel=1e-4)


def outputs_of(model: PreTrainedModel, modules: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = [module.register_forward_hook(lambda m, i, o, n=name: found.__setitem__(n, o.detach()))
               for name, module in model.named_modules() if name.endswith(tuple(modules))]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "qwen2-untied", "qwen3-tied"])
def test_pulled_back_gradients_equal_autograd_through_the_composition(name: str, tmp_path: Path) -> None:
    """Two micro-batches, composed once: the same gradients as autograd through W = f(P) in every forward pass."""
    clone = make_clone(tmp_path / "t", 32, **FAMILIES[name])
    clone.initialize(gaussian_values(clone, seed=1))
    batches = [some_ids(1), some_ids(2)]
    for ids in batches:
        clone(ids).total.backward()
    clone.pull_back_()
    got = {name: p.grad.clone() for name, p in clone.trainable().items() if p.grad is not None}
    assert all(weight.grad is None for _, weight in clone.composed())
    clone.zero_grad(set_to_none=True)

    trained = clone.trainable()
    registered = {id(p): key for key, p in clone.named_parameters()}
    composed = {registered[id(matrix)]: compose(w.role, clone.teacher_weights[w.name], trained[w.name])
                for w, matrix in clone.composed()}
    for ids in batches:
        functional_call(clone, composed, (ids,)).total.backward(retain_graph=True)
    assert got.keys() == trained.keys()
    for name_, p in trained.items():
        assert p.grad is not None
        assert (got[name_] - p.grad).norm() <= 1e-6 * p.grad.norm(), name_


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-untied", "qwen3-tied"])
def test_dense_phase_starts_at_the_composed_weights_and_trains_all_weights(name: str, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "t", 32, **FAMILIES[name])
    clone.initialize(start_of(DenseCheckpoint.open(tmp_path / "t"), some_ids(), hidden_size=32).tensors)
    before = clone(some_ids())
    clone.start(DENSE)
    losses = clone(some_ids())
    torch.testing.assert_close(losses.total, before.total)
    torch.testing.assert_close(losses.parts, before.parts)
    losses.total.backward()
    clone.pull_back_()
    assert all(p.grad is not None for p in clone.trainable().values())
    assert {name: tuple(p.shape) for name, p in clone.trainable().items()} == {w.name: w.shape for w in clone.weights}
    assert len(clone.unread) == 0 and all(p.grad is None for p in clone.writers().values())


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_activation_is_kept_for_the_clone_loss_after_its_use(recompute: bool, alpha: float, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "t", 32, recompute)
    clone.initialize(start_of(DenseCheckpoint.open(tmp_path / "t"), some_ids(), hidden_size=32).tensors)
    taps = [tap for pair in clone.layer_pairs() for tap in (pair.teacher_tap, pair.student_tap)]
    assert not any(tap.outputs for tap in taps)
    loss = clone(some_ids(), objective=Objective(clone=alpha)).total
    assert not any(tap.outputs for tap in taps)
    loss.backward()  # runs the student's layers again if they are recomputed
    assert not any(tap.outputs for tap in taps)
    clone.teacher(some_ids()), clone.student(some_ids())
    assert not any(tap.outputs for tap in taps)


def test_a_compiled_pair_of_layers_returns_its_three_results_and_nothing_else(tmp_path: Path) -> None:
    """Outputs of a graph that nothing reads cost memory, and time in the backward pass."""
    n_outputs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        n_outputs.append(len(graph.graph.output_node().args[0]))  # type: ignore[arg-type]
        return graph.forward

    torch._dynamo.reset()
    clone = make_clone(tmp_path / "t", 32)
    clone.initialize(gaussian_values(clone, seed=1))
    expected = clone(some_ids()).total
    for pair in clone.layer_pairs():
        pair.compile(backend=counting, fullgraph=True)
    torch.testing.assert_close(clone(some_ids()).total, expected)
    assert set(n_outputs) == {3}


def test_layers_with_the_same_window_share_a_mask() -> None:
    config = MistralConfig(num_hidden_layers=3, sliding_window=8)
    first, *others = attention_masks(config, some_ids(), None)
    assert first is not None and first.shape == (1, 1, 33, 33) and len(others) == 2
    assert all(mask is first for mask in others)
    assert first[0, 0].sum(1).tolist() == [min(i + 1, 8) for i in range(33)]


def test_recomputing_layers_changes_no_gradient(tmp_path: Path) -> None:
    grads = []
    for recompute in (False, True):
        clone = make_clone(tmp_path / str(recompute), 32, recompute)
        clone.initialize(gaussian_values(clone, seed=1))
        clone(some_ids()).total.backward()
        clone.pull_back_()
        grads.append({name: p.grad for name, p in clone.trainable().items()})
    for name, grad in grads[0].items():
        assert grad is not None and torch.equal(grad, grads[1][name])  # type: ignore[arg-type]


@pytest.mark.parametrize("clone_terms", CLONE_ERRORS)
def test_forward_passes_of_one_row_or_of_four_give_the_same_gradients(clone_terms: str, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "t", 32)
    clone.initialize(gaussian_values(clone, seed=1))
    ids = torch.cat([some_ids(), torch.full((1, 33), 7), some_ids(1)[:1]])  # rows that are unlike
    objective, n_labels = Objective(clone=0.5, clone_terms=clone_terms), torch.tensor(4 * 32)
    grads = []
    for size in (4, 1):
        for part in ids.split(size):
            clone(part, objective=objective, n_labels=n_labels, share=size / 4).total.backward()
        clone.pull_back_()
        grads.append({name: p.grad.clone() for name, p in clone.trainable().items() if p.grad is not None})
        clone.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys() == clone.trainable().keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("window", [None, 8])
def test_isolated_documents_are_read_as_if_alone(window: int | None, tmp_path: Path) -> None:
    """Rows of several documents give the losses of the documents in rows of their own."""
    options = {"sliding_window": window, "family": "mistral", "tied": False, "tokenizer": "spm"} if window else {}
    clone = make_clone(tmp_path / "t", 32, **options)
    clone.initialize(gaussian_values(clone, seed=1))
    ids = some_ids()[:1]
    cuts = [0, 5, 20, 33]
    documents = torch.bucketize(torch.arange(33), torch.tensor(cuts[1:]), right=True)[None]
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[0, [4, 19]] = -100  # the last token of a document predicts nothing
    absolute = Objective(clone_terms="absolute")  # a relative term would be a ratio of sums
    together = clone(ids, labels, documents, objective=absolute)
    alone = [clone(ids[:, a:b], objective=absolute) for a, b in pairwise(cuts)]
    lengths = [b - a for a, b in pairwise(cuts)]
    weights = [n - 1 for n in lengths]
    for term, parts in (("lm", weights), ("kl", weights), ("clone", lengths)):
        expected = sum(a.parts[term] * n for a, n in zip(alone, parts, strict=True)) / sum(parts)
        torch.testing.assert_close(together.parts[term], expected, rtol=1e-4, atol=1e-5)
    across = clone(ids, labels)
    assert abs(across.parts["lm"] - together.parts["lm"]) > 1e-3  # attention across documents is something else


def test_sliding_window_is_kept(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "t", 64, family="mistral", tied=False, tokenizer="spm", sliding_window=8)
    clone.initialize(identity_values(clone))
    losses = clone(some_ids())
    logits = clone.teacher(some_ids()).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), some_ids()[:, 1:].flatten())
    assert losses.parts["lm"].item() == pytest.approx(expected.item(), abs=1e-4)


def test_every_phase_has_a_weight_for_every_term() -> None:
    assert all(term.settings.keys() == PHASES.keys() for term in TERMS.values())
    train = load_recipe(None, ["train.alpha=0.3", "train.dense_alpha=0.4", "train.kl_weight=0.5"]).train
    assert [Objective.of(train, phase).clone for phase in PHASES] == [0.3, 0.4, 0.4]
    assert Objective.of(train, "dense") == Objective(lm=1.0, kl=0.5, clone=0.4)
    assert not Objective(clone=0.0).compares_activations and Objective(lm=0.0, kl=0.0).compares_activations
    assert list(ACTIVATION_TERMS) == ["clone"] and not Objective(kl=0.0, clone=0.0).needs_teacher


def test_initialize_refuses_other_names(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "t", 32)
    with pytest.raises(ValueError, match="names differ"):
        clone.initialize({"x": torch.zeros(1)})
