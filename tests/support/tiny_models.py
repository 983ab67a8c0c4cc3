"""Tiny random models that are real Hugging Face checkpoints, with real trained tokenizers."""
from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.train.data.tokenize import prepare

TEXT = "\n\n".join(pydoc_data.topics.topics.values())  # English that every Python installation holds
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
    "spm": ["<unk>", "<s>", "</s>"],
}
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")
CHATML_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")


def _byte_level_splitter(kind: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind in ("llama3", "qwen2"):
        pattern = LLAMA3 if kind == "llama3" else QWEN2
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@cache
def _trained(kind: str, vocab_size: int) -> str:
    """tokenizer.json of a tokenizer trained on TEXT, in the form that the family's own has."""
    special = SPECIAL[kind]
    if kind == "spm":
        tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
        byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
        # SentencePiece merges inside words only: a training pre-tokenizer says so; the finished model has none.
        tok.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), behavior="isolated")
        tok.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=vocab_size,
                                                            special_tokens=special + byte_tokens))
        table = json.loads(tok.to_str())
        table["pre_tokenizer"] = None
        table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] in special]
        tok = Tokenizer.from_str(json.dumps(table))
        bos = "<s>"
    else:
        tok = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        if kind == "qwen2":
            tok.normalizer = normalizers.NFC()
        tok.pre_tokenizer = _byte_level_splitter(kind)
        tok.decoder = decoders.ByteLevel()
        tok.train_from_iterator([TEXT], trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        bos = special[0]
    if kind in ("llama3", "spm"):
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))])
    return tok.to_str()


def make_tokenizer(kind: str, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    tok = Tokenizer.from_str(_trained(kind, vocab_size))
    names: dict[str, Any] = {
        "llama3": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3_TEMPLATE),
        "qwen2": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML_TEMPLATE),
        "smollm": dict(bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML_TEMPLATE),
        "gpt2": dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        "spm": dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        tok.save(f"{folder}/tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", clean_up_tokenization_spaces=False,
                                       **names)


def every_split(model: dict[str, Any]) -> list[list[str]]:
    """SentencePiece and tiktoken join any two pieces that make a piece; a converted tokenizer lists all those pairs."""
    vocab, ranks = model["vocab"], {left + right: i for i, (left, right) in reversed([*enumerate(model["merges"])])}
    return [[token[:i], token[i:]] for token in sorted(ranks, key=lambda token: ranks[token])
            for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]


def make_tiny(path: Path, family: str = "llama", **settings: Any) -> Path:
    """Write a tiny random checkpoint to `path`, as `_make_tiny` does, and return it. Made once, then copied."""
    key = json.dumps([family, settings], sort_keys=True, default=str)
    if key not in _MADE:
        _MADE[key] = _make_tiny(Path(_KEPT.name) / str(len(_MADE)), family, **settings)
    return Path(shutil.copytree(_MADE[key], path, dirs_exist_ok=True))


_KEPT, _MADE = tempfile.TemporaryDirectory(), dict[str, Path]()


def _make_tiny(path: Path, family: str, *, tied: bool = True, hidden_size: int = 64,
              intermediate_size: int = 96, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 24,
              tokenizer: str = "llama3", vocab_size: int = 512, rope_scaling: dict[str, Any] | None = None,
              rope_theta: float = 10000.0,
              max_position_embeddings: int = 512, dtype: torch.dtype = torch.float32, seed: int = 0,
              **config_fields: Any) -> Path:
    """Write a tiny random checkpoint of `family` to `path` and return it. vocab_size is the model's, >= 300."""
    tok = make_tokenizer(tokenizer, min(vocab_size, 512))
    rope: dict[str, Any]
    if Version(transformers.__version__).major >= 5:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})}}
    else:
        rope = {"rope_theta": rope_theta, "rope_scaling": rope_scaling}
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=max_position_embeddings, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        **rope, **config_fields)
    if family == "mistral" and "sliding_window" not in config_fields:
        config.sliding_window = None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Weights large enough that distributions are peaked, and norms and biases that are not their defaults.
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + (1.0 if "norm" in name else 0.0))
    model.to(dtype).save_pretrained(path)
    tok.save_pretrained(path)
    return Path(path)


def tiny_data(teacher: Path, folder: Path) -> Path:
    """Tokens and held-out text of TEXT for a teacher, as the data stage leaves them in `folder`."""
    texts = (TEXT[i:i + 500] for i in range(0, 60_000, 500))
    prepare([("text", texts)], DenseCheckpoint.open(teacher).tokenizer(), folder, held_out_share=0.1, max_tokens=None,
            seq_len=64, progress=lambda n: None)
    return folder
