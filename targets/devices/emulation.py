"""aarch64 Linux on another machine: the Python worker in qemu's user-mode emulation of one processor.

Instructions, threads and arithmetic of the real libraries are the same as on an aarch64 machine; kernel, memory and
speed are not. The kit does not need root: packages are unpacked into the cache, never installed.
"""
from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

import lrc_edge
from lrc_edge.errors import UserError
from lrc_edge.targets.devices.kits import Say, cache_folder, digest, run, unfinished
from lrc_edge.targets.runtimes.worker import Command

NODE_LLAMA_CPP = "3.22.1"  # its aarch64 llama.cpp has a CPU backend for each of eight generations of processors
LLAMA_CPP_PYTHON = "0.3.36"  # only its bindings, in Python
ONNXRUNTIME, GENAI = "1.31.1", "0.18.0"
WHEELS = (f"onnxruntime=={ONNXRUNTIME}", f"onnxruntime-genai=={GENAI}", "numpy==2.4.6", "Jinja2==3.1.6",
          "MarkupSafe==3.0.4", "diskcache==5.6.3", "typing_extensions==4.16.0")
BUILDS = {"llama.cpp": f"llama.cpp (node-llama-cpp {NODE_LLAMA_CPP}'s build)",
          "onnxruntime": f"onnxruntime {ONNXRUNTIME}", "onnxruntime-genai": f"onnxruntime-genai {GENAI}"}
PROGRAMS = ("apt-get", "dpkg", "dpkg-deb", "tar", "npm")
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
# The processors, with Arm's number of the part. onnxruntime reads it from /proc/cpuinfo, where it chooses kernels by it
# and dies at import when it does not know it. qemu's "max" has a number of its own: here it is a Neoverse V1's.
CPUS = {"cortex-a53": "0xd03", "cortex-a76": "0xd0b", "max": "0xd40"}
CPUINFO = "processor : 0\nCPU implementer : 0x41\nCPU architecture: 8\nCPU variant : 0x0\nCPU part : {}\n\n"
# The system's sources, and nothing else of the system's; indexes of the emulator's packages too.
APT = """Dir::State "{folder}"; Dir::State::status "{folder}/status"; Dir::Cache "{folder}";
Dir::Cache::archives "{folder}"; APT::Architecture "arm64"; APT::Architectures {{ "arm64"; "{host}"; }};
APT::Sandbox::User "root"; APT::Update::Error-Mode "any"; Acquire::Languages "none";
"""
# lrc-edge is not installed in the emulated Python: its modules are found in the folders that are given.
PATHS = ("import sys, types; sys.path.insert(0, sys.argv[1]); lrc_edge = types.ModuleType('lrc_edge'); "
         "lrc_edge.__path__ = sys.argv[2:4]; sys.modules['lrc_edge'] = lrc_edge; "
         "from lrc_edge.targets.devices import emulated_worker; ")


def _silently(line: str) -> None:
    """Say nothing."""


class Aarch64:
    """The kit: the emulator, an aarch64 Python with its C library, llama.cpp and the onnxruntimes."""

    name = "aarch64"

    @property
    def folder(self) -> Path:
        pins = (NODE_LLAMA_CPP, LLAMA_CPP_PYTHON, *WHEELS, *DEBIAN, CPUINFO, str(CPUS))
        return cache_folder() / f"{self.name}-{digest(*pins)}"

    def missing(self) -> str | None:
        return None if self.folder.exists() and emulator(self.folder) else "aarch64 emulation is not installed"

    def plan(self) -> list[str]:
        programs = "an aarch64 Python (16 MB)" if emulator(self.folder) else "qemu and an aarch64 Python (79 MB)"
        bindings = [] if _installed_bindings() else [f"pip download {_bindings()}  (77 MB, minutes)"]
        return [f"apt-get download of {programs} and the lists of packages (18 MB)",
                f"pip install for aarch64: {' '.join(WHEELS)}  (49 MB)",
                *bindings,
                f"npm pack {_node_package()}  (7 MB)",
                f"all unpacked into {self.folder}  (260 MB; nothing is installed on the system)"]

    def install(self, say: Say) -> None:
        """Unpack the kit. Raises UserError, and leaves no files, if apt-get, pip or npm is missing or fails."""
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
        # Not by find_spec: for pip, setuptools turns off its own distutils, without which torch.compile fails.
        absent += [] if any(importlib.metadata.distributions(name="pip")) else ["pip"]
        if absent:
            raise UserError(f"{self.name}: this machine has no {', '.join(absent)}; install that first")
        with unfinished(self.folder) as folder:
            (downloads := folder / "downloads").mkdir()
            _unpack_debian(folder, downloads, say)
            for cpu in CPUS:
                _write_root(folder, cpu)
            _install_packages(folder, downloads, say)
            shutil.rmtree(downloads)
            # It works; and what Python compiles at the first import is part of the kit.
            imports = "emulated_worker.llama_libraries(); import onnxruntime, onnxruntime_genai"
            run([*_python(folder, "max", imports)], say)


