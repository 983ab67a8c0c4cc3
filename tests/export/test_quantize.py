"""Encodings, llama.cpp's quantizer, and the judgement of what it made: llama.cpp's own log is the oracle."""
from __future__ import annotations

import re
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader, quants
from tiny_models import make_tiny

from lrc_edge import llama_log
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.quantize.encodings import (
    ENCODINGS,
    judge_type,
    parse_encoding,
    quantize_file,
    quantize_matrix,
    read_contents,
)
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

QUANTIZED = [name for name, encoding in ENCODINGS.items() if not encoding.direct]
# (hidden size, FFN width) -> whether the output has its own tensor. 172 is stories260K's: no multiple of 32.
WIDTHS = {(256, 512): True, (256, 172): False, (288, 160): False, (64, 172): True}


@pytest.fixture(scope="module")
def f32_files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    files = {}
    for (hidden, ffn), tied in WIDTHS.items():
        folder = tmp_path_factory.mktemp(f"{hidden}-{ffn}")
        path = make_tiny(folder / "model", hidden_size=hidden, intermediate_size=ffn, head_dim=64, tied=tied)
        [artifact] = export_gguf(DenseCheckpoint.open(path), folder / "gguf", ["f32"])
        files[hidden, ffn] = folder / artifact.path
    return files


def matrices(file: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in GGUFReader(file).tensors if len(t.shape) > 1}


def importance_for(file: Path) -> dict[str, np.ndarray]:
    """Any importance; as with a real one, an embedding beside an output has none."""
    rng, names = np.random.default_rng(0), matrices(file)
    return {name: rng.lognormal(0, 2, weight.shape[1]).astype(np.float32) for name, weight in names.items()
            if name != "token_embd.weight" or "output.weight" not in names}


def test_known_encodings() -> None:
    expected = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10,
                "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
                "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "iq3_s": 26, "iq3_m": 27, "tq1_0": 36, "tq2_0": 37}
    assert {name: ENCODINGS[name].ftype for name in expected} == expected
    assert parse_encoding(" Q4_K_M ").type == QType.Q4_K


@pytest.mark.parametrize("text, message", [
    ("q4_km", "did you mean gguf:q4_k_m?"), ("int4", "is unknown"), ("q8", "did you mean gguf:q8_0?")])
def test_encodings_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_encoding(text)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_encoding(name: str, widths: tuple[int, int], weighted: bool, f32_files: dict[tuple[int, int], Path],
                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made, or refused for want of an importance matrix; the fallbacks are those of llama.cpp's warnings."""
    encoding, target = ENCODINGS[name], tmp_path / "x.gguf"
    if encoding.needs_imatrix and not weighted:
        with pytest.raises(UserError, match="importance matrix"):
            quantize_file(f32_files[widths], target, encoding, threads=1)
        return
    importance = importance_for(f32_files[widths]) if weighted else None
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    monkeypatch.setattr(llama_log, "listen", lambda: llama_cpp.llama_log_set(callback, None))
    quantize_file(f32_files[widths], target, encoding, threads=1, importance=importance)
    monkeypatch.undo()
    llama_log.listen()
    warned = {m[1]: m[2].upper() for m in re.finditer(r"warning: (\S+) .*?falling back to\s+(\S+)", "".join(lines))}
    contents = read_contents(target, encoding)
    found = {fallback.tensor: fallback.got for fallback in contents.fallbacks}
    if name != "q1_0":  # which llama.cpp has no fallback for: ours are told to it as overrides
        # It says nothing when the output goes to Q8_0 because its rows do not divide.
        assert {t: got for t, got in found.items() if t in warned or t not in ("output.weight", "token_embd.weight")} \
            == warned
    if widths == (256, 512):
        assert not found
    assert contents.data_bytes == sum(int(t.n_bytes) for t in GGUFReader(target).tensors)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_k_m", "q6_k", "iq4_xs", "q2_k", "q1_0", "tq2_0"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_quantized_files_run(name: str, widths: tuple[int, int], f32_files: dict[tuple[int, int], Path],
                             tmp_path: Path) -> None:
    quantize_file(f32_files[widths], tmp_path / "x.gguf", ENCODINGS[name], threads=1)
    with LlamaCpp(tmp_path / "x.gguf", n_ctx=64, threads=1) as runtime:
        assert len(runtime.generate([0, 5, 6], 4, set())) == 4


