"""The table of runtimes is total: a row that is missing is an error that names it, never another runtime."""
from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from lrc_edge.errors import UserError
from lrc_edge.formats import FORMATS, Kind
from lrc_edge.pipeline.target_commands import kits_named
from lrc_edge.shape import ModelShape
from lrc_edge.targets import memory
from lrc_edge.targets.devices import browser, emulated_worker, emulation
from lrc_edge.targets.memory import memory_of
from lrc_edge.targets.profile import PROFILE_FORMATS, all_profiles, load_profile
from lrc_edge.targets.proof.chat_parity import ENGINES
from lrc_edge.targets.runtimes import table
from lrc_edge.targets.runtimes.llamacpp import CACHES
from lrc_edge.targets.runtimes.python_worker import OPEN, PythonWorker
from lrc_edge.targets.runtimes.table import (
    RUNTIMES,
    native_command,
    readers_of,
    runtime_named,
    runtimes_of,
    verifiers_of,
)

SHAPE = ModelShape(family="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=16, intermediate_size=128, vocab_size=256, max_position_embeddings=512, tied=True)
IN_PYTHON = [name for name, row in RUNTIMES.items() if row.python_flags]  # ordered: test workers must agree


def test_what_stands_beside_the_table_has_its_names() -> None:
    assert OPEN.keys() == emulation.BUILDS.keys() == emulated_worker.PREPARE.keys() == set(IN_PYTHON)
    assert browser.KITS.keys() == browser.MODULES.keys() == {name for name, row in RUNTIMES.items() if row.in_page}
    assert memory._PREDICTIONS.keys() == RUNTIMES.keys()
    assert {"f32", *RUNTIMES["llama.cpp"].caches} == CACHES.keys()
    assert all(f"gguf:{cache}" in FORMATS for row in RUNTIMES.values() for cache in row.caches)
    assert {engine for row in RUNTIMES.values() for engine in row.chat_engines} == ENGINES.keys()
    assert all(row.chat_engines for row in RUNTIMES.values() if row.verifies != "nothing" and row.tokenizes)


def test_the_runtimes_of_each_kind() -> None:
    assert {row.reads for row in RUNTIMES.values()} == {row.kind for row in FORMATS.values()} == set(get_args(Kind))
    assert readers_of("gguf") == ("llama.cpp", "node-llama-cpp", "wllama")
    assert readers_of("onnx") == ("onnxruntime-genai", "onnxruntime", "transformers.js")
    for kind, names in {"gguf": ["llama.cpp"], "onnx": ["onnxruntime", "onnxruntime-genai"]}.items():
        first, others = verifiers_of(kind)
        assert [row.name for row in (first, *others)] == names


@pytest.mark.parametrize("name", RUNTIMES)
def test_without_a_row_its_name_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = next(profile for profile in all_profiles() if name in profile.runtimes)
    row, known = RUNTIMES[name], ", ".join(other for other in RUNTIMES if other != name)
    monkeypatch.delitem(table.RUNTIMES, name)
    for use in (lambda: runtime_named(name), lambda: runtimes_of(profile), lambda: native_command(name)):
        with pytest.raises(UserError, match=f"runtime '{name}' is unknown; known: {known}"):
            use()
    with pytest.raises(UserError, match=f"target '{name}' is unknown"):
        kits_named(name)
    with pytest.raises(UserError, match=f"runtimes = '{name}': need one of {known}"):
        load_profile(profile.name)
    with pytest.raises(UserError, match=f" in {name}: only {', '.join(readers_of(row.reads))} read it"):
        memory_of(SHAPE, next(f for f in PROFILE_FORMATS if f.startswith(row.reads)), name, 64, set())
    if row.verifies == "logits":
        with pytest.raises(UserError, match=f"no runtime gives the logits of {row.reads} files"):
            verifiers_of(row.reads)


@pytest.mark.parametrize("name", IN_PYTHON)
def test_without_its_row_a_python_runtime_does_not_open(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPEN, name)
    with pytest.raises(KeyError, match=name):
        PythonWorker(name)


@pytest.mark.parametrize("name", sorted(RUNTIMES.keys() - IN_PYTHON))
def test_only_python_runtimes_start_here(name: str) -> None:
    with pytest.raises(UserError, match=f"runtime {name} has no Python bindings; these have: llama.cpp, onnxruntime-"):
        native_command(name)


@pytest.mark.parametrize("name", RUNTIMES)
def test_no_prediction_for_files_that_a_runtime_does_not_read(name: str) -> None:
    for format_ in PROFILE_FORMATS:
        if FORMATS[format_].kind == RUNTIMES[name].reads:
            assert memory_of(SHAPE, format_, name, 64, set()).runtime > 40e6
        else:
            with pytest.raises(UserError, match=f"{format_} in {name}: only "):
                memory_of(SHAPE, format_, name, 64, set())


def test_only_this_machines_processor_is_timed() -> None:
    here = [replace(profile, architecture=table.architecture()) for profile in all_profiles()]
    for profile in here:
        for runtime in runtimes_of(profile):
            assert runtime.timed == (runtime.name in IN_PYTHON) and not runtime.emulated
    for profile in (replace(profile, architecture="riscv64") for profile in all_profiles()):
        assert not any(runtime.timed for runtime in runtimes_of(profile))
