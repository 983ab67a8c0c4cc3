"""Starts in closed form: each axis against an independent computation, the identity of full sizes, refusals."""
from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from families import FAMILIES
from starts import plain, start_of
from test_losses import LargestTensor
from tiny_models import make_tiny, tiny_data
from transformers import PreTrainedModel

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.families import weights_of
from lrc_edge.lineage import Holds
from lrc_edge.recipe import Train, load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.clone import config_of
from lrc_edge.train.losses import Objective
from lrc_edge.train.start.build import Choices, Start, build_start, cut_first
from lrc_edge.train.start.heads import grouping
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.refit import RIDGE, LeastSquares
from lrc_edge.train.start.stage import load_start, make_start, save_start
from lrc_edge.train.start.streams import Streams
from lrc_edge.train.start.width import INITS

SEED = int(os.environ.get("TEST_SEED", "0"))


def some_ids(rows: int = 4, length: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(seed))


def teacher_of(path: Path, **options: object) -> DenseCheckpoint:
    return DenseCheckpoint.open(make_tiny(path, **options))  # type: ignore[arg-type]


def kl_of(teacher: DenseCheckpoint, start: Start, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return start.clone(teacher.model())(ids, objective=Objective(clone=0.0)).parts["kl"].item()


@pytest.mark.parametrize("holds", get_args(Holds))
@pytest.mark.parametrize("name", FAMILIES)
def test_full_sizes_are_the_teacher(name: str, holds: Holds, tmp_path: Path) -> None:
    """With or without the refit, which has nothing to correct."""
    teacher = teacher_of(tmp_path / "t", **FAMILIES[name])
    start = start_of(teacher, some_ids(), holds)
    clone = start.clone(teacher.model())
    with torch.no_grad():
        torch.testing.assert_close(clone.student(some_ids()).logits, clone.teacher(some_ids()).logits,
                                   rtol=1e-4, atol=1e-4)
    assert start.kl < 1e-6 and start.lineage.layers == (0, 1) and not start.lineage.maps


# Sizes of the student of make_tiny's teacher: 64 wide, 2 layers, FFN 96, 4 query heads, 2 key/value heads of 24.
CUTS = {
    "width": dict(hidden_size=32), "layers": dict(num_hidden_layers=1), "neurons": dict(intermediate_size=64),
    "query heads": dict(num_attention_heads=2), "key/value heads": dict(num_key_value_heads=1),
    "all": dict(hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
                num_key_value_heads=1)}


@pytest.mark.parametrize("holds", get_args(Holds))
@pytest.mark.parametrize("cut", CUTS)
def test_the_figures_of_a_start_are_those_of_its_clone(cut: str, holds: Holds, tmp_path: Path) -> None:
    """Computed layer by layer, the student is the one that the clone runs: transformers' whole model."""
    teacher = teacher_of(tmp_path / "t", family="qwen2", tied=False, tokenizer="qwen2")
    start = start_of(teacher, some_ids(), holds, **CUTS[cut])
    clone = start.clone(teacher.model())
    with torch.no_grad():
        parts = clone(some_ids()).parts
    assert start.kl == pytest.approx(parts["kl"].item(), rel=1e-3)
    assert start.loss == pytest.approx(parts["lm"].item(), rel=1e-4)
    assert tuple(clone.student.config.num_hidden_layers for _ in "x") == (start.lineage.student.num_hidden_layers,)


def test_query_heads_that_do_not_divide_the_teachers_width(tmp_path: Path) -> None:
    """transformers' llama refuses 64 channels for 3 query heads, but the student has 48: both are cut together."""
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True)
    start = start_of(teacher, some_ids(), "weights", hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
                     num_hidden_layers=1)
    with torch.no_grad():
        parts = start.clone(teacher.model())(some_ids()).parts
    assert start.kl == pytest.approx(parts["kl"].item(), rel=1e-3)
    assert start.lineage.student.num_attention_heads == 3


