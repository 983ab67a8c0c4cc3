"""The recipe refuses unknown keys and impossible values, suggests the nearest key, and prints itself with comments."""
from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from lrc_edge.errors import UserError
from lrc_edge.recipe import Recipe, key, load_recipe, to_toml


def test_defaults_file_settings_and_overrides_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[student]\nhidden_size = 512\n[train]\ntokens = 1e9\nalpha = 1\n'
                    '[export]\nformats = ["gguf:f32"]\n')
    recipe = load_recipe(file, ["student.hidden_size=256", "train.init=gaussian"], data={"sources": ["a.txt"]})
    assert recipe.student.hidden_size == 256 and recipe.train.tokens == 1_000_000_000
    assert recipe.train.alpha == 1.0 and isinstance(recipe.train.alpha, float)
    assert recipe.train.init == "gaussian" and recipe.export.formats == ("gguf:f32",)
    assert recipe.data.sources == ("a.txt",) and recipe.gates == Recipe().gates


def test_toml_of_a_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(None, ['student.name=A "B"', "train.learning_rate=3e-4", "export.formats=gguf:f32,onnx:fp32"])
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "r.toml") == recipe


@pytest.mark.parametrize(("setting", "message"), [
    ("student.hiden_size=3", "did you mean student.hidden_size"),
    ("train.hidden_size=3", "did you mean student.hidden_size"),
    ("trian.tokens=1", "did you mean train"),
    ("train.lr=1e-3", "known here: tokens"),
    ("train.precision=fp8", "need one of auto, bf16, fp32"),
    ("train.tokens=many", "need a whole number"),
    ("train.tokens=1.5", "need a whole number"),
    ("train.tokens=-1", "train.tokens = -1: need at least 0"),
    ("train.alpha=nan", "train.alpha = nan: need at least 0"),
    ("parity.long_rows=[4096, -1]", "parity.long_rows = -1: need at least 0"),
    ("train.dense_share=1.5", "need at least 0 and at most 1"),
    ("train.warmup_share=1", "need at least 0 and less than 1"),
    ("train.seq_len=0", "need at least 1"),
    ("train.alpha=-1", "need at least 0"),
    ("train.learning_rate=-1", "need at least 0"),
    ("train.kl_temperature=0", "need more than 0"),
    ("train.alpha=true", "need a float"),
    ("data.weights=[1, 2]", "2 weights for 0 sources; need one each"),
    ("data.weights=one", "need a list of numbers"),
    ("data.weights=[true]", "need a list of numbers"),
    ("data.sources=self", "train.tokens"),
    ("data.sources=self,self", "more than once"),
    ("data.isolate_documents=1", "need a bool"),
    ("data.conversation_loss=questions", "need one of answers, all"),
    ("data.filters=score is 4", "'score is 4' is not a condition"),
    ("data.held_out_share=1", "need more than 0 and less than 1"),
    ("parity.prompts=3", "need a list of strings"),
    ("tokens=3", "need section.key=value"),
    ("train.tokens", "need section.key=value"),
    ("train=3", "need section.key=value"),
])
def test_wrong_settings(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(None, [setting])
    assert setting in str(caught.value) or "recipe:" in str(caught.value)


@pytest.mark.parametrize("text", ["2,0.5", "[2, 0.5]", '["2", "0.5"]'])
def test_weights(text: str, tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data.sources=a.txt,b.txt", f"data.weights={text}"])
    assert recipe.data.weights == (2.0, 0.5)
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "r.toml") == recipe
    for bad in ("0,1", "1,-1", "1,inf", "1,nan"):
        with pytest.raises(UserError, match="need finite numbers above 0"):
            load_recipe(None, ["data.sources=a.txt,b.txt", f"data.weights={bad}"])


@pytest.mark.parametrize("name", ["lrc-1.5b", "lrc-1.7b", "lrc-4b", "edge-1.5b", "edge-1.7b", "edge-4b"])
def test_built_in_recipes_print_values_that_read_back(name: str, tmp_path: Path) -> None:
    recipe, paper = load_recipe(name), name.startswith("lrc")
    printed = to_toml(recipe)
    assert f'init = "{"gaussian" if paper else "pca"}"' in printed.splitlines()
    assert f"kl_temperature = {40.0 if paper else 1.0}" in printed.splitlines()
    (tmp_path / "r.toml").write_text(printed)
    assert load_recipe(tmp_path / "r.toml") == recipe


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"lrc-9b: .* edge-1.5b, edge-1.7b, edge-4b, lrc-1.5b, lrc-1.7b, lrc-4b$"):
        load_recipe("lrc-9b")


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(tmp_path / "missing.toml")
    file = tmp_path / "r.toml"
    file.write_text("[train\n")
    with pytest.raises(UserError, match="not TOML"):
        load_recipe(file)
    file.write_text("train = 3\n")
    with pytest.raises(UserError, match="need a table"):
        load_recipe(file)
    file.write_text("[train]\nlearnin_rate = 3.0\n")
    with pytest.raises(UserError, match=r"r.toml: unknown recipe key 'train.learnin_rate'; did you mean"):
        load_recipe(file)


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        load_recipe(None, ["train.dense_alpha=0", "train.lm_weight=0", "train.kl_weight=0"])


def test_every_key_is_explained() -> None:
    """The printed recipe has a comment with the help text above each section and each key."""
    lines = to_toml(Recipe()).splitlines()
    sections = {f.name: dataclasses.fields(getattr(Recipe(), f.name)) for f in dataclasses.fields(Recipe)}
    explained = [line.split(" = ")[0] for above, line in itertools.pairwise(lines)
                 if above.startswith("# ") and line and not line.startswith("# ")]
    assert explained == [n for section, keys in sections.items() for n in (f"[{section}]", *(key.name for key in keys))]
    words = " ".join(line.removeprefix("# ") for line in lines)
    assert all(field.metadata["help"] in words for keys in sections.values() for field in keys)


def test_a_bound_that_nothing_checks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown bounds \['atleast'\]; known \['above', 'at_least', "):
        key(0, "a count", atleast=1)


def test_a_targets_file_is_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('[export]\ntargets = ["raspberry-pi-5", "./mine.toml"]\n')
    targets = load_recipe("recipe.toml").export.targets
    assert targets == ("raspberry-pi-5", str(tmp_path / "mine.toml"))
