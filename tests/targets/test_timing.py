"""Files with random weights, and what the cost model makes of timings."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES
from gguf import GGUFReader
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.shape import ModelShape
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.targets.timing.cost import TILE, CostModel, Timing, decode_counts, prompt_counts
from lrc_edge.targets.timing.random_gguf import write_random_gguf

SHAPE = ModelShape("llama", 32_000, 1024, 4096, 16, 16, 4, 64, 4096, True)


@pytest.mark.parametrize("variant", [name for name in FAMILIES if "rope" not in name])
def test_a_random_file_has_the_tensors_of_an_exported_one(variant: str, tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=96, head_dim=32,
                                             **FAMILIES[variant]))
    for artifact in export_gguf(teacher, tmp_path / "gguf", ["q4_0", "q8_0", "f16"]):
        file = tmp_path / f"{artifact.encoding}.gguf"
        write_random_gguf(teacher.shape, f"gguf:{artifact.encoding}", file)
        expected, found = ({tensor.name: (tensor.tensor_type, tensor.shape.tolist()) for tensor in GGUFReader(
            path).tensors} for path in (tmp_path / artifact.path, file))
        assert found == expected
        with LlamaCpp(file, 64) as runtime:
            assert runtime.vocab_size == teacher.shape.vocab_size
            assert np.isfinite(runtime.prefill(np.arange(40))).all()
            assert len(list(runtime.tokens([1, 2, 3], 5))) == 5


def test_a_row_that_blocks_do_not_fit_is_f16_as_llama_cpp_makes_it(tmp_path: Path) -> None:
    shape = replace(SHAPE, hidden_size=128, intermediate_size=200, num_hidden_layers=1, vocab_size=300)
    write_random_gguf(shape, "gguf:q4_0", tmp_path / "x.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"


def test_devices_without_pytorch_can_do_it() -> None:
    code = ("import sys; import lrc_edge.targets.timing.anchors, lrc_edge.targets.timing.cost\n"
            "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DECODE, PROMPT = (6e-8, 7e-8, 2e-7, 4e-8, 0.01, 0.1), (7e-9, 7e-8, 0.0, 0.004, 0.05)


def timings_of(shapes: list[ModelShape]) -> list[Timing]:
    """Timings of a machine whose factors are known."""
    return [Timing(shape, "gguf:q4_0", depth, 1000 / np.dot(PROMPT, prompt_counts(shape, depth)),
                   1000 / np.dot(DECODE, decode_counts(shape, "gguf:q4_0", depth)))
            for shape in shapes for depth in (128, 1152)]


def test_the_anchors_determine_every_factor() -> None:
    model = CostModel.fit(timings_of(anchors_of(SHAPE)), "gguf:q4_0")
    assert model.worst < 1e-6 and model.n_timings == 14
    for shape in (SHAPE, replace(SHAPE, num_hidden_layers=9, hidden_size=320, num_attention_heads=10,
                                 num_key_value_heads=2)):
        expected = np.dot(DECODE, decode_counts(shape, "gguf:q4_0", 2000))
        assert model.decode_ms(shape, 2000) == pytest.approx(expected, rel=1e-5)
        assert model.first_token_ms(shape, 2000) == pytest.approx(2000 * np.dot(PROMPT, prompt_counts(shape, 2000)),
                                                                  rel=1e-5)


def test_no_part_has_a_negative_cost() -> None:
    """A disturbed timing must not make a larger model faster."""
    timings = timings_of(anchors_of(SHAPE))
    timings[0] = replace(timings[0], decode=timings[0].decode / 3, prompt=timings[0].prompt / 3)  # type: ignore[operator]
    model = CostModel.fit(timings, "gguf:q4_0")
    assert min(*model.decode, *model.prompt) >= 0 and model.worst > 0.2


def test_too_few_timings_are_an_error() -> None:
    with pytest.raises(ValueError, match="4 timings for 6 factors"):
        CostModel.fit(timings_of(anchors_of(SHAPE)[:2]), "gguf:q4_0")


def test_anchors_are_shapes_that_formats_can_hold() -> None:
    for shape in anchors_of(SHAPE):
        assert shape.hidden_size % 64 == shape.intermediate_size % 64 == 0
        assert shape.num_attention_heads % shape.num_key_value_heads == 0
    small = replace(SHAPE, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1)
    assert all(shape.num_hidden_layers == 1 for shape in anchors_of(small))


def test_attention_over_a_prompt_counts_whole_tiles() -> None:
    """Each token meets the keys of all tiles up to its own, whether they come before or after it."""
    for n_prompt in (TILE, 2 * TILE, 18 * TILE):
        keys = np.mean([TILE * (i // TILE + 1) for i in range(n_prompt)])
        attention = prompt_counts(SHAPE, n_prompt)[1]
        assert attention == pytest.approx(keys * SHAPE.num_hidden_layers * SHAPE.q_size)
