"""The runtimes that a profile may name: what each reads, what it needs, how its worker is started here."""
from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from lrc_edge.machine import architecture
from lrc_edge.targets import browser, emulation
from lrc_edge.targets.kits import Kit, Pip, Unavailable
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.web_kits import CHROMIUM, NODE_LLAMA_CPP, PLAYWRIGHT, TRANSFORMERS_JS, WLLAMA
from lrc_edge.targets.worker import Command

Start = Callable[[Path], AbstractContextManager[Command]]  # given the folder that the artifact lies in

PYTHON = {  # name -> what it reads, whether it has a tokenizer, where it comes from
    "llama.cpp": ("gguf", True, Pip("llama-cpp-python", "llama_cpp", "0.3.36")),
    "onnxruntime": ("onnx", False, Pip("onnxruntime", "onnxruntime", "1.31.1")),
    "onnxruntime-genai": ("onnx", False, Pip("onnxruntime-genai", "onnxruntime_genai", "0.18.0")),
}


@dataclass(frozen=True)
class DeviceRuntime:
    """One runtime as a device of a profile has it, on this machine."""

    name: str  # as profiles name it, and the emulated processor
    format: str  # "gguf" | "onnx"
    reads_text: bool  # it has a tokenizer that says what Hugging Face's says
    kits: tuple[Kit, ...]
    start: Start
    here: bool = False  # on the device's kind of processor, in no browser: its memory and time are real
    timed: bool = False  # its worker measures speed
    slow: bool = False  # emulated: a tenth to a hundredth of the real speed
    page: bool = False  # a page in a browser: what it asks of the network is watched


def is_here(profile: Profile) -> bool:
    """Whether this machine has the profile's kind of processor."""
    return profile.architecture == architecture()


def runtimes_of(profile: Profile) -> list[DeviceRuntime]:
    """The profile's runtimes: its own where this machine has its processor, emulated where it has not."""
    return [_runtime(name, profile) for name in profile.runtimes]


def _runtime(name: str, profile: Profile) -> DeviceRuntime:
    if name in PYTHON:
        format_, reads_text, kit = PYTHON[name]
        if is_here(profile):
            return DeviceRuntime(name, format_, reads_text, (kit,), _python_worker(name), here=True, timed=True)
        if profile.emulate and name in emulation.RUNTIMES:
            return DeviceRuntime(f"{name}, emulated {profile.emulate}", format_, reads_text, emulation.KITS,
                                 lambda _: emulation.command(name, profile.emulate), slow=True)
        return DeviceRuntime(name, format_, reads_text, (_elsewhere(profile),), _python_worker(name))
    if name == "node-llama-cpp":
        kits = (NODE_LLAMA_CPP,) if is_here(profile) else (_elsewhere(profile),)
        return DeviceRuntime(name, "gguf", True, kits, lambda _: nullcontext(browser.node_command()), here=True)
    format_, kit = {"wllama": ("gguf", WLLAMA), "transformers.js": ("onnx", TRANSFORMERS_JS)}[name]
    return DeviceRuntime(name, format_, True, (CHROMIUM, PLAYWRIGHT, kit), lambda folder: browser.command(name, folder),
                         page=True)


def _elsewhere(profile: Profile) -> Unavailable:
    return Unavailable(f"this machine is {architecture()}, {profile.name} is {profile.architecture}; check it there")


def _python_worker(name: str) -> Start:
    return lambda _: nullcontext(Command((sys.executable, "-m", "lrc_edge.targets.python_worker", name)))
