"""The runtimes that a profile may name: what each reads, what it needs, how its worker is started here."""
from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lrc_edge.machine import architecture
from lrc_edge.targets.devices import browser, emulation, node_llama
from lrc_edge.targets.devices.kits import Kit, Pip, Unavailable
from lrc_edge.targets.profile import Profile, load_profile
from lrc_edge.targets.runtimes.llama_probe import extra_buffers
from lrc_edge.targets.runtimes.python_worker import NO_SPINNING, PLAIN_BUFFERS
from lrc_edge.targets.runtimes.worker import Command

# Given a folder that the artifact, and in a browser all that belongs to it, lies below.
Start = Callable[[Path], AbstractContextManager[Command]]

@dataclass(frozen=True)
class PythonRuntime:
    """A runtime with Python bindings, which python_worker.py opens."""

    name: str
    format: str  # "gguf" | "onnx"
    reads_text: bool  # it has a tokenizer that says what Hugging Face's says
    kit: Kit


PYTHON = {runtime.name: runtime for runtime in (
    PythonRuntime("llama.cpp", "gguf", True, Pip("llama-cpp-python", "llama_cpp", "0.3.36")),
    PythonRuntime("onnxruntime", "onnx", False, Pip("onnxruntime", "onnxruntime", "1.31.1")),
    PythonRuntime("onnxruntime-genai", "onnx", False, Pip("onnxruntime-genai", "onnxruntime_genai", "0.18.0")))}
# Format -> the runtimes that prove a build's files on this machine: the first is compared with PyTorch, position by
# position; the others run the same files their own way.
PROOF = {"gguf": ("llama.cpp",), "onnx": ("onnxruntime", "onnxruntime-genai")}


@dataclass(frozen=True, kw_only=True)
class DeviceRuntime:
    """One runtime as a device of a profile has it, on this machine."""

    name: str  # as profiles name it
    format: str  # "gguf" | "onnx"
    reads_text: bool  # it has a tokenizer that says what Hugging Face's says
    kits: tuple[Kit, ...]
    start: Start
    here: bool = False  # on the device's kind of processor, in no browser: its memory and time are real
    timed: bool = False  # its worker measures speed
    emulated: str = ""  # the processor, where it is: a tenth to a hundredth of the real speed
    page: bool = False  # a page in a browser: what it asks of the network is watched


def is_here(profile: Profile) -> bool:
    """Whether this machine has the profile's kind of processor."""
    return profile.architecture == architecture()


def runtimes_of(profile: Profile) -> list[DeviceRuntime]:
    """The profile's runtimes: its own where this machine has its processor, emulated where it has not."""
    return [_runtime(name, profile) for name in profile.runtimes]


def kits_named(name: str) -> tuple[Kit, ...]:
    """What `lrc-edge targets setup NAME` installs: of a target, or of one runtime by its name.

    Raises UserError for what is neither.
    """
    single = {**{runtime.name: (runtime.kit,) for runtime in PYTHON.values()}, **browser.KITS,
              "node-llama-cpp": node_llama.KITS, "aarch64": (emulation.KIT,)}
    return single[name] if name in single else tuple(kit for runtime in runtimes_of(load_profile(name))
                                                     for kit in runtime.kits)


def _runtime(name: str, profile: Profile) -> DeviceRuntime:
    if name in PYTHON:
        return _python_runtime(name, profile)
    if name == "node-llama-cpp":
        return DeviceRuntime(name=name, format="gguf", reads_text=True, here=True,
                             start=lambda _: nullcontext(node_llama.command()),
                             kits=node_llama.KITS if is_here(profile) else (_elsewhere(profile),))
    return DeviceRuntime(name=name, format=browser.FORMATS[name], reads_text=True, page=True,
                         kits=browser.KITS[name], start=partial(browser.command, name))


def _python_runtime(name: str, profile: Profile) -> DeviceRuntime:
    common = partial(DeviceRuntime, name=name, format=PYTHON[name].format, reads_text=PYTHON[name].reads_text)
    if is_here(profile):
        return common(kits=(PYTHON[name].kit,), start=_native(name), here=True, timed=True)
    if profile.emulate and profile.architecture == "aarch64":
        return common(kits=(emulation.KIT,), start=_emulated(name, profile.emulate), emulated=profile.emulate)
    return common(kits=(_elsewhere(profile),), start=_native(name))


def _emulated(name: str, cpu: str) -> Start:
    return lambda _: nullcontext(emulation.command(name, cpu))


def _elsewhere(profile: Profile) -> Unavailable:
    return Unavailable(f"this machine is {architecture()}, {profile.name} is {profile.architecture}; check it there")


def _native(name: str) -> Start:
    return lambda _: nullcontext(native_command(name))


def native_command(name: str, spinning: bool = True) -> Command:
    """A worker with one of PYTHON's runtimes on this machine. Raises KeyError for another name.

    spinning: its threads wait for each other without sleeping, which is the runtimes' default and fastest where nothing
    else runs; beside other work it costs several times the CPU time (docs/LOG.md).
    """
    flags = [PLAIN_BUFFERS] if name == "llama.cpp" and not extra_buffers().usable else []
    flags += [] if spinning else [NO_SPINNING]
    return Command((sys.executable, "-P", "-m", "lrc_edge.targets.runtimes.python_worker", PYTHON[name].name, *flags),
                   {} if spinning else {"OMP_WAIT_POLICY": "passive"})
