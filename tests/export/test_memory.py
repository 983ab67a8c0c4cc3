"""Writing takes memory for tensors, not for models: a process that may not hold the model writes all of its files."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from lrc_edge.checkpoint import DenseCheckpoint

pytestmark = [pytest.mark.machine, pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                                                       reason="measures through Linux's /proc")]

# The first export warms up what stays: imports, thread pools, the allocator's arenas. Writing 5 to clear_refs resets
# VmHWM, the peak of the resident set. RLIMIT_DATA bounds what a process may own: heaps and private mappings.
CHILD = """
import json, re, resource, shutil, sys
from pathlib import Path
from lrc_edge.checkpoint import DenseCheckpoint

small, large, out, format, encoding = *map(Path, sys.argv[1:4]), *sys.argv[4:]
if format == "gguf":
    from lrc_edge.export.gguf.to_gguf import export_gguf as export
else:
    from lrc_edge.export.onnx.to_onnx import export_onnx as export

def status(key):
    return 1024 * int(re.search(rf"^{key}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

def peak(model):
    Path("/proc/self/clear_refs").write_text("5")
    written = export(DenseCheckpoint.open(model), out / format, [encoding])[0]
    shutil.rmtree(out / format)
    return status("VmHWM"), written.sha256

peak(large)
found = {"small": peak(small)[0]}
found["large"], unlimited = peak(large)
n_bytes = sum(file.stat().st_size for file in large.glob("*.safetensors"))
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + n_bytes // 2,) * 2)
found["same"] = peak(large)[1] == unlimited
try:
    bytearray(n_bytes)
except MemoryError:
    found["bites"] = True
print(json.dumps(found))
"""


def make_sharded(path: Path, layers: int) -> Path:
    make_tiny(path, layers=layers, hidden_size=512, intermediate_size=2048, heads=8, kv_heads=8, head_dim=64,
              dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    (path / "model.safetensors").unlink()  # its whole mapping would count as memory that the process owns
    model.save_pretrained(path, max_shard_size="5MB")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sharded")
    return make_sharded(folder / "small", 3), make_sharded(folder / "large", 12)


@pytest.mark.parametrize(("format", "encoding"), [
    ("gguf", "f16"), ("gguf", "q4_0"), ("onnx", "fp32"), ("onnx", "q4")])
def test_memory_does_not_grow_with_the_layers(models: tuple[Path, Path], format: str, encoding: str, tmp_path: Path
                                              ) -> None:
    small, large = models
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, (small, large, tmp_path)), format, encoding],
                          stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    a_layer = 4 * sum(weight.numel for weight in DenseCheckpoint.open(large).weights() if weight.layer == 0)
    assert found["large"] - found["small"] < a_layer, found
    assert found["same"] and found["bites"]
