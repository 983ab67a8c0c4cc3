"""The lineage: the axes that roles name, the identity of each, what is refused, and the metadata of a file."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrc_edge.errors import UserError
from lrc_edge.families import EMBEDDING, FAMILIES, FINAL_NORM, HEAD, Weight, weights_of
from lrc_edge.lineage import AXES, METADATA_KEY, Lineage, compose, read_metadata
from lrc_edge.shape import ModelShape

TEACHER = ModelShape("qwen2", 50, 12, 20, 3, 4, 2, 6, 128, tied=False)
STUDENT = replace(TEACHER, hidden_size=8)


def some_tensor(weight: Weight) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel))


def test_every_axis_of_every_role_is_known() -> None:
    roles = [EMBEDDING, HEAD, FINAL_NORM, *(role for family in FAMILIES.values() for role in family.roles)]
    assert {axis for role in roles for axis in role.axes} == set(AXES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", AXES)
def test_the_identity_of_an_axis_gives_the_teachers_weight(axis: str, family: str) -> None:
    shape = replace(TEACHER, family=family)
    for weight in weights_of(shape):
        tensor = some_tensor(weight)
        assert torch.equal(compose(weight, tensor, {axis: torch.eye(getattr(shape, axis))}), tensor)
        assert compose(weight, tensor, {}) is tensor


@pytest.mark.parametrize("axis", AXES)
def test_a_map_contracts_its_axis_alone(axis: str) -> None:
    """A map that keeps some coordinates keeps those rows, columns or elements."""
    kept = torch.arange(0, getattr(TEACHER, axis), 2)
    for weight in weights_of(TEACHER):
        tensor = expected = some_tensor(weight)
        for dim, name in enumerate(weight.role.axes):
            if name == axis:
                expected = expected.index_select(dim, kept)
        assert torch.equal(compose(weight, tensor, {axis: torch.eye(getattr(TEACHER, axis))[:, kept]}), expected)


def test_a_narrower_student_is_projected_along_the_residual_width_only() -> None:
    lineage = Lineage.of(TEACHER, STUDENT)
    assert lineage.axes == dict.fromkeys(AXES, "identity") | {"hidden_size": "projection"}
    assert lineage.layers == (0, 1, 2)
    for weight in weights_of(STUDENT):
        assert lineage.source_of(weight) == weight.name
        how = lineage.is_composed(weight.role), lineage.is_copied(weight.role)
        assert how == ((len(weight.shape) == 2), "bias" in weight.name), weight.name


def test_layers_name_their_source() -> None:
    shallow = replace(STUDENT, num_hidden_layers=2)
    lineage = replace(Lineage.of(TEACHER, STUDENT), student=shallow, layers=(0, 2))
    assert [lineage.source_of(w) for w in weights_of(shallow) if w.role.name == "ffn_up"] == [
        "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize(("change", "message"), [
    ({"axes": {**Lineage.of(TEACHER, STUDENT).axes, "experts": "identity"}}, r"\['experts'\].*known: vocab_size"),
    ({"axes": {"hidden_size": "projection"}}, "intermediate_size.*unknown or missing"),
    ({"axes": {**Lineage.of(TEACHER, STUDENT).axes, "head_dim": "merged"}}, "head_dim = 'merged'; known: identity"),
    ({"student": replace(STUDENT, intermediate_size=16)}, "intermediate_size is the identity, but 20 .* and 16"),
    ({"student": replace(STUDENT, num_key_value_heads=1)}, "kv_size is the identity, but 12 .* and 6"),
    ({"layers": (0, 1)}, "do not make a student of 3"),
    ({"layers": (0, 1, 3)}, r"\(0, 1, 3\) of a teacher with 3")])
def test_what_does_not_fit_together_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Lineage.of(TEACHER, STUDENT), **change)  # type: ignore[arg-type]


def test_a_map_of_an_unknown_axis_is_refused() -> None:
    weight = next(weights_of(TEACHER))
    with pytest.raises(ValueError, match=r"\['experts'\] are unknown; known: vocab_size"):
        compose(weight, some_tensor(weight), {"experts": torch.eye(2)})


def test_metadata_gives_the_lineage_back() -> None:
    lineage = Lineage.of(TEACHER, STUDENT)
    assert read_metadata(lineage.metadata("weights"), Path("x")) == (lineage, "weights")


@pytest.mark.parametrize("metadata", [
    None, {"kind": "projections"}, {METADATA_KEY: "{}"}, {METADATA_KEY: "[]"}, {METADATA_KEY: "x"},
    {METADATA_KEY: Lineage.of(TEACHER, STUDENT).metadata("weights")[METADATA_KEY].replace('"weights"', '"both"')}])
def test_a_file_without_the_metadata_is_refused_in_one_line(metadata: dict[str, str] | None) -> None:
    with pytest.raises(UserError, match=r"x: its metadata does not describe a student .*: delete it") as caught:
        read_metadata(metadata, Path("x"))
    assert "\n" not in str(caught.value)