@pytest.mark.parametrize("encoding, row, got, expected", [
    ("q8_0", 172, "F16", ("Q8_0", "row of 172 is not a multiple of 32 (Q8_0 block)")),
    ("q4_k_m", 576, "Q5_0", ("Q4_K", "row of 576 is not a multiple of 256 (Q4_K super-block)")),
    ("q4_k_m", 576, "Q8_0", ("Q6_K", "row of 576 is not a multiple of 256 (Q6_K super-block)")),
    ("q4_k_m", 172, "F16", ("Q4_K", "row of 172 is not a multiple of 256 (Q4_K super-block)")),
    ("q5_0", 64, "Q8_0", ("Q6_K", "row of 64 is not a multiple of 256 (Q6_K super-block)")),
    ("iq4_nl", 288, "Q5_1", ("Q5_K", "row of 288 is not a multiple of 256 (Q5_K super-block)")),
    ("q4_k_m", 512, "Q6_K", None),  # the mixture's choice
    ("q5_0", 512, "Q6_K", None),
    ("q4_0", 64, "Q4_0", None),
])
def test_judgement(encoding: str, row: int, got: str, expected: tuple[str, str] | None) -> None:
    fallback = judge_type("blk.0.ffn_down.weight", (row, 64), QType[got], ENCODINGS[encoding])
    assert (fallback and (fallback.wanted, fallback.reason)) == expected


@pytest.mark.parametrize("name, row, got, wanted", [
    ("token_embd.weight", 64, "Q8_0", None), ("output.weight", 288, "Q8_0", None), ("output.weight", 48, "F16", "Q8_0"),
    ("blk.0.ffn_down.weight", 172, "F16", "Q4_0")])
def test_judgement_of_q4_0(name: str, row: int, got: str, wanted: str | None) -> None:
    fallback = judge_type(name, (row, 64), QType[got], ENCODINGS["q4_0"])
    assert (fallback and fallback.wanted) == wanted


@pytest.mark.parametrize(("tied", "hidden_size"), [(True, 64), (False, 64), (True, 48)])
def test_q4_0_has_no_third_type(tied: bool, hidden_size: int, tmp_path: Path) -> None:
    """llama.cpp by itself puts ffn_down of the first eighth of the layers in Q4_1 when it has an importance matrix."""
    path = make_tiny(tmp_path / "tiny", layers=8, tied=tied, hidden_size=hidden_size)
    [source] = export_gguf(DenseCheckpoint.open(path), tmp_path / "gguf", ["f32"])
    importance = importance_for(tmp_path / source.path)
    quantize_file(tmp_path / source.path, tmp_path / "x.gguf", ENCODINGS["q4_0"], 1, importance)
    found = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "x.gguf").tensors
             if len(tensor.shape) > 1}
    ends = {name: found.pop(name) for name in ("token_embd.weight", "output.weight") if name in found}
    assert len(ends) == 2 - tied
    if hidden_size == 64:
        assert {*ends.values()} == {QType.Q8_0} and {*found.values()} == {QType.Q4_0}
    else:  # rows of 48 are no whole blocks
        assert {*ends.values()} == {QType.F16} and {*found.values()} == {QType.F16, QType.Q4_0}


def test_a_failing_quantizer_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(UserError, match=r"x.gguf: llama.cpp could not quantize to q8_0: .*failed to"):
        quantize_file(tmp_path / "bad.gguf", tmp_path / "x.gguf", ENCODINGS["q8_0"])


@pytest.mark.parametrize("widths", [(256, 512), (64, 172)])
@pytest.mark.parametrize("name, weighted", [
    ("q4_0", True), ("q4_0", False), ("q8_0", True), ("q4_k_m", True), ("q4_k_m", False), ("iq2_xs", True)])
