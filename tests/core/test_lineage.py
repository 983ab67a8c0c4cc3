"""The lineage: the axes that roles name, block maps, what is refused, and the metadata of a file."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lrc_edge.block_map import BlockMap
from lrc_edge.errors import UserError
from lrc_edge.families import EMBEDDING, FAMILIES, FINAL_NORM, HEAD, RESIDUAL, Weight, weights_of
from lrc_edge.lineage import COPIED_AXES, MAPPED_AXES, METADATA_KEY, Lineage, compose, read_lineage
from lrc_edge.shape import ModelShape

TEACHER = ModelShape("qwen2", 50, 12, 20, 3, 4, 2, 6, 128, tied=False)
STUDENT = replace(TEACHER, hidden_size=8)


def some_tensor(weight: Weight) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel))


def some_map(index: list[list[int]], size_T: int, size_S: int, teacher_size: int) -> BlockMap:
    factor = torch.randn(len(index), len(index[0]), size_T, size_S, generator=torch.Generator().manual_seed(size_S))
    return BlockMap(torch.tensor(index), factor, teacher_size)


def as_matrix(block_map: BlockMap) -> torch.Tensor:
    """(teacher's size, student's size), written out entry by entry."""
    matrix = torch.zeros(block_map.teacher_size, block_map.student_size)
    n_J, n_M, size_T, size_S = block_map.factor_JMTS.shape
    for j in range(n_J):
        for m in range(n_M):
            first = int(block_map.index_JM[j, m]) * size_T
            matrix[first:first + size_T, j * size_S:(j + 1) * size_S] += block_map.factor_JMTS[j, m]
    return matrix


def written(lineage: Lineage, folder: Path) -> Path:
    file = folder / "trained.safetensors"
    save_file({"a.weight": torch.zeros(1)} | lineage.tensors(), file, lineage.metadata("weights"))
    return file


def test_every_axis_of_every_role_is_known() -> None:
    roles = [EMBEDDING, HEAD, FINAL_NORM, *(role for family in FAMILIES.values() for role in family.roles)]
    assert {axis for role in roles for axis in role.axes} == {RESIDUAL, *COPIED_AXES, *MAPPED_AXES}


@pytest.mark.parametrize(("index", "size_T", "size_S", "teacher_size"), [
    ([[3], [0], [19]], 1, 1, 20), ([[0, 1]], 6, 6, 12), ([[1, 3], [2, 0]], 3, 2, 12)])
def test_a_block_map_is_its_matrix_on_one_dimension(index: list[list[int]], size_T: int, size_S: int,
                                                    teacher_size: int) -> None:
    block_map = some_map(index, size_T, size_S, teacher_size)
    x = torch.randn(5, teacher_size, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("atb,ts->asb", x, as_matrix(block_map))
    torch.testing.assert_close(block_map.apply(x, 1), expected)
    torch.testing.assert_close(block_map.apply(x.movedim(1, -1)), expected.movedim(1, -1))


def test_two_block_maps_in_a_row_are_one() -> None:
    first, second = some_map([[0, 2], [1, 3], [4, 5]], 2, 3, 12), some_map([[0, 1], [2, 0]], 3, 2, 9)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.then(second).apply(x), second.apply(first.apply(x)))
    with pytest.raises(ValueError, match="one to 9 in blocks of 3, then one of 12 in blocks of 2"):
        first.then(first)


def test_a_selection_keeps_blocks_as_they_are() -> None:
    x = torch.arange(12.0)
    assert BlockMap.selection([2, 0], 12, 3).apply(x).tolist() == [6, 7, 8, 0, 1, 2]
    assert BlockMap.selection([2, 0], 12, 3).is_selection
    assert not some_map([[2]], 3, 3, 12).is_selection


@pytest.mark.parametrize("index", [[[4]], [[-1]]])
def test_a_block_map_outside_its_axis_is_refused(index: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="do not fit an axis of 12"):
        some_map(index, 3, 3, 12)


@pytest.mark.parametrize("axis", MAPPED_AXES)
def test_maps_change_their_axis_alone(axis: str) -> None:
    kept = list(range(0, getattr(TEACHER, axis), 2))
    student = replace(TEACHER, intermediate_size=10) if axis == "intermediate_size" else replace(TEACHER, head_dim=3)
    lineage = Lineage.of(TEACHER, TEACHER)
    object.__setattr__(lineage, "maps", {axis: [BlockMap.selection(kept, getattr(TEACHER, axis))] * 3})
    for weight in weights_of(student):
        tensor = expected = some_tensor(Weight.of(weight.role, weight.layer, TEACHER))
        for dim, name in enumerate(weight.role.axes):
            if name == axis:
                expected = expected[kept] if dim == 0 else expected[:, kept]
        assert torch.equal(lineage.mapped(weight, tensor), expected)
        assert lineage.has_maps(weight.role) == (axis in weight.role.axes)


def test_matrices_are_projected_along_the_residual_width() -> None:
    eye = torch.eye(TEACHER.hidden_size)
    for weight in weights_of(TEACHER):
        if weight.role.is_matrix:
            tensor = some_tensor(weight)
            assert torch.equal(compose(weight.role, tensor, eye), tensor)
            expected = tensor[:8] if weight.role.writes_stream else tensor[:, :8]
            assert torch.equal(compose(weight.role, tensor, eye[:, :8]), expected)


def test_layers_name_their_source_and_those_left_out_after_it() -> None:
    shallow = replace(STUDENT, num_hidden_layers=2)
    lineage = Lineage(replace(TEACHER, num_hidden_layers=5), shallow, (0, 2))
    assert [lineage.source_of(w) for w in weights_of(shallow) if w.role.name == "ffn_up"] == [
        "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    assert [list(lineage.teacher_layers(layer)) for layer in (0, 1)] == [[0, 1], [2, 3, 4]]


MAP = BlockMap.selection(range(16), 20)


@pytest.mark.parametrize(("change", "message"), [
    ({"maps": {"experts": (MAP, MAP, MAP)}}, r"maps of \['experts'\]; known: intermediate_size"),
    ({"student": replace(STUDENT, intermediate_size=16)}, "intermediate_size has no map, but is 20 .* and 16"),
    ({"student": replace(STUDENT, num_key_value_heads=1)}, "k_size has no map, but is 12 .* and 6"),
    ({"maps": {"intermediate_size": (MAP, MAP, MAP)}}, "a map of intermediate_size is from 20 to 16, need 20 to 20"),
    ({"student": replace(STUDENT, intermediate_size=16), "maps": {"intermediate_size": (MAP, MAP)}},
     "2 maps of intermediate_size for 3 layers"),
    ({"layers": (0, 1)}, "do not make a student of 3"),
    ({"layers": (0, 1, 3)}, r"\(0, 1, 3\) of a teacher with 3"),
    ({"layers": (0, 2, 1)}, r"\(0, 2, 1\) of a teacher with 3"),
    ({"student": replace(STUDENT, num_hidden_layers=2), "layers": (1, 2)}, "the first is always kept")])
def test_what_does_not_fit_together_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Lineage.of(TEACHER, STUDENT), **change)  # type: ignore[arg-type]


def test_a_file_gives_the_lineage_back(tmp_path: Path) -> None:
    maps = {"intermediate_size": [BlockMap.selection(range(layer, 16 + layer), 20) for layer in range(3)]}
    lineage = Lineage(TEACHER, replace(STUDENT, intermediate_size=16), (0, 1, 2), maps)
    file = written(lineage, tmp_path)
    with safe_open(file, framework="pt") as opened:
        found, holds = read_lineage(opened, file)
    assert (found, holds) == (lineage, "weights")
    for before, after in zip(maps["intermediate_size"], found.maps["intermediate_size"], strict=True):
        assert torch.equal(before.index_JM, after.index_JM) and torch.equal(before.factor_JMTS, after.factor_JMTS)


@pytest.mark.parametrize("metadata", [
    None, {"kind": "projections"}, {METADATA_KEY: "{}"}, {METADATA_KEY: "[]"}, {METADATA_KEY: "x"},
    {METADATA_KEY: Lineage.of(TEACHER, STUDENT).metadata("weights")[METADATA_KEY].replace('"weights"', '"both"')},
    {METADATA_KEY: Lineage.of(TEACHER, STUDENT).metadata("weights")[METADATA_KEY].replace('[]', '["q_size"]')},
    {METADATA_KEY: Lineage.of(TEACHER, STUDENT).metadata("weights")[METADATA_KEY].replace('[]', '[[]]')}])
def test_a_file_without_the_metadata_is_refused_in_one_line(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata)
    with safe_open(file, framework="pt") as opened, \
            pytest.raises(UserError, match=r"x.safetensors: its metadata does not describe a student .*: delete it") \
            as caught:
        read_lineage(opened, file)
    assert "\n" not in str(caught.value)
