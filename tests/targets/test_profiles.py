"""Profiles of devices: the shipped ones are whole and say where every figure comes from; a bad file gets one line."""
from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from lrc_edge.errors import UserError
from lrc_edge.formats import format_of
from lrc_edge.targets import profile as profiles
from lrc_edge.targets.profile import Profile, all_profiles, load_profile, profile_names

SHIPPED = Path(profiles.__file__).parent / "profiles"
NAMES = {"laptop-x86", "laptop-arm64", "raspberry-pi-5", "android-high", "android-mid", "android-low",
         "browser-desktop", "browser-phone"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's file: a copy of a shipped one."""
    path = tmp_path / "my-device.toml"
    path.write_text((SHIPPED / "raspberry-pi-5.toml").read_text())
    return path


def test_the_eight_are_shipped() -> None:
    assert {profile.name for profile in all_profiles()} == NAMES == set(profile_names())


@pytest.mark.parametrize("profile", all_profiles(), ids=lambda profile: profile.name)
def test_a_shipped_profile_is_whole(profile: Profile) -> None:
    for figure in profile.figures.values():
        assert figure.value > 0 and figure.date >= datetime.date(2026, 1, 1)
        assert "https://" in figure.source or "our judgement" in figure.source, figure
    assert profile.recommended in profile.format_names
    for format_ in profile.formats:
        assert format_.why and format_of(format_.name).block <= 32  # any width can have it
        assert profile.runtime_of(format_.name) in profile.runtimes
    assert bool(profile.emulate) == (profile.architecture == "aarch64")
    assert profile.usable_bytes == profile.usable_gb.value * 1e9 <= profile.ram_gb.value * 1e9


def test_emulated_processors_have_the_profiles_features() -> None:
    assert {p.name: (p.emulate, p.features) for p in all_profiles() if p.emulate} == {
        "android-low": ("cortex-a53", ("neon",)),
        "android-mid": ("cortex-a76", ("neon", "dotprod")),
        "raspberry-pi-5": ("cortex-a76", ("neon", "dotprod")),
        "android-high": ("max", ("neon", "dotprod", "i8mm")),
        "laptop-arm64": ("max", ("neon", "dotprod", "i8mm"))}


def test_a_users_file_works(own: Path) -> None:
    own.write_text(own.read_text().replace("value = 6\n", "value = 2.5\n").replace('emulate = "cortex-a76"\n', ""))
    profile = load_profile(str(own))
    assert (profile.name, profile.usable_bytes, profile.emulate) == ("my-device", 2_500_000_000, "")


@pytest.mark.parametrize(("old", "new", "said"), [
    ("context = 2048\n", "", "context is missing; need a whole number"),
    ("context = 2048", "contxt = 2048", "unknown key contxt; did you mean context?"),
    ("context = 2048", 'context = "2k"', "context = '2k': need a whole number"),
    ("context = 2048", "context = 0", "context = 0: need 1 or more"),
    ('"aarch64"', '"arm64"', "architecture = 'arm64': need one of x86_64, aarch64, wasm32"),
    ('"dotprod"', '"dotproduct"', "features = 'dotproduct': need one of"),
    ('"llama.cpp", ', "", "formats has gguf:q4_0, and none of its runtimes (llama.cpp, node-llama-cpp, wllama)"),
    ('"llama.cpp"', '"llama"', "runtimes = 'llama': need one of llama.cpp"),
    ('name = "gguf:q8_0"', 'name = "gguf:q4_k_m"', "formats = 'gguf:q4_k_m': need one of gguf:f16, gguf:q4_0"),
    ('recommended = "gguf:q4_0"', 'recommended = "gguf:f16"', "recommended = 'gguf:f16': need one of gguf:q4_0"),
    ("value = 17\n", "value = -17\n", "bandwidth_gb_s.value = -17: need a number above 0"),
    ("value = 17\n", 'value = "17"\n', "bandwidth_gb_s.value = '17': need a number"),
    ("value = 6\n", "value = inf\n", "usable_gb.value = inf: need a number above 0"),
    ("value = 6\n", "value = true\n", "usable_gb.value = True: need a number"),
    ("value = 6\n", "value = 9\n", "usable_gb.value = 9: need no more than ram_gb.value, 8"),
    ("value = 6\n", "", "usable_gb.value is missing"),
    ("date = 2026-11-21", 'date = "lately"', "cores.date = 'lately': need a date"),
    ('source = "BCM2712, quad', 'origin = "BCM2712, quad', "unknown key cores.origin"),
    ('source = "our judgement: 8 GB less what a desktop with a few windows keeps"', 'source = " "',
     "usable_gb.source is empty; need where the figure comes from"),
    ("[cores]", "[cores", "not TOML"),
], ids=lambda text: text.strip()[:24])
def test_a_bad_file_gets_its_line(own: Path, old: str, new: str, said: str) -> None:
    text = own.read_text()
    assert old in text
    own.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_profile(str(own))
    assert str(error.value).startswith(f"{own}: ") and said in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'rasberry-pi' is unknown; did you mean raspberry-pi-5\?"):
        load_profile("rasberry-pi")


def test_an_absent_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.toml: cannot read the profile"):
        load_profile(str(tmp_path / "absent.toml"))


def test_a_file_named_like_a_target_that_comes_along_is_refused(own: Path, tmp_path: Path) -> None:
    """Its results would stand for the other's."""
    (same := tmp_path / "raspberry-pi-5.toml").write_text(own.read_text())
    with pytest.raises(UserError, match="give the file another name"):
        load_profile(str(same))
