"""A dense student with random weights for speed benchmarks, where only the shapes matter.

The vocabulary is as small as a byte tokenizer allows, so that the layers dominate. Only the shapes that measure the
vocabulary's memory (fit.py) have a large one.
"""
from __future__ import annotations

import json
import pydoc_data.topics
import random
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lrc_edge.families import Weight, weights_of
from lrc_edge.shape import ModelShape

VOCAB_SIZE = 512
SHAPES = {
    "lrc-1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
                     head_dim=128, intermediate_size=8192),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama-3.2-1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                         head_dim=64, intermediate_size=8192, vocab_size=128_256),
    "tiny": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                 intermediate_size=256),
    # For fit.py, named after what needs the memory: large ones to measure, small ones for the tests.
    "weights": dict(hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4,
                    head_dim=64, intermediate_size=4096),
    "cache": dict(hidden_size=512, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, head_dim=64,
                  intermediate_size=1536),
    "vocabulary": dict(hidden_size=640, num_hidden_layers=6, num_attention_heads=10, num_key_value_heads=2,
                       head_dim=64, intermediate_size=1792, vocab_size=131_072),
    "small-weights": dict(hidden_size=768, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4,
                          head_dim=64, intermediate_size=2048),
    "small-cache": dict(hidden_size=256, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
                        head_dim=32, intermediate_size=768),
    "small-vocabulary": dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
                             head_dim=64, intermediate_size=1024, vocab_size=32_768),
}
SHARD_BYTES = 1 << 30


def make_student(folder: Path, shape_name: str) -> Path:
    """Write a student of that shape, a llama in bfloat16, to folder/<shape_name>, unless it exists already."""
    path = folder / shape_name
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    fields = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096} | SHAPES[shape_name]
    large = fields["vocab_size"] > VOCAB_SIZE
    (large_tokenizer(fields["vocab_size"]) if large else tokenizer()).save_pretrained(path)
    config = LlamaConfig(
        **fields, tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, dtype="bfloat16",
        architectures=["LlamaForCausalLM"])
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(ModelShape.from_config(config.to_dict(), shape_name)), start=1):
        name = f"model-{number:05}.safetensors"
        save_file({weight.name: _values(weight, generator) for weight in shard}, path / name, {"format": "pt"})
        places |= {weight.name: name for weight in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(path)  # last: its presence marks the folder as complete
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a SentencePiece tokenizer of single bytes: llama.cpp's converter needs to know other pre-tokenizers."""
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
    table["pre_tokenizer"] = None  # needed only while learning, to keep merges inside words
    table["added_tokens"] = [token for token in table["added_tokens"] if token["content"] in special]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(table)), bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False)


def large_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a GPT-2 tokenizer with that many tokens and about as many merges: random words, grown letter by letter."""
    rng = random.Random(0)
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    merges: list[tuple[str, str]] = []
    while len(tokens) < vocab_size:
        word = rng.choice(string.ascii_letters)
        for letter in rng.choices(string.ascii_lowercase, k=8):
            if word + letter not in tokens and len(tokens) < vocab_size:
                tokens[word + letter] = None
                merges.append((word, letter))
            word += letter
    words = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


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
