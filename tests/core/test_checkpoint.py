"""Every fault of a model directory is one UserError that names the file, the fault and the remedy."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from lrc_edge.checkpoint import DenseCheckpoint, all_finite, resolve_model
from lrc_edge.errors import UserError


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_weights(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        DenseCheckpoint.open(path)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_whole_checkpoint_opens(tiny_llama: Path) -> None:
    model = DenseCheckpoint.open(tiny_llama)
    assert (model.shape.hidden_size, model.shape.head_dim, model.shape.tied) == (64, 24, True)
    reference = model.model()
    assert model.shape.n_params == sum(p.numel() for p in reference.parameters())
    for weight in model.weights():
        torch.testing.assert_close(model.tensor(weight.name), reference.get_parameter(weight.name).detach())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_a_model_is_the_one_that_transformers_loads(settings: dict[str, Any], stored: torch.dtype, tmp_path: Path
                                                    ) -> None:
    """Bit for bit, also if the weights are converted one by one. RoPE's frequencies stay float32."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", dtype=stored, **settings))
    for dtype in (torch.float32, torch.bfloat16):
        expected = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, attn_implementation="sdpa")
        got = checkpoint.model(dtype)
        configs = [{**model.config.to_dict(), "_name_or_path": None} for model in (got, expected)]
        assert type(got) is type(expected) and configs[0] == configs[1]
        for kind in ("named_parameters", "named_buffers"):
            pairs = zip(getattr(got, kind)(), getattr(expected, kind)(), strict=True)
            assert all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)
        assert {buffer.dtype for buffer in got.buffers()} == {torch.float32} and got.dtype == dtype
        assert (got.lm_head.weight is got.model.embed_tokens.weight) == checkpoint.shape.tied
        ids = torch.arange(40)[None]
        with torch.inference_mode():
            assert torch.equal(got(ids).logits, expected.eval()(ids).logits)


