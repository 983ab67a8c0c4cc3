"""Encodings, llama.cpp's quantizer, and the judgement of what it made: llama.cpp's own log is the oracle."""
from __future__ import annotations

import re
from pathlib import Path

import llama_cpp
import pytest
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader
from tiny_models import make_tiny

from lrc_edge import llama_log
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.quantize import ENCODINGS, judge_type, parse_encoding, quantize_file, read_contents
from lrc_edge.export.to_gguf import export_gguf
from lrc_edge.targets.llamacpp import LlamaCpp

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


def test_known_encodings() -> None:
    expected = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10,
                "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
                "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "iq3_s": 26, "iq3_m": 27, "tq1_0": 36, "tq2_0": 37}
    assert {name: ENCODINGS[name].ftype for name in expected} == expected
    assert parse_encoding(" Q4_K_M ").type == QType.Q4_K


@pytest.mark.parametrize("text, message", [
    ("q4_km", "did you mean q4_k_m?"), ("int4", "is unknown"), ("q8", "did you mean q8_0?")])
def test_encodings_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_encoding(text)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_encoding(name: str, widths: tuple[int, int], f32_files: dict[tuple[int, int], Path], tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made, or refused for want of an importance matrix; the fallbacks are those of llama.cpp's warnings."""
    encoding, target = ENCODINGS[name], tmp_path / "x.gguf"
    if encoding.needs_imatrix:
        with pytest.raises(UserError, match="importance matrix"):
            quantize_file(f32_files[widths], target, encoding, threads=1)
        return
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    monkeypatch.setattr(llama_log, "listen", lambda: llama_cpp.llama_log_set(callback, None))
    quantize_file(f32_files[widths], target, encoding, threads=1)
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
    ("q4_0", 64, "Q8_0", ("Q6_K", "row of 64 is not a multiple of 256 (Q6_K super-block)")),
    ("iq4_nl", 288, "Q5_1", ("Q5_K", "row of 288 is not a multiple of 256 (Q5_K super-block)")),
    ("q4_k_m", 512, "Q6_K", None),  # the mixture's choice
    ("q4_0", 512, "Q6_K", None),
    ("q4_0", 64, "Q4_0", None),
])
def test_judgement(encoding: str, row: int, got: str, expected: tuple[str, str] | None) -> None:
    fallback = judge_type("blk.0.ffn_down.weight", (row, 64), QType[got], ENCODINGS[encoding])
    assert (fallback and (fallback.wanted, fallback.reason)) == expected


def test_a_failing_quantizer_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(UserError, match=r"x.gguf: llama.cpp could not quantize to q8_0: .*failed to"):
        quantize_file(tmp_path / "bad.gguf", tmp_path / "x.gguf", ENCODINGS["q8_0"])
