"""The imatrix GGUF: its keys, shapes and numbers read back by the gguf package, and what llama-quantize makes of it."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tiny

pytest.importorskip("llama_cpp")
from gguf import GGUFReader

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.quantize.encodings import ENCODINGS, quantize_file
from lrc_edge.export.quantize.imatrix import collect
from lrc_edge.export.quantize.imatrix_file import read_imatrix, write_imatrix
from lrc_edge.gguf_names import gguf_name

ROWS = np.random.default_rng(0).integers(5, 500, (3, 64))


def imatrix_of(checkpoint: DenseCheckpoint, file: Path) -> dict[str, np.ndarray]:
    importance = collect(checkpoint, ROWS)
    write_imatrix(file, checkpoint, importance, *ROWS.shape, "sha256:0123")
    return importance


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_is_llama_imatrixs(tied: bool, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", tied=tied))
    importance = imatrix_of(checkpoint, tmp_path / "x.imatrix.gguf")
    reader = GGUFReader(tmp_path / "x.imatrix.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {"general.type": "imatrix", "imatrix.datasets": ["sha256:0123"], "imatrix.chunk_count": 3,
                      "imatrix.chunk_size": 64}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"}
    assert tensors.keys() == {f"{gguf_name(weight)}.{kind}" for weight in checkpoint.weights()
                              if weight.name in importance for kind in ("in_sum2", "counts")}
    assert ("output.weight.in_sum2" in tensors, "token_embd.weight.in_sum2" in tensors) == (not tied, tied)
    for weight in checkpoint.weights():
        if weight.name in importance:
            sums, counts = (tensors[f"{gguf_name(weight)}.{kind}"].data for kind in ("in_sum2", "counts"))
            assert counts.tolist() == [ROWS.size] and sums.shape == weight.shape[1:]
            np.testing.assert_allclose(sums / ROWS.size, importance[weight.name], rtol=1e-6)


def test_it_reads_back(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", layers=1))
    importance = imatrix_of(checkpoint, tmp_path / "x.gguf")
    read = read_imatrix(tmp_path / "x.gguf", checkpoint)
    assert read.keys() == importance.keys()
    for name, values in read.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, importance[name], rtol=1e-6, err_msg=name)
    wider = DenseCheckpoint.open(make_tiny(tmp_path / "wider", layers=1, intermediate_size=128))
    deeper = DenseCheckpoint.open(make_tiny(tmp_path / "deeper", layers=2))
    imatrix_of(deeper, tmp_path / "deeper.gguf")
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:300])
    for file, model, message in (("x.gguf", wider, r"blk\.0\.ffn_down\.weight has sums \(96,\)"),
                                 ("x.gguf", deeper, r"blk\.1\.attn_q\.weight has sums None"),
                                 ("deeper.gguf", checkpoint, r"blk\.1\.\S+ is of no matrix of tiny"),
                                 ("broken.gguf", checkpoint, "not an imatrix GGUF")):
        with pytest.raises(UserError, match=message):
            read_imatrix(tmp_path / file, model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_sums_that_no_text_gives_are_refused(bad: float, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", layers=1))
    importance = collect(checkpoint, ROWS)
    name = max(importance)
    importance[name] = importance[name].copy()
    importance[name][3] = bad
    write_imatrix(tmp_path / "x.gguf", checkpoint, importance, *ROWS.shape, "sha256:0123")
    with pytest.raises(UserError, match="need mean squares that are finite"):
        read_imatrix(tmp_path / "x.gguf", checkpoint)


@pytest.mark.parametrize("encoding", ["q4_0", "q4_k_m", "iq3_xxs"])
def test_llama_quantize_makes_the_same_bytes_of_it(encoding: str, tmp_path: Path) -> None:
    """llama.cpp's own tool, its own reader: LLAMA_QUANTIZE, or llama-quantize on the PATH."""
    tool = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if tool is None:
        pytest.skip("no llama-quantize on the PATH or in LLAMA_QUANTIZE")
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=512, head_dim=64))
    imatrix_of(checkpoint, tmp_path / "x.imatrix.gguf")
    [source] = export_gguf(checkpoint, tmp_path / "gguf", ["f16"])
    by_name = read_imatrix(tmp_path / "x.imatrix.gguf", checkpoint)
    importance = {gguf_name(w): by_name[w.name] for w in checkpoint.weights() if w.name in by_name}
    quantize_file(tmp_path / source.path, tmp_path / "ours.gguf", ENCODINGS[encoding], 1, importance)
    ends = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"] if encoding == "q4_0" else []
    subprocess.run([tool, *ends, "--imatrix", tmp_path / "x.imatrix.gguf", tmp_path / source.path,
                    tmp_path / "theirs.gguf", encoding, "1"], check=True, capture_output=True)
    ours, theirs = (GGUFReader(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert [(t.name, t.tensor_type) for t in ours.tensors] == [(t.name, t.tensor_type) for t in theirs.tensors]
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        np.testing.assert_array_equal(a.data, b.data, err_msg=a.name)
    assert theirs.fields["quantize.imatrix.dataset"].contents() == "sha256:0123"
    quantize_file(tmp_path / source.path, tmp_path / "plain.gguf", ENCODINGS["q4_0"], 1)
    plain = {t.name: t.data for t in GGUFReader(tmp_path / "plain.gguf").tensors}
    assert any(t.tensor_type.name == "Q4_0" and (t.data != plain[t.name]).any() for t in ours.tensors) \
        or encoding != "q4_0"
