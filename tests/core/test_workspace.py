"""The build directory: what is done, what must run again, what a failure leaves behind."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from lrc_edge.errors import UserError
from lrc_edge.workspace import PARTIAL, Workspace, changes, free_bytes, replace_tree, write_atomically


def test_a_stage_is_done_until_its_inputs_or_outputs_change(tmp_path: Path) -> None:
    build = Workspace.create(tmp_path / "out")
    file = build.path / "gguf" / "a.gguf"
    file.parent.mkdir()
    file.write_text("one")
    inputs = {"x": (1,)}
    assert not build.is_done("gguf", inputs)
    build.record("gguf", inputs, [build.path / "gguf"], result={"n": 3})

    again = Workspace.create(tmp_path / "out")
    assert again.is_done("gguf", inputs) and again.result("gguf") == {"n": 3}
    assert not again.is_done("gguf", {"x": (2,)}) and not again.is_done("onnx", inputs)
    file.write_text("two")
    assert not again.is_done("gguf", inputs)
    file.write_text("one")
    assert again.is_done("gguf", inputs)
    file.unlink()
    assert not again.is_done("gguf", inputs)


def test_what_changed_is_named() -> None:
    before = {"train.tokens": 1000, "data": "a" * 64, "formats": ["q8_0"], "gone": 1}
    now = {"train.tokens": 2000, "data": "b" * 64, "formats": ("q8_0",), "new": "x" * 100}
    assert changes(before, now) == ["train.tokens was 1000, is 2000", "data was aaaaaaaa, is bbbbbbbb",
                                    "gone was 1, is None", f"new was None, is {'x' * 60}..."]
    assert changes({}, now) == ["recorded by an earlier version of lrc-edge"]
    many = {str(i): i for i in range(9)}
    assert changes(many, dict.fromkeys(many, -1))[-1] == "3 more"
    assert changes(None, now) == changes({**now, "formats": ["q8_0"]}, now) == []


def test_a_stage_that_an_older_version_recorded_runs_again(tmp_path: Path) -> None:
    build = Workspace.create(tmp_path)
    build.manifest["stages"]["gguf"] = {"fingerprint": "f", "outputs": {}, "result": 1}
    assert not build.is_done("gguf", {"x": 1}) and changes(build.inputs("gguf"), {"x": 1})


def test_a_change_of_the_same_size_and_time_is_noticed_by_a_new_process(tmp_path: Path) -> None:
    """The remembered hash is trusted for the same size and nanosecond only."""
    build = Workspace.create(tmp_path)
    file = tmp_path / "a"
    file.write_text("one")
    first = build.hash(file)
    os.utime(file, ns=(1, 1))
    file.write_text("two")
    assert build.hash(file) != first


def test_partial_work_disappears_when_it_fails_or_was_killed(tmp_path: Path) -> None:
    build = Workspace.create(tmp_path)
    with pytest.raises(RuntimeError), build.partial("gguf") as partial:
        partial.mkdir()
        (partial / "half").write_text("x")
        raise RuntimeError
    assert not (tmp_path / PARTIAL).exists()
    (tmp_path / PARTIAL / "left-by-a-kill").mkdir(parents=True)
    Workspace.create(tmp_path)
    assert not (tmp_path / PARTIAL).exists()


def test_replace_tree_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_tree(tmp_path / "new", tmp_path / "old")
    assert [f.name for f in (tmp_path / "old").iterdir()] == ["new"]


def test_atomic_write_keeps_the_old_text_on_failure(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_and_broken_directories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there"):
        Workspace.create(tmp_path / "file" / "out")
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="not a build manifest"):
        Workspace.create(tmp_path)


def test_a_manifest_with_another_content_is_refused(tmp_path: Path) -> None:
    """Commands trust what it holds, so any change that is not ours must be found; without a job none is signed."""
    build = Workspace.create(tmp_path)
    build.manifest |= {"lrc_edge": "0.1.0", "job": {"recipe": {}, "teacher": "x"}}
    build.record("gguf", {}, [], result=({"n": 3, 4: float("inf")},))
    assert Workspace(tmp_path).result("gguf") == [{"n": 3, "4": float("inf")}]
    file = tmp_path / "build.json"
    whole = file.read_text()
    for old, new, message in (('"n": 3', '"n": 4', "damaged, or of an"), ('"sha256"', '"sha255"', "damaged, or of an"),
                              ('"stages": {', '"stages": 3, "x": {', "must be tables"),
                              ("{", "[" * 100_000, "not a build manifest"), ('"job"', '"jo', "not a build manifest")):
        file.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            Workspace(tmp_path)


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0
