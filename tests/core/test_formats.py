"""The table of formats is total: a row that is missing is an error that names it, never another row's gate."""
from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path

import llama_cpp
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from tiny_models import make_tiny

from lrc_edge import formats
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.export.quantize.encodings import ENCODINGS
from lrc_edge.formats import FORMATS, QUANTIZED_TYPES, TYPES, format_of, formats_of, judged_as, onnx_format_of
from lrc_edge.parity import gates_of_artifact, gates_of_device
from lrc_edge.pipeline.stages import STAGES
from lrc_edge.pipeline.verify import _examine
from lrc_edge.recipe import Gates
from lrc_edge.report import charts
from lrc_edge.targets import memory
from lrc_edge.targets.memory import memory_of
from lrc_edge.targets.runtimes.table import verifiers_of
from lrc_edge.targets.timing import cost
from lrc_edge.targets.timing.anchors import WRITERS

NOT_OFFERED = {"mxfp4_moe", "nvfp4"}  # experts, which a dense model has none of; no quantizer


def test_the_gguf_rows_are_llama_cpps_encodings() -> None:
    constants = (re.fullmatch("LLAMA_FTYPE_(?:ALL|MOSTLY)_(.+)", name) for name in vars(llama_cpp.llama_cpp))
    known = {found[1].lower() for found in constants if found} - NOT_OFFERED
    readable = {name for name in known if name in ENCODINGS}
    assert formats_of("gguf").keys() == ENCODINGS.keys() == readable
    # Names that are not their type's name, cut at the size letter. Source: llama_ftype_get_default_type.
    others = {"iq2_s": "IQ2_XS", "iq2_m": "IQ2_S", "iq3_xs": "IQ3_S", "iq3_m": "IQ3_S"}
    for name, row in formats_of("gguf").items():
        stem = name.upper() if name.upper() in TYPES else name.upper().rpartition("_")[0]
        assert row.type == others.get(name, stem)


def test_blocks_are_ggmls() -> None:
    assert TYPES == {name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in TYPES}
    assert {row.type for row in FORMATS.values()} == set(TYPES)
    types = {name.lower() for name in TYPES} | {"mxfp4", "nvfp4"}
    assert types - formats_of("gguf").keys() == set(QUANTIZED_TYPES), "a type that `verify` could not judge"


def test_gates_are_keys_of_the_recipe() -> None:
    known = {field.name for field in fields(Gates)}
    assert {gate for row in FORMATS.values() for gate in (row.kl_gate, row.device_kl_gate, row.top1_gate)} <= known


@pytest.mark.parametrize("text, near", [
    ("gguf:q4_km", "gguf:q4_k_m"), ("onnx:int8", "onnx:q8"), ("Q4_0", "gguf:q4_0"), ("gguf:q8", "gguf:q8_0")])
def test_an_unknown_format_gets_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"format {text!r} is unknown; did you mean {near}\?"):
        format_of(text)


def test_any_case() -> None:
    assert format_of(" GGUF:Q4_K_M ").file == "{model}-Q4_K_M.gguf"


@pytest.mark.parametrize("name", ["gguf:type 99", "gguf:f64", "gguf:i8", "onnx:q2", "onnx:4.25bpw", "mlx:q4", "gguf:"])
def test_a_file_of_an_unknown_type_has_no_gate(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no gate"):
        gates_of_artifact("a", name, "prefill", None, Gates(), 1e-5)
    with pytest.raises(UserError, match=f"{name}: no gate"):
        gates_of_device("a", name, {"kl_mean": 0.0, "top1": 1.0}, Gates())


def test_verify_refuses_a_file_of_an_unknown_type(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", ["f32"])
    file = tmp_path / artifact.path
    data = bytearray(file.read_bytes())
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:  # after the name: the number of dimensions, the dimensions, the type
            at = data.index(tensor.name.encode() + struct.pack("<I", 2)) + len(tensor.name) + 4 + 2 * 8
            data[at:at + 4] = struct.pack("<I", 99)
    file.write_bytes(data)
    subject = _examine(file, checkpoint)
    assert subject.artifact is None and "gguf:type 99: no gate" in subject.findings[-1].text


@pytest.mark.parametrize("encoding", [*QUANTIZED_TYPES, "4.25bpw"])
def test_mixtures_and_types_of_others_have_the_limit_of_quantized_files(encoding: str) -> None:
    assert judged_as(f"gguf:{encoding}") is FORMATS["gguf:q4_0"]


@pytest.mark.parametrize("bits, encoding", [(32.0, "fp32"), (24.0, "fp32"), (16.0, "fp16"), (9.0, "q8"), (5.2, "q4")])
def test_an_onnx_file_of_others_is_known_by_its_bits(bits: float, encoding: str) -> None:
    assert onnx_format_of(bits).encoding == encoding


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_row_its_name_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = FORMATS[name]
    monkeypatch.delitem(formats.FORMATS, name)
    with pytest.raises(UserError, match=f"format '{name}' is unknown"):
        format_of(name)
    with pytest.raises(UserError, match=f"{name}: no gate"):
        judged_as(name)
    assert row.encoding not in formats_of(row.kind)


def test_without_a_row_nothing_predicts_writes_or_takes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    monkeypatch.delitem(formats.FORMATS, "onnx:q4")
    with pytest.raises(UserError, match="onnx:q4"):
        memory_of(checkpoint.shape, "onnx:q4", "onnxruntime", 64, set())
    with pytest.raises(UserError, match="need each of fp32"):
        export_onnx(checkpoint, tmp_path / "onnx", ["q2"])
    with pytest.raises(UserError, match=r"4\.5 bits per weight"):
        onnx_format_of(4.5)


def test_every_fact_about_a_kind_of_file_is_there() -> None:
    """A new kind of file is a row in each of these tables, and a stage."""
    for table in (charts._DOTS, memory._PADS, formats._LONGER_SCALES, cost._LOGITS_OF_ALL, WRITERS):
        assert table.keys() == set(formats.KINDS)
    assert set(formats.KINDS) <= {stage.name for stage in STAGES}
    for kind in formats.KINDS:
        assert verifiers_of(kind)