@pytest.mark.parametrize("cut", CUTS)
def test_a_refit_starts_nearer(cut: str, tmp_path: Path) -> None:
    """After cuts of layers, neurons and query heads; key/value heads and width are not refitted."""
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True)
    refitted, not_refitted = (start_of(teacher, some_ids(8), "weights", choices, **CUTS[cut])
                              for choices in (Choices(), plain()))
    if cut in ("layers", "neurons", "query heads", "all"):
        assert refitted.kl < not_refitted.kl
    else:
        assert refitted.kl == not_refitted.kl


@pytest.mark.parametrize(("family", "sizes", "first"), [
    ("llama", {"num_attention_heads": 4}, 4),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, 4),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2}, 8),  # 6 heads do not divide among 4 groups
    ("qwen3", {"num_attention_heads": 4}, 4),
    ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2}, 8)])  # groups go with their query heads
def test_query_heads_are_cut_first_where_they_can_be(family: str, sizes: dict[str, int], first: int) -> None:
    teacher = ModelShape(family, 64, 128, 256, 3, 8, 4, 16, 64, True)
    student = teacher.resized({**sizes, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 128})
    assert cut_first(teacher, student) == teacher.resized({
        "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": first})


def test_a_width_that_transformers_refuses_is_not_built_on_the_way(tmp_path: Path) -> None:
    """It would with the student's query heads, which divide the student's width but not the teacher's."""
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True, hidden_size=64, heads=4, kv_heads=1)
    sizes = {"num_attention_heads": 3, "hidden_size": 48, "num_hidden_layers": 2}
    assert cut_first(teacher.shape, teacher.shape.resized(sizes)).num_attention_heads == 4
    start = start_of(teacher, some_ids(), "weights", **sizes)
    assert start.lineage.student.num_attention_heads == 3 and start.kl > 0


def test_least_squares_are_those_of_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(SEED)
    x, y, w0 = (torch.randn(*size, generator=generator) for size in ((50, 6), (50, 3), (3, 6)))
    squares = LeastSquares()
    for rows in torch.arange(50).split(7):
        squares.add(x[rows], (y - x @ w0.T)[rows])
    strength = RIDGE * (x.T @ x).diagonal().mean()
    # The ridge as more rows of data: sqrt(lambda) (W - W_0) should be 0.
    design = torch.cat([x, strength.sqrt() * torch.eye(6)])
    wanted = torch.cat([y, strength.sqrt() * w0.T])
    torch.testing.assert_close(w0 + squares.change(), torch.linalg.lstsq(design, wanted).solution.T,
                               rtol=1e-4, atol=1e-4)


def test_inputs_that_are_always_0_leave_a_matrix_as_it_is() -> None:
    squares = LeastSquares()
    squares.add(torch.zeros(4, 3), torch.ones(4, 2))
    assert torch.equal(squares.change(), torch.zeros(2, 3))


def with_multiples(teacher: DenseCheckpoint, path: Path) -> DenseCheckpoint:
    """A teacher whose second group of each layer has the first group's keys, each pair of coordinates times a complex
    number, and the first group's values in another basis."""
    model, half, width = teacher.model(), 12, 24
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for layer in model.model.layers:
            k, v = layer.self_attn.k_proj, layer.self_attn.v_proj
            factor = torch.complex(*torch.randn(2, half, generator=generator))
            mixed = torch.randn(width, width, generator=generator)
            for tensor in (k.weight, k.bias):
                first = torch.complex(tensor[:half], tensor[half:width])
                other = factor.reshape(-1, *[1] * (tensor.ndim - 1)) * first
                tensor[width:] = torch.cat([other.real, other.imag])
            for tensor in (v.weight, v.bias):
                tensor[width:] = mixed @ tensor[:width]
    model.save_pretrained(path)
    for file in teacher.path.iterdir():
        if not (path / file.name).exists():
            (path / file.name).write_bytes(file.read_bytes())
    return DenseCheckpoint.open(path)


