"""A dense student with random weights, for the benchmarks of speed: numbers do not matter to them, shapes do.

Its vocabulary is as small as a tokenizer of bytes allows, so that the layers are what is measured.
"""
from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lrc_edge.roles import Weight, weights_of
from lrc_edge.shape import ModelShape

VOCAB_SIZE = 512
SHAPES = {
    "lrc-1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
                     head_dim=128, intermediate_size=8192),
    "tiny": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                 intermediate_size=256),
}
SHARD_BYTES = 1 << 30


def make_student(folder: Path, shape_name: str) -> Path:
    """Write the student of that shape, a llama in bfloat16, to folder/<shape_name>, unless it is there already."""
    path = folder / shape_name
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(path)
    config = LlamaConfig(
        **SHAPES[shape_name], vocab_size=VOCAB_SIZE, tie_word_embeddings=True, max_position_embeddings=4096,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, dtype="bfloat16",
        architectures=["LlamaForCausalLM"])
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(ModelShape.from_config(config.to_dict(), shape_name)), start=1):
        name = f"model-{number:05}.safetensors"
        save_file({weight.name: _values(weight, generator) for weight in shard}, path / name, {"format": "pt"})
        places |= {weight.name: name for weight in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(path)  # last: it says that the folder is whole
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's kind, every byte a token: llama.cpp's converter knows pre-tokenizers of other kinds by name."""
    special, space = ["<unk>", "<s>", "</s>"], "▁"
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    words.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    words.pre_tokenizer = pre_tokenizers.Split(Regex(f"(?={space})"), behavior="isolated")
    text = [value.encode("ascii", "ignore").decode() for value in pydoc_data.topics.topics.values()]
    words.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)]))
    table = json.loads(words.to_str())
    table["pre_tokenizer"] = None  # it only kept merges inside words while they were learned
    table["added_tokens"] = [token for token in table["added_tokens"] if token["content"] in special]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(table)), bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False)


def _shards(shape: ModelShape) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    for weight in weights_of(shape):
        if 2 * sum(other.numel for other in shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    return shards


def _values(weight: Weight, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(weight.shape, generator=generator) * 0.02
    return (values if values.ndim > 1 else values + 1).bfloat16()
