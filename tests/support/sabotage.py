"""Faults in a runtime, from outside: a sitecustomize on PYTHONPATH that every Python process of a run imports.

Code puts a function into `_wrapped` under the name of one of llama.cpp's: it is called instead, with the real one as
its first argument.
"""
from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

PREAMBLE = '''
import ctypes, os, signal, sys, time

_wrapped = {}

class _Function:
    """In place of a ctypes function, to which llama_cpp gives its types."""
    def __init__(self, real, replacement):
        self.real, self.replacement = real, replacement
    def __setattr__(self, name, value):
        if name in ("argtypes", "restype"):
            setattr(self.real, name, value)
        else:
            super().__setattr__(name, value)
    def __call__(self, *args):
        return self.replacement(self.real, *args)

_getattr = ctypes.CDLL.__getattr__

def _patched(self, name):
    function = _getattr(self, name)
    return _Function(function, _wrapped[name]) if name in _wrapped else function

ctypes.CDLL.__getattr__ = _patched

def die(name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(60)
'''
# What AMX kernels do that gcc 12 compiled: with extra buffers, a product of two tokens or more ends the process.
AMX_CRASH = '''
state = {"extra": True}

def load(call, path, params):
    state["extra"] = params.use_extra_bufts
    return call(path, params)

def decode(call, context, batch):
    if state["extra"] and batch.n_tokens >= 2:
        die("SIGSEGV")
    return call(context, batch)

_wrapped["llama_model_load_from_file"] = load
_wrapped["llama_decode"] = decode
'''


def sabotage(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every Python child process runs `code` when it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(PREAMBLE + textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("LRC_EDGE_CACHE", str(folder / "cache"))  # what a sabotaged probe finds stays here


def before_decode(code: str) -> str:
    """`code` runs at each llama_decode, whose batch is `batch`."""
    return ("def decode(call, context, batch):\n" + textwrap.indent(textwrap.dedent(code).strip(), "    ")
            + "\n    return call(context, batch)\n_wrapped['llama_decode'] = decode\n")