KIT = Aarch64()


def command(runtime: str, cpu: str) -> Command:
    """Return the command for a worker with `runtime`, one of BUILDS, on one of CPUS. The kit must be installed.

    Raises UserError for another processor.
    """
    if cpu not in CPUS:
        raise UserError(f"{cpu}: not a processor that is emulated here; choose among {', '.join(CPUS)}")
    version = run([str(emulator(KIT.folder)), "--version"], _silently).split()[2]
    return Command((*_python(KIT.folder, cpu, "emulated_worker.main(*sys.argv[4:])"), runtime,
                    f"{BUILDS[runtime]} on emulated {cpu} (aarch64 Linux, qemu-user {version})"))


def emulator(folder: Path) -> Path | None:
    """Return the path of qemu: the kit's own, else this machine's."""
    found = shutil.which("qemu-aarch64-static", path=folder) or shutil.which("qemu-aarch64-static") \
        or shutil.which("qemu-aarch64")
    return Path(found) if found else None


def _python(folder: Path, cpu: str, program: str) -> tuple[str, ...]:
    """Return the command line for `program` in the emulated Python, without the user's packages and settings."""
    return (str(emulator(folder)), "-cpu", cpu, "-L", str(folder / cpu),
            str(folder / "root" / "usr" / "bin" / "python3"), "-I", "-S", "-c", PATHS + program,
            str(folder / "site"), str(Path(lrc_edge.__file__).parent), str(Path(__file__).parents[2]))


def _write_root(folder: Path, cpu: str) -> None:
    """Write the root folder that `cpu` sees: the libraries, and its own /proc/cpuinfo."""
    (proc := folder / cpu / "proc").mkdir(parents=True)
    (proc / "cpuinfo").write_text(CPUINFO.format(CPUS[cpu]))
    for name in ("lib", "usr"):
        (folder / cpu / name).symlink_to(Path("..", "root", name))


def _unpack_debian(folder: Path, downloads: Path, say: Say) -> None:
    """Unpack the emulator, DEBIAN and their dependencies, with an apt whose state is in `downloads`."""
    (downloads / "partial").mkdir()
    (downloads / "status").touch()
    host = run(["dpkg", "--print-architecture"], _silently).strip()
    (downloads / "apt.conf").write_text(APT.format(folder=downloads, host=host))
    apt = ["apt-get", "-qq", "--yes", "--config-file", str(downloads / "apt.conf")]
    run([*apt, "update"], say)
    run([*apt, "install", "--download-only", "--no-install-recommends", *DEBIAN], say)
    for package in sorted(downloads.glob("*.deb")):
        run(["dpkg-deb", "--extract", str(package), str(folder / "root")], _silently)
    if emulator(folder) is None:
        run([*apt, "download", f"qemu-user-static:{host}"], say, cwd=downloads)
        package = next(downloads.glob("qemu-user-static_*.deb"))
        run(["dpkg-deb", "--extract", str(package), str(downloads / "qemu")], say)
        (downloads / "qemu" / "usr" / "bin" / "qemu-aarch64-static").rename(folder / "qemu-aarch64-static")


def _install_packages(folder: Path, downloads: Path, say: Say) -> None:
    """Install Python packages into `site`: WHEELS, and llama.cpp's bindings with node-llama-cpp's libraries."""
    version = (folder / "root" / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--target", str(folder / "site"), "--no-deps", "--no-compile", "--only-binary", ":all:",
         "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_27_aarch64",
         "--platform", "manylinux2014_aarch64", "--python-version", version, *WHEELS], say)
    package = folder / "site" / "llama_cpp"
    if (installed := _installed_bindings()):
        shutil.copytree(installed, package, ignore=shutil.ignore_patterns("lib", "server", "__pycache__"))
    else:
        run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(downloads), _bindings()], say)
        source = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
        run(["tar", "-xf", f"{source}.tar.gz", f"{source}/llama_cpp"], _silently, cwd=downloads)
        (downloads / source / "llama_cpp").rename(package)
    run(["npm", "pack", "--silent", "--pack-destination", str(downloads), _node_package()], say)
    run(["tar", "-xf", next(downloads.glob("node-llama-cpp-*.tgz")).name], _silently, cwd=downloads)
    (downloads / "package" / "bins" / "linux-arm64").rename(package / "lib")
    for name in ("llama", "ggml"):
        (package / "lib" / f"lib{name}.so").symlink_to(next((package / "lib").glob(f"lib{name}.v*.so")).name)


def _bindings() -> str:
    return f"llama-cpp-python=={LLAMA_CPP_PYTHON}"


def _node_package() -> str:
    return f"@node-llama-cpp/linux-arm64@{NODE_LLAMA_CPP}"


def _installed_bindings() -> Path | None:
    """Return the folder of the llama_cpp package in this Python, if it has the right version."""
    try:
        if importlib.metadata.version("llama-cpp-python") != LLAMA_CPP_PYTHON:
            return None
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent if spec and spec.origin else None