@pytest.mark.parametrize("rope", [None, FAMILIES["llama-llama3-rope"]["rope_scaling"]])
def test_groups_that_are_multiples_of_each_other_merge_without_loss(rope: object, tmp_path: Path) -> None:
    """Also with biases and scaled RoPE. Means of the same heads lose much."""
    teacher = teacher_of(tmp_path / "t", family="qwen2", tied=True, tokenizer="qwen2", rope_scaling=rope)
    teacher = with_multiples(teacher, tmp_path / "multiples")
    start = start_of(teacher, some_ids(), "weights", plain(), num_key_value_heads=1)
    clone = start.clone(teacher.model())
    with torch.no_grad():
        torch.testing.assert_close(clone.student(some_ids(seed=1)).logits, clone.teacher(some_ids(seed=1)).logits,
                                   rtol=1e-3, atol=1e-3)
    assert start.kl < 1e-6
    other = start_of(teacher_of(tmp_path / "other", family="qwen2", tied=True, tokenizer="qwen2"), some_ids(),
                     "weights", plain(), num_key_value_heads=1)
    assert other.kl > 100 * max(start.kl, 1e-9)


def test_the_best_groups_are_found() -> None:
    """Pairs of equal parity cost nothing: neighbours must be exchanged."""
    costs = {(a, b): float(a % 2 != b % 2) for a, b in combinations(range(8), 2)}
    assert grouping(costs, 8, 4) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grouping(costs, 8, 2) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert grouping(dict.fromkeys(costs, 0.0), 6, 2) == [(0, 1, 2), (3, 4, 5)]
    assert grouping({}, 3, 1) == [(0, 1, 2)]


# The weight of layer 1, or of the model, that is 0, and which of its rows or columns.
DEAD = {"embedding of a token": ("model.embed_tokens.weight", (slice(3, 9), slice(None))),
        "attention's output": ("model.layers.1.self_attn.o_proj.weight", (slice(None), slice(None))),
        "one group's output": ("model.layers.1.self_attn.o_proj.weight", (slice(None), slice(0, 48))),
        "values": ("model.layers.1.self_attn.v_proj.weight", (slice(None), slice(None))),
        "a pair of the keys": ("model.layers.1.self_attn.k_proj.weight", (slice(0, None, 12), slice(None))),
        "queries": ("model.layers.1.self_attn.q_proj.weight", (slice(None), slice(None))),
        "neurons": ("model.layers.1.mlp.down_proj.weight", (slice(None), slice(None)))}


@pytest.mark.parametrize("dead", DEAD)
def test_parts_of_a_teacher_that_do_nothing_are_no_obstacle(dead: str, tmp_path: Path) -> None:
    """As padding in an embedding, and layers that were added to write nothing yet."""
    teacher = teacher_of(tmp_path / "t", family="llama", tied=False)
    model, (name, part) = teacher.model(), DEAD[dead]
    with torch.no_grad():
        model.get_parameter(name)[part] = 0
    model.save_pretrained(tmp_path / "t")
    teacher = DenseCheckpoint.open(tmp_path / "t")
    for cut in ("key/value heads", "all"):
        start = start_of(teacher, some_ids(), "weights", **CUTS[cut])
        assert all(tensor.isfinite().all() for tensor in start.tensors.values()), cut
        clone = start.clone(teacher.model())
        parts = clone(some_ids(), objective=Objective(clone=1.0)).parts
        assert start.kl == pytest.approx(parts["kl"].item(), rel=1e-3) and parts["clone"].isfinite()


def test_only_principal_components_are_refitted(tmp_path: Path) -> None:
    """RED selects channels and leaves the weights as they are (arXiv 2605.29327)."""
    teacher = teacher_of(tmp_path / "t")
    data, shape = tiny_data(teacher.path, tmp_path), replace(teacher.shape, hidden_size=32)
    recipe = load_recipe(None, ["train.init=selection", "train.seq_len=64"])
    start = make_start(Layers.of(teacher, torch.device("cpu")), shape, recipe.train, data, tmp_path)
    writer = start.tensors["model.layers.0.mlp.down_proj.weight"]
    rows = {tuple(row.tolist()) for row in teacher.tensor("model.layers.0.mlp.down_proj.weight")}
    assert all(tuple(row.tolist()) in rows for row in writer)


