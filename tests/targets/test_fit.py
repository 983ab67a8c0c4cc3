"""What is said of memory before a build is true: against files that the exporters write and processes that run them."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.shape import ModelShape
from lrc_edge.targets import profile as profiles
from lrc_edge.targets.fit import bytes_read_per_token, check_fit, judge
from lrc_edge.targets.memory import Memory, bytes_by_group, memory_of
from lrc_edge.targets.profile import PROFILE_FORMATS, Figure, Profile, load_profile

BENCHMARK = ROOT / "benchmarks" / "fit.py"
# V 1000, h 64, f 160, q 96 (3 heads of 32), kv 32, one layer.
SMALL = ModelShape("llama", 1000, 64, 160, 1, 3, 1, 32, 512, tied=False)


def profile_with(usable_gb: float, name: str = "raspberry-pi-5") -> Profile:
    profile = load_profile(name)
    return replace(profile, usable_gb=Figure(usable_gb, "a test", profile.cores.date))


# Bytes


def test_bytes_by_hand() -> None:
    blocks = 1000 * 64 // 32
    linears = 96 * 64 + 2 * 32 * 64 + 64 * 96, 3 * 160 * 64  # q, k and v, o; gate, up, down
    norms = 3 * 64 * 4
    ends = {"embedding": blocks * 34, "head": blocks * 34}
    assert bytes_by_group(SMALL, "gguf:q4_0") == {
        **ends, "attention": linears[0] * 18 // 32, "ffn": linears[1] * 18 // 32, "norms": norms}
    assert bytes_by_group(SMALL, "gguf:f16") == {
        "embedding": 128_000, "head": 128_000, "attention": 2 * linears[0], "ffn": 2 * linears[1], "norms": norms}
    assert bytes_by_group(SMALL, "onnx:q4") == {
        "embedding": blocks * 36, "head": blocks * 36, "attention": linears[0] * 20 // 32,
        "ffn": linears[1] * 20 // 32, "norms": norms}
    assert bytes_by_group(replace(SMALL, tied=True), "gguf:q4_0")["head"] == 0


@pytest.mark.parametrize(("family", "tied", "hidden_size"), [
    ("llama", True, 64), ("qwen2", False, 64), ("qwen3", True, 64), ("llama", False, 40)])
def test_bytes_are_the_files(family: str, tied: bool, hidden_size: int, tmp_path: Path) -> None:
    """Width 40: 32 does not divide it, so GGUF falls back to F16 and ONNX pads."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", family, tied=tied, hidden_size=hidden_size,
                                                tokenizer="llama3" if family == "llama" else "qwen2"))
    written = export_gguf(checkpoint, tmp_path / "gguf", ["f16", "q8_0", "q4_0"])
    written += export_onnx(checkpoint, tmp_path / "onnx", ["q8", "q4"])
    found = {f"{a.format}:{a.encoding}": round(a.bits_per_weight * checkpoint.shape.n_params / 8) for a in written}
    assert found == {name: sum(bytes_by_group(checkpoint.shape, name).values()) for name in PROFILE_FORMATS}


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures through Linux's /proc")
def test_predictions_are_within_a_tenth_of_what_processes_take(tmp_path: Path) -> None:
    shapes = "small-weights,small-cache,small-vocabulary"
    rows = ("gguf:f16 in llama.cpp", "gguf:q4_0 in llama.cpp", "onnx:q4 in onnxruntime", "onnx:q4 in onnxruntime-genai")
    done = subprocess.run([sys.executable, str(BENCHMARK), "--work", str(tmp_path), "--shapes", shapes,
                           "--rows", ",".join(rows)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "fit.json").read_text())
    assert len(found) == 3 * len(rows)
    assert all(0.9 < row["predicted"] / row["measured"] < 1.1 for row in found), done.stdout


def test_llama_cpp_copies_what_its_kernels_repack() -> None:
    linears = sum(bytes_by_group(SMALL, "gguf:q4_0")[name] for name in ("attention", "ffn"))
    head = bytes_by_group(SMALL, "gguf:q4_0")["head"]

    def copies(format_: str, features: set[str], shape: ModelShape = SMALL) -> tuple[int, int]:
        memory = memory_of(shape, format_, "llama.cpp", 256, features)
        return memory.copies, memory.droppable

    assert copies("gguf:q4_0", {"avx2"}) == (linears, linears)  # Q8_0 has no such kernel on x86
    assert copies("gguf:q4_0", {"neon", "dotprod"}) == (linears + head, linears + head)
    assert copies("gguf:q4_0", {"neon"}) == copies("gguf:f16", {"avx2"}) == copies("gguf:q8_0", {"avx2"}) == (0, 0)
    # A tied head is copied, and its original is the embedding, which is read on.
    assert copies("gguf:q4_0", {"neon", "dotprod"}, replace(SMALL, tied=True)) == (linears + head, linears)


