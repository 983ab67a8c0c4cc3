"""The kits of browsers and of node. `lrc-edge targets setup NAME` installs them by these names, in lower case."""
from __future__ import annotations

import json
import platform
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lrc_edge.errors import UserError
from lrc_edge.targets.devices.kits import Apt, Npm, Say, cache_folder, digest, run, unfinished


@dataclass(frozen=True)
class NpmFiles(Npm):
    """Some files of npm packages, without their dependencies."""

    files: tuple[str, ...] = ()  # paths within any of the packages

    @property
    def folder(self) -> Path:
        return cache_folder() / f"{self.name}-{digest(*self.packages, *self.files)}"

    def plan(self) -> list[str]:
        return [f"npm pack {' '.join(self.packages)}, and of these {len(self.files)} files  "
                f"({self.size}, into {self.folder})"]

    def install(self, say: Say) -> None:
        if shutil.which("npm") is None:
            raise UserError(f"{self.name}: npm is not installed; install Node.js 20 or newer, which brings it")
        with unfinished(self.folder) as folder, tempfile.TemporaryDirectory() as packed:
            listed = json.loads(run(["npm", "pack", "--ignore-scripts", "--json", "--loglevel=error",
                                     "--pack-destination", packed, *self.packages], say))
            for package in listed:
                self._unpack(Path(packed) / package["filename"], folder / "node_modules" / package["name"])

    def _unpack(self, file: Path, folder: Path) -> None:
        with tarfile.open(file) as archive:
            for member in archive:
                path = member.name.removeprefix("package/")
                if path in self.files and (content := archive.extractfile(member)):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content.read())


# The second is what browsers without JSPI or 64-bit memory need: Safari.
WLLAMA = Npm("wllama", ("@wllama/wllama@3.8.1", "@wllama/wllama-compat@3.8.1"), "36 MB")
TRANSFORMERS_JS = NpmFiles(
    "transformers-js", ("@huggingface/transformers@4.3.1", "onnxruntime-web@1.31.0-dev.20260914-8d85527a0"), "28 MB",
    ("package.json", "dist/transformers.min.js", "dist/ort-wasm-simd-threaded.asyncify.mjs",
     "dist/ort-wasm-simd-threaded.asyncify.wasm"))
PLAYWRIGHT = Npm("playwright", ("playwright-core@1.64.1",), "14 MB")
CHROMIUM = Apt("chromium", ("chromium-headless-shell",),
               ("chromium-headless-shell", "chromium", "google-chrome"), "283 MB")
_MACHINE = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(platform.machine(), "linux-x64")
NODE_LLAMA_CPP = Npm("node-llama-cpp", ("node-llama-cpp@3.22.1", f"@node-llama-cpp/{_MACHINE}@3.22.1"), "85 MB")