def test_a_full_disk_is_an_error_of_the_write(tmp_path: Path) -> None:
    streams = Streams(tmp_path, (2, 8), torch.device("cpu"))
    (tmp_path / "own.stream").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        streams.put("own", slice(0, 1), torch.zeros(1, 8, 4))


def test_streams_return_what_was_put(tmp_path: Path) -> None:
    streams = Streams(tmp_path, (3, 8), torch.device("cpu"))
    values = torch.randn(3, 8, 5)
    for part in (slice(2, 3), slice(0, 2)):
        streams.put("own", part, values[part].mT.contiguous().mT)
    assert torch.equal(streams.get("own", slice(1, 3)), values[1:3])


def test_heads_with_q_k_norms_are_dropped_by_groups(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", family="qwen3", tied=True, tokenizer="qwen2")
    model = teacher.model()
    with torch.no_grad():  # the first group hardly contributes
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :layer.self_attn.o_proj.weight.shape[1] // 2] *= 1e-3
    model.save_pretrained(tmp_path / "t")
    teacher = DenseCheckpoint.open(tmp_path / "t")
    start = start_of(teacher, some_ids(), "weights", plain(), num_key_value_heads=1, num_attention_heads=2)
    assert [block_map.index_JM.tolist() for block_map in start.lineage.maps["q_size"]] == [[[2], [3]]] * 2
    assert start.lineage.maps["k_size"][0].is_selection and start.kl < 1e-3


def test_neurons_without_effect_are_the_first_to_go(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True)
    model = teacher.model()
    gone = [torch.randperm(96, generator=torch.Generator().manual_seed(SEED + i))[:32] for i in range(2)]
    with torch.no_grad():
        for layer, indices in zip(model.model.layers, gone, strict=True):
            layer.mlp.down_proj.weight[:, indices[:16]] = 0
            layer.mlp.up_proj.weight[indices[16:]] = 0
    model.save_pretrained(tmp_path / "t")
    start = start_of(DenseCheckpoint.open(tmp_path / "t"), some_ids(), "weights", intermediate_size=64)
    for block_map, indices in zip(start.lineage.maps["intermediate_size"], gone, strict=True):
        assert sorted({*range(96)} - {*block_map.index_JM.flatten().tolist()}) == sorted(indices.tolist())
    assert start.kl < 1e-6


def test_layers_without_effect_are_the_first_to_go(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True, layers=5)
    model = teacher.model()
    with torch.no_grad():
        for i in (1, 3):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "t")
    start = start_of(DenseCheckpoint.open(tmp_path / "t"), some_ids(), "weights", num_hidden_layers=3)
    assert start.lineage.layers == (0, 2, 4) and start.kl < 1e-6


@pytest.mark.parametrize("holds", get_args(Holds))
def test_a_stored_start_is_read_again(holds: Holds, tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True)
    start = start_of(teacher, some_ids(), holds, **CUTS["all"])
    save_start(start, tmp_path)
    found = load_start(tmp_path)
    assert (found.lineage, found.holds, found.kl, found.loss) == (start.lineage, holds, start.kl, start.loss)
    assert kl_of(teacher, found, some_ids()) == kl_of(teacher, start, some_ids())
    assert found.writers.keys() == start.writers.keys()


def test_every_initialization_of_the_recipe_has_values() -> None:
    assert set(INITS) == set(get_args(get_type_hints(Train)["init"]))