def test_the_cache_grows_with_the_context_and_not_with_the_width() -> None:
    for format_, n_bytes in (("gguf:q4_0", 2), ("onnx:q4", 4)):
        runtime = "llama.cpp" if format_ == "gguf:q4_0" else "onnxruntime"
        for shape in (SMALL, SMALL.with_hidden_size(32)):
            assert memory_of(shape, format_, runtime, 512, set()).kv_cache == 512 * 2 * 32 * n_bytes
    assert memory_of(SMALL, "gguf:q4_0", "llama.cpp", 257, set()).kv_cache == 512 * 2 * 32 * 2  # rounded up to 256


# Verdicts


def test_verdicts() -> None:
    memory = Memory(weights=500, copies=400, kv_cache=50, working=40, runtime=10, droppable=400)
    assert (memory.peak, memory.needed) == (1000, 600)
    verdicts = {usable: judge(memory, profile_with(usable / 1e9)) for usable in (1101, 1099, 600, 599)}
    assert verdicts == {1101: "fits", 1099: "tight", 600: "tight", 599: "does not fit"}


def test_a_model_that_does_not_fit_is_said_with_what_would() -> None:
    llama_1b = ModelShape("llama", 128_256, 2048, 8192, 16, 32, 8, 64, 131_072, tied=True)
    fit = check_fit(llama_1b, profile_with(8))
    assert fit.take is not None and fit.take.format == "gguf:q4_0" and fit.warning is None
    assert fit.context == load_profile("raspberry-pi-5").context
    long = check_fit(llama_1b, profile_with(4), 131_072)
    assert long.formats[0].verdict != "fits" and long.formats[0].longest_context < 131_072
    none = check_fit(llama_1b, profile_with(0.5))
    assert none.take is None and none.warning is not None and "\n" not in none.warning
    assert "raspberry-pi-5: does not fit at 2,048 tokens" in none.warning and "no context would" in none.warning


def test_the_longest_context_is_the_last_that_fits() -> None:
    shape = replace(SMALL, num_hidden_layers=16, num_key_value_heads=3, max_position_embeddings=100_000)
    profile = profile_with(0.2, "laptop-x86")
    fit = check_fit(shape, profile, 256)
    for row in fit.formats:
        assert 256 <= row.longest_context < 100_000 and row.longest_context % 256 == 0
        for context, fits in ((row.longest_context, True), (row.longest_context + 256, False)):
            memory = memory_of(shape, row.format, row.runtime, context, profile.features)
            assert (judge(memory, profile) != "does not fit") == fits


def test_another_format_is_taken_where_the_recommended_one_is_too_large() -> None:
    profile = replace(load_profile("laptop-x86"), recommended="gguf:f16")
    shape = ModelShape("llama", 32_000, 1024, 4096, 24, 16, 8, 64, 4096, tied=True)
    rows = {row.format: row for row in check_fit(shape, profile).formats}
    limit = (rows["gguf:f16"].memory.needed - 1) / 1e9
    small = replace(profile, usable_gb=Figure(limit, "a test", profile.cores.date))
    take = check_fit(shape, small).take
    assert take is not None and take.format != "gguf:f16"


@pytest.mark.parametrize("context", [0, -1, 513])
def test_a_context_that_the_model_lacks_is_refused(context: int) -> None:
    with pytest.raises(UserError, match=f"--context {context}: the model has positions for 1 to 512 tokens"):
        check_fit(SMALL, profile_with(1), context)


def test_the_profiles_context_is_cut_to_the_models() -> None:
    assert check_fit(SMALL, profile_with(1)).context == 512