def test_a_matrix_becomes_what_the_file_holds(name: str, weighted: bool, widths: tuple[int, int],
                                              f32_files: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    """Every tensor, in the type that the mixture gave it, whether one thread made it or two did in chunks of rows."""
    source = f32_files[widths]
    importance = importance_for(source) if weighted else {}
    for threads in (1, 2):
        quantize_file(source, tmp_path / "x.gguf", ENCODINGS[name], threads, importance)
        quantized = [tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors if tensor.data.dtype == np.uint8]
        assert len(quantized) > 10
        for tensor in quantized:
            blocks = quantize_matrix(matrices(source)[tensor.name], tensor.tensor_type, importance.get(tensor.name))
            np.testing.assert_array_equal(tensor.data, blocks, err_msg=f"{tensor.name} {tensor.tensor_type.name}")


@pytest.mark.parametrize("kind", [QType.Q4_0, QType.Q8_0])
def test_a_matrix_without_importance_is_the_gguf_packages(kind: QType) -> None:
    weight = np.random.default_rng(0).standard_normal((48, 96)).astype(np.float32)
    weight[3, 32:64] = 0
    np.testing.assert_array_equal(quantize_matrix(weight, kind), quants.quantize(weight, kind))


def test_rows_do_not_influence_each_other() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 256)).astype(np.float32) * rng.lognormal(0, 2, (8, 1)).astype(np.float32)
    importance = rng.lognormal(0, 2, 256).astype(np.float32)
    for kind in (QType.Q4_0, QType.Q8_0, QType.Q4_K, QType.IQ2_XS):
        whole = quantize_matrix(weight, kind, importance)
        for row in range(8):
            np.testing.assert_array_equal(whole[row], quantize_matrix(weight[row:row + 1], kind, importance)[0])


ONES = np.ones(64, np.float32)


@pytest.mark.parametrize("row, kind, importance, message", [
    (48, QType.Q4_0, None, "row of 48 is not a multiple of 32"),
    (64, QType.Q4_0, np.ones(32, np.float32), r"need contiguous float32 \(64,\)"),
    (64, QType.Q4_0, np.ones(64), "is float64"),
    (64, QType.Q4_0, np.zeros(64, np.float32), "0.0 to 0.0, need finite values above 0"),
    (64, QType.Q4_0, ONES * np.nan, "need finite values above 0"),
    (256, QType.IQ2_XS, None, "IQ2_XS needs an importance"),
    (64, QType.Q8_1, None, "no quantizer for Q8_1"), (64, QType.F16, None, "no quantizer for F16")])
def test_what_would_end_the_process_is_an_exception(row: int, kind: QType, importance: np.ndarray | None,
                                                    message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_matrix(np.ones((2, row), np.float32), kind, importance)


def test_a_matrix_with_nan_is_refused() -> None:
    with pytest.raises(UserError, match="NaN"):
        quantize_matrix(np.full((2, 64), np.nan), QType.Q8_0)


def test_the_file_notes_its_importance_matrix(f32_files: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    source = f32_files[256, 512]
    importance = importance_for(source)
    noted = []
    for given, n_chunks in ((None, None), (importance, None), (importance, 40)):
        quantize_file(source, tmp_path / "x.gguf", ENCODINGS["q4_0"], 1, given, n_chunks)
        noted.append({name: field.contents() for name, field in GGUFReader(tmp_path / "x.gguf").fields.items()
                      if name.startswith("quantize.")})
    entries = {"quantize.imatrix.entries_count": len(importance)}
    assert noted == [{}, entries, entries | {"quantize.imatrix.chunks_count": 40}]


def test_progress_names_each_tensor_and_what_it_raises_is_raised(f32_files: dict[tuple[int, int], Path],
                                                                 tmp_path: Path) -> None:
    """Among that Ctrl-C, which ctypes would drop."""
    source, said = next(iter(f32_files.values())), []
    quantize_file(source, tmp_path / "x.gguf", ENCODINGS["q4_0"], progress=said.append)
    assert sorted(said) == sorted(tensor.name for tensor in GGUFReader(source).tensors)

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, tmp_path / "y.gguf", ENCODINGS["q4_0"], progress=interrupted)
    quantize_file(source, tmp_path / "y.gguf", ENCODINGS["q4_0"])
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