@pytest.mark.machine
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_converted_model_is_not_in_memory_twice(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", hidden_size=1024, intermediate_size=2048, layers=8, head_dim=256,
                     dtype=torch.bfloat16)
    script = """
import re, sys, transformers, torch
from lrc_edge.checkpoint import DenseCheckpoint
def kb(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
tiny, path = map(DenseCheckpoint.open, sys.argv[1:])
tiny.model()  # imports
before = kb("VmRSS")
model = path.model()
print((kb("VmHWM") - before) * 1024 / (4 * path.shape.n_params))
"""
    tiny = make_tiny(tmp_path / "tiny", dtype=torch.bfloat16)
    done = subprocess.run([sys.executable, "-c", script, str(tiny), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1.0 <= float(done.stdout.split()[-1]) < 1.25  # 1.5 when files are mapped while all is converted


def test_truncated_safetensors(llama_copy: Path) -> None:
    file = llama_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(llama_copy, "model.safetensors", "truncated or corrupt", "download it again")


def test_empty_safetensors(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").write_bytes(b"")
    refused(llama_copy, "truncated or corrupt", "0 bytes")


def test_missing_safetensors(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").unlink()
    refused(llama_copy, "no weights")


def test_missing_shard(llama_copy: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (llama_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(llama_copy, "model-00001-of-00002.safetensors", "missing")


def test_index_that_points_outside(llama_copy: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (llama_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(llama_copy, "outside its directory")


def test_pickle_only(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").rename(llama_copy / "pytorch_model.bin")
    refused(llama_copy, "pickled", "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weight(llama_copy: Path, bad: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(llama_copy, lambda tensors: tensors[name].view(-1)[7:9].fill_(bad))
    model = DenseCheckpoint.open(llama_copy)
    with pytest.raises(UserError, match=r"up_proj.weight holds 2 NaN or infinite values"):
        model.tensor(name)


def test_config_that_disagrees_with_shapes(llama_copy: Path) -> None:
    change_config(llama_copy, intermediate_size=128)
    refused(llama_copy, "mlp.", "has shape", "config.json implies", "128")


def test_more_layers_than_weights(llama_copy: Path) -> None:
    change_config(llama_copy, num_hidden_layers=3)
    refused(llama_copy, "model.layers.2", "is missing")


def test_fewer_layers_than_weights(llama_copy: Path) -> None:
    change_config(llama_copy, num_hidden_layers=1)
    refused(llama_copy, "model.layers.1", "does not belong to a llama")


def test_missing_tokenizer(llama_copy: Path) -> None:
    (llama_copy / "tokenizer.json").unlink()
    refused(llama_copy, "no tokenizer", "tokenizer.json")


def test_broken_tokenizer(llama_copy: Path) -> None:
    (llama_copy / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="the tokenizer does not load"):
        DenseCheckpoint.open(llama_copy).tokenizer()


def test_unknown_family(llama_copy: Path) -> None:
    change_config(llama_copy, model_type="gemma3_text")
    refused(llama_copy, "gemma3_text", "llama, mistral, qwen2, qwen3")


def test_quantized_and_biased_models(llama_copy: Path) -> None:
    change_config(llama_copy, attention_bias=True)
    refused(llama_copy, "attention_bias")
    change_config(llama_copy, attention_bias=False, quantization_config={"quant_method": "gptq"})
    refused(llama_copy, "already quantized")


def test_no_directory_no_config_bad_config(llama_copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a directory")
    (llama_copy / "config.json").write_text("{")
    refused(llama_copy, "not readable as JSON")
    (llama_copy / "config.json").unlink()
    refused(llama_copy, "no config.json")


def test_nonsense_in_config(llama_copy: Path) -> None:
    change_config(llama_copy, num_attention_heads="eight")
    refused(llama_copy, "num_attention_heads = 'eight'")


@pytest.mark.skipif(Version(transformers.__version__).major >= 5, reason="about transformers 4")
def test_rope_parameters_are_refused_by_transformers_4(llama_copy: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (llama_copy / "config.json").write_text(json.dumps(config))
    refused(llama_copy, "rope_parameters", "nstall transformers >= 5")


def test_rope_of_both_config_forms(llama_copy: Path) -> None:
    model = DenseCheckpoint.open(llama_copy)
    scaling = {"rope_type": "llama3", "factor": 8.0}
    model.config = {"rope_parameters": {"rope_theta": 5e5, **scaling}}
    assert (model.rope.theta, model.rope.scaling) == (5e5, scaling)
    model.config = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    assert (model.rope.theta, model.rope.scaling) == (5e5, scaling)
    model.config = {"rope_theta": 1e4, "rope_scaling": None}
    assert (model.rope.theta, model.rope.scaling) == (1e4, None)


def test_front_matter_and_hub_names(llama_copy: Path, tmp_path: Path) -> None:
    (llama_copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Hello\n")
    assert DenseCheckpoint.open(llama_copy).card == {"license": "apache-2.0"}
    (llama_copy / "README.md").write_text("---\n: [broken\n---\n")
    assert DenseCheckpoint.open(llama_copy).card == {}
    with pytest.raises(UserError, match="not a directory"):
        resolve_model(str(tmp_path / "missing"))


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such directory, and the hub has no such model"):
        resolve_model("no-such-owner/no-such-model")


def test_sharded_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    model = DenseCheckpoint.open(tiny_llama).model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "sharded")
    sharded = DenseCheckpoint.open(tmp_path / "sharded")
    assert len(sharded.weight_files()) > 1
    torch.testing.assert_close(sharded.tensor("model.norm.weight"), model.model.norm.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_judges_as_isfinite_does(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    fine = torch.tensor([[0.0, -0.0, largest], [-largest, torch.finfo(dtype).tiny, -1.0]], dtype=dtype)
    assert all_finite(fine) and all_finite(fine.T) and all_finite(fine[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in range(fine.numel()):
            broken = fine.clone()
            broken.view(-1)[place] = bad
            assert not all_finite(broken), (bad, place)
    assert not all_finite(-torch.tensor([torch.nan, 1.0], dtype=dtype))  # its sign bit set