def test_the_decode_bound_by_hand() -> None:
    sizes = bytes_by_group(SMALL, "gguf:q4_0")
    read = sum(sizes.values()) - sizes["embedding"] + 100 * 2 * 32 * 2
    assert bytes_read_per_token(SMALL, "gguf:q4_0", 100) == read
    assert check_fit(SMALL, profile_with(1), 100).formats[0].decode_bound == pytest.approx(17e9 / read)
    tied = replace(SMALL, tied=True)  # the embedding is the head
    assert bytes_read_per_token(tied, "gguf:q4_0", 100) == read


# The command line, where there is no torch


def lrc_edge(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that has none of the libraries that a device lacks."""
    absent = ("torch", "transformers", "gguf", "onnx", "datasets", "llama_cpp", "onnxruntime", "huggingface_hub")
    code = (f"import sys; sys.modules.update(dict.fromkeys({absent})); sys.argv = ['lrc-edge', *sys.argv[1:]]; "
            "from lrc_edge.cli import main; main()")
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """As much of SmolLM2-360M as is read: its config."""
    folder = tmp_path / "SmolLM2-360M"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
        "max_position_embeddings": 8192, "tie_word_embeddings": True}))
    return folder


def test_targets_lists_and_explains() -> None:
    listed = lrc_edge("targets")
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in ("android-low", "browser-phone", "6 of 8 GB", "gguf:q4_0"))
    shown = lrc_edge("targets", "show", "android-low")
    assert shown.returncode == 0, shown.stderr
    assert all(text in shown.stdout for text in ("cortex-a53", "our judgement", "https://", "2026-11-21", "onnx:q4"))


def test_fit_plans_the_student_beside_its_teacher(teacher: Path) -> None:
    done = lrc_edge("targets", "fit", str(teacher), "--target", "android-low", "--context", "512")
    assert done.returncode == 0, done.stderr
    assert "SmolLM2-360M-Edge-480 (student as planned)" in done.stdout
    assert "SmolLM2-360M (its teacher, unchanged): 362 M parameters" in done.stdout
    assert "take gguf:q4_0: fits" in done.stdout and "an upper bound, not a measurement" in done.stdout
    wider = lrc_edge("targets", "fit", str(teacher), "-t", "android-low", "--set", "student.hidden_size=720")
    assert "SmolLM2-360M-Edge-720" in wider.stdout
    cloned = lrc_edge("targets", "fit", str(teacher), "-t", "android-low", "--set", "train.dense_share=0")
    assert "SmolLM2-360M-LRC-480" in cloned.stdout
    (teacher / "lrc_edge.json").write_text("{}")  # a student, made here: it is no teacher
    alone = lrc_edge("targets", "fit", f"{teacher}/", "-t", "android-low")
    assert "SmolLM2-360M (model)" in alone.stdout and "teacher" not in alone.stdout


def test_fit_of_a_build_s_student(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "build.json").write_text(json.dumps({"stages": {}, "hashes": {}, "job": {"teacher": "unused"}}))
    early = lrc_edge("targets", "fit", str(out), "-t", "laptop-x86")
    assert early.returncode == 2 and "no student in it yet; give its teacher" in early.stderr
    teacher.rename(out / "student")
    done = lrc_edge("targets", "fit", str(out), "-t", "laptop-x86")
    assert done.returncode == 0 and "out (model)" in done.stdout and "teacher" not in done.stdout, done.stderr


def test_fit_fails_where_nothing_fits(teacher: Path, tmp_path: Path) -> None:
    own = tmp_path / "watch.toml"
    source = Path(profiles.__file__).parent / "profiles" / "android-low.toml"
    own.write_text(source.read_text().replace("value = 1\n", "value = 0.05\n"))
    done = lrc_edge("targets", "fit", str(teacher), "--target", str(own))
    assert done.returncode == 1 and "watch: does not fit at 1,024 tokens" in done.stdout, done.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    (("-t", "android-lo"), "did you mean android-low?"),
    (("-t", "android-low", "--context", "9000"), "positions for 1 to 8,192 tokens"),
    (("-t", "android-low", "--set", "student.hidden_size=960"), "such as hidden_size = 960; need a smaller student"),
])
def test_mistakes_get_one_line(teacher: Path, arguments: tuple[str, ...], said: str) -> None:
    done = lrc_edge("targets", "fit", str(teacher), *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_hub_id_without_the_hub_gets_one_line() -> None:
    done = lrc_edge("targets", "fit", "someone/model", "-t", "laptop-x86")
    assert done.returncode == 2 and "without huggingface_hub nothing can be downloaded" in done.stderr
