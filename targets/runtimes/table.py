"""The runtimes: one row each with everything that differs between them, and how they run on this machine.

A profile names rows. Code that treats runtimes differently reads a field of the row and never compares names.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lrc_edge.errors import UserError
from lrc_edge.formats import Kind
from lrc_edge.machine import architecture
from lrc_edge.targets.devices import browser, emulation, node_llama
from lrc_edge.targets.devices.kits import Kit, Pip, Unavailable
from lrc_edge.targets.runtimes.llama_probe import extra_buffers
from lrc_edge.targets.runtimes.python_worker import NO_SPINNING, PLAIN_BUFFERS
from lrc_edge.targets.runtimes.worker import Command

if TYPE_CHECKING:
    from lrc_edge.targets.profile import Profile  # which reads this table

# Called with a folder that contains the artifact, and for a browser everything that belongs to it.
Start = Callable[[Path], AbstractContextManager[Command]]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One row of the table."""

    name: str  # as profiles name it
    reads: Kind
    kits: tuple[Kit, ...]  # what it needs to run on this machine
    on_device: Callable[[Runtime, Profile], DeviceRuntime]  # how its worker starts here
    # Further arguments of python_worker, which opens a runtime with Python bindings; None: it has none.
    python_flags: Callable[[], list[str]] | None = None
    # Its part in verifying a build's files on this machine. "logits": it is compared with PyTorch, position by
    # position; "text": it generates, renders chats and ends texts.
    verifies: Literal["logits", "text", "nothing"] = "nothing"
    gate_suffix: str = ""  # of its gates' names, where another runtime has gates of the same name
    tokenizes: bool = True  # it has a tokenizer, which must give Hugging Face's ids
    caches: tuple[str, ...] = ()  # types that its KV cache can have, the largest first; empty: one type only
    chat_engines: tuple[str, ...] = ()  # what can render a chat (chat_parity.ENGINES); the first is judged
    ends_texts: bool = False  # it stops at an end of text, whatever stop ids it is asked for
    in_page: bool = False  # it runs in a browser's page, whose network requests are watched


@dataclass(frozen=True, kw_only=True)
class DeviceRuntime:
    """A runtime as this machine can run it for one device."""

    row: Runtime
    kits: tuple[Kit, ...]
    start: Start
    timed: bool = False  # its speed here is the device's
    emulated: str = ""  # the processor, if it is emulated: a tenth to a hundredth of the real speed

    @property
    def name(self) -> str:
        return self.row.name


def is_here(profile: Profile) -> bool:
    """Whether this machine has the profile's kind of processor."""
    return profile.architecture == architecture()


def _in_python(row: Runtime, profile: Profile) -> DeviceRuntime:
    """Run in this Python if the machine has the device's processor, else in an emulated one."""
    if is_here(profile):
        return DeviceRuntime(row=row, kits=row.kits, start=native_start(row.name), timed=True)
    if profile.emulate and profile.architecture == "aarch64":
        return DeviceRuntime(row=row, kits=(emulation.KIT,), emulated=profile.emulate,
                             start=lambda _: nullcontext(emulation.command(row.name, profile.emulate)))
    return DeviceRuntime(row=row, kits=(_elsewhere(profile),), start=native_start(row.name))


def _in_node(row: Runtime, profile: Profile) -> DeviceRuntime:
    return DeviceRuntime(row=row, kits=row.kits if is_here(profile) else (_elsewhere(profile),),
                         start=lambda _: nullcontext(node_llama.command()))


def _in_page(row: Runtime, profile: Profile) -> DeviceRuntime:
    return DeviceRuntime(row=row, kits=row.kits, start=partial(browser.command, row.name))


def native_start(name: str) -> Start:
    """Return how a worker in this Python starts."""
    return lambda _: nullcontext(native_command(name))


def _elsewhere(profile: Profile) -> Unavailable:
    return Unavailable(f"this machine is {architecture()}, {profile.name} is {profile.architecture}; check it there")


def _llama_cpp_flags() -> list[str]:
    return [] if extra_buffers().usable else [PLAIN_BUFFERS]


RUNTIMES = {row.name: row for row in (
    Runtime(name="llama.cpp", reads="gguf", kits=(Pip("llama-cpp-python", "llama_cpp", emulation.LLAMA_CPP_PYTHON),),
            on_device=_in_python, python_flags=_llama_cpp_flags, verifies="logits", caches=("f16", "q8_0", "q4_0"),
            chat_engines=("jinja", "c_api", "server")),
    Runtime(name="node-llama-cpp", reads="gguf", kits=node_llama.KITS, on_device=_in_node),
    Runtime(name="wllama", reads="gguf", kits=browser.KITS["wllama"], on_device=_in_page, in_page=True),
    Runtime(name="onnxruntime-genai", reads="onnx",
            kits=(Pip("onnxruntime-genai", "onnxruntime_genai", emulation.GENAI),), on_device=_in_python,
            python_flags=list, verifies="text", gate_suffix=", genai", chat_engines=("jinja",), ends_texts=True),
    Runtime(name="onnxruntime", reads="onnx", kits=(Pip("onnxruntime", "onnxruntime", emulation.ONNXRUNTIME),),
            on_device=_in_python, python_flags=list, verifies="logits", tokenizes=False),
    Runtime(name="transformers.js", reads="onnx", kits=browser.KITS["transformers.js"], on_device=_in_page,
            in_page=True))}


def runtime_named(name: str) -> Runtime:
    """Return the row. Raises UserError with the known names."""
    if name not in RUNTIMES:
        raise UserError(f"runtime {name!r} is unknown; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def readers_of(kind: Kind) -> tuple[str, ...]:
    """Return the names of the runtimes that read files of this kind."""
    return tuple(row.name for row in RUNTIMES.values() if row.reads == kind)


def verifiers_of(kind: str) -> tuple[Runtime, tuple[Runtime, ...]]:
    """Return the runtime whose logits are compared with PyTorch, and the others that run the same files."""
    rows = [row for row in RUNTIMES.values() if row.reads == kind]
    for row in rows:
        if row.verifies == "logits":
            return row, tuple(other for other in rows if other.verifies == "text")
    raise UserError(f"no runtime gives the logits of {kind} files, so they cannot be verified; leave {kind} out of "
                    f"--formats (runtimes: {', '.join(RUNTIMES)})")


def runtimes_of(profile: Profile) -> list[DeviceRuntime]:
    """Return the profile's runtimes, as this machine can run them."""
    return [row.on_device(row, profile) for row in map(runtime_named, profile.runtimes)]


def native_command(name: str, spinning: bool = True) -> Command:
    """Return the command for a worker in this Python. Raises UserError for a runtime without Python bindings.

    spinning: threads wait for each other without sleeping. That is the runtimes' default and the fastest on an idle
    machine; next to other work it costs several times the CPU time (docs/LOG.md).
    """
    python_flags = runtime_named(name).python_flags
    if python_flags is None:
        known = ", ".join(row.name for row in RUNTIMES.values() if row.python_flags)
        raise UserError(f"runtime {name} has no Python bindings; these have: {known}")
    flags = python_flags() + ([] if spinning else [NO_SPINNING])
    return Command((sys.executable, "-P", "-m", "lrc_edge.targets.runtimes.python_worker", name, *flags),
                   {} if spinning else {"OMP_WAIT_POLICY": "passive"})