def test_selection_picks_channels_and_starts_nearer_than_gaussian(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t")
    # Random weights carry little: leave out only four channels of 64.
    selected, random = (start_of(teacher, some_ids(), choices=plain(init), hidden_size=60)
                        for init in ("selection", "gaussian"))
    p = selected.tensors["model.embed_tokens.weight"]
    assert set(p.unique().tolist()) == {0.0, 1.0} and (p.sum(0) == 1).all() and (p.sum(1) <= 1).all()
    assert selected.kl < random.kl


def test_pca_starts_nearer_than_selection_on_a_stream_of_low_rank(tmp_path: Path) -> None:
    model = teacher_of(tmp_path / "t").model()
    with torch.no_grad():  # everything that writes into the stream writes into the same 24 directions of 64
        basis = torch.linalg.qr(torch.randn(64, 24, generator=torch.Generator().manual_seed(0))).Q
        for name, matrix in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                matrix.copy_(basis @ basis.T @ matrix)
            elif name == "model.embed_tokens.weight":
                matrix.copy_(matrix @ basis @ basis.T)
    model.save_pretrained(tmp_path / "t")
    teacher = DenseCheckpoint.open(tmp_path / "t")
    pca, selected = (start_of(teacher, some_ids(), choices=plain(init), hidden_size=32)
                     for init in ("pca", "selection"))
    assert pca.kl < 0.2 * selected.kl


def streams_of(model: PreTrainedModel, norms: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each norm reads, of all rows at once, at unit RMS."""
    found: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    handles = [modules[name.removesuffix(".weight")].register_forward_pre_hook(
        lambda module, inputs, name=name: found.__setitem__(name, inputs[0].flatten(0, 1))) for name in norms]
    with torch.no_grad():
        model.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: h / h.square().mean(-1, keepdim=True).sqrt() for name, h in found.items()}


@pytest.mark.parametrize("name", ["llama-untied", "qwen3-tied"])
def test_initial_values_are_those_of_all_rows_at_once_without_holding_them(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", **FAMILIES[name])
    model, ids = teacher.model(), some_ids(90, 100)
    norms = [w.name for w in teacher.weights() if w.role.is_norm]
    streams = streams_of(model, norms, ids)
    with LargestTensor() as seen:
        pca, selected = (start_of(teacher, ids, choices=plain(init), hidden_size=32).tensors
                         for init in ("pca", "selection"))
    assert seen.elements < 90 * 100 * 64
    weight = torch.stack([h.abs().mean(0) for h in streams.values()]).sum(0)
    channels = weight.topk(32).indices.sort().values
    covariance = torch.stack([h.T @ h / len(h) for h in streams.values()]).sum(0)
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -32:]
    for key, h in streams.items():
        gain = model.get_parameter(key).detach()
        ratio = h[:, channels].square().mean(-1).sqrt().mean()
        torch.testing.assert_close(selected[key], gain[channels] * ratio)
        if key != "model.norm.weight" or not teacher.shape.tied:
            torch.testing.assert_close(pca[key], torch.ones(32) * (h @ basis).square().mean(-1).sqrt().mean())
    u = pca["model.embed_tokens.weight"]
    torch.testing.assert_close(u @ u.T, basis @ basis.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(selected["model.embed_tokens.weight"].argmax(0), channels)


def test_a_lineage_of_two_cuts_is_that_of_the_student(tmp_path: Path) -> None:
    """Layers, block maps and projections of both cuts in a row give the teacher's activations what the student has."""
    teacher = teacher_of(tmp_path / "t", family="llama", tied=True, layers=4, kv_heads=4)
    first = start_of(teacher, some_ids(), "weights", plain(), num_hidden_layers=3, intermediate_size=80,
                     num_key_value_heads=2)
    second_sizes = dict(num_hidden_layers=2, intermediate_size=64, num_key_value_heads=1, num_attention_heads=2)
    shape = replace(first.lineage.student, **second_sizes)
    base = Layers(config_of(teacher.check_config(), first.lineage), first.lineage.student,
                  lambda weight: first.tensors[weight.name], torch.device("cpu"))
    second = build_start(base, shape, some_ids(), tmp_path, "weights", plain())
    lineage = first.lineage.then(second.lineage)
    assert lineage.layers == tuple(first.lineage.layers[i] for i in second.lineage.layers)
    for weight in weights_of(shape):
        if weight.layer is None or weight.role.is_norm:
            continue
        direct = lineage.mapped(weight, teacher.tensor(lineage.source_of(weight)))
        torch.testing.assert_close(second.tensors[weight.name], direct, rtol=1e-4, atol=1e-5)
