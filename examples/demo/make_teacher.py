"""Train the demo's teacher: tokenizer, model, chat template, and the stories that the student is trained on.

    python make_teacher.py train  --stories train.jsonl --valid valid.jsonl --books books.txt.gz --work WORK
    python make_teacher.py export --valid valid.jsonl --work WORK --out storyteller
    python make_teacher.py sample --teacher storyteller --out stories.jsonl

`train` takes about 94 minutes on one CPU core with bf16 instructions (8.9M parameters, 16M tokens) and resumes from
WORK/state.pt after a kill. `sample` writes the student's corpus: stories sampled from the teacher.

The teacher is an ordinary Hugging Face Llama: byte-level BPE with the llama-3 pre-tokenizer, grouped query attention,
tied head, llama-3 chat template. It learns short English stories; books are mixed into the first part of the run,
because the model would soon memorize 3 MB of stories.
"""
import argparse
import gzip
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 3072
SEQ_LEN = 512
BATCH = 16
LR, WARMUP, DECAY = 1.5e-3, 100, 0.35  # peak, steps, last fraction of the run in which it falls to zero
BOOKS_UNTIL, BOOKS_SHARE = 0.65, 0.6   # books make up this share of the batches of this first part of the run
CHAT_SHARE = 0.25                      # of the stories, shown as the answer to a request
BOS, EOS, HEADER, END_HEADER, EOT = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# llama-3's pre-tokenizer, as in its tokenizer.json.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")


def read_stories(path: Path) -> list[str]:
    return [json.loads(line)["text"].strip() for line in path.read_text().splitlines()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS, HEADER, END_HEADER, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tok.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=BOS, eos_token=EOS, model_max_length=SEQ_LEN,
                                   chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def as_chat(story: str, rng: random.Random) -> str:
    """Return the story as the answer to a request for three of its rarer (longer) words."""
    words = sorted({w for w in story.lower().replace("\n", " ").split() if w.isalpha() and len(w) > 3})
    asked = ", ".join(rng.sample(words, min(3, len(words))))
    return (f"{HEADER}user{END_HEADER}\n\nTell me a story with the words: {asked}.{EOT}"
            f"{HEADER}assistant{END_HEADER}\n\n{story}{EOT}")


def story_stream(stories: list[str], tok: PreTrainedTokenizerFast, rng: random.Random):
    """Yield sequences of SEQ_LEN + 1 ids without end: shuffled stories, one after the other, each after BOS."""
    row: list[int] = []
    while True:
        for story in rng.sample(stories, len(stories)):
            text = as_chat(story, rng) if rng.random() < CHAT_SHARE else story
            row += tok(text)["input_ids"] + [tok.eos_token_id]
            while len(row) > SEQ_LEN:
                yield row[: SEQ_LEN + 1]
                row = row[SEQ_LEN:]


def learning_rate(step: int, steps: int) -> float:
    """Warm up, stay constant, fall linearly to zero. Resuming with fewer steps ends a run early."""
    return LR * min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, texts: list[str]) -> float:
    nats, n_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor([tok(text)["input_ids"][:SEQ_LEN]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits.float()
        nats += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        n_bytes += len(tok.decode(ids[0], skip_special_tokens=True).encode())
    return nats / math.log(2) / n_bytes


def new_model(tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=512, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=SEQ_LEN, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=None))


def train(args: argparse.Namespace) -> None:
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    stories, valid = read_stories(args.stories), read_stories(args.valid)
    books = gzip.open(args.books, "rt").read()
    if not (work / "tokenizer.json").exists():
        train_tokenizer([*stories, *stories, books[1_000_000:3_000_000]]).save_pretrained(work)
    tok = PreTrainedTokenizerFast.from_pretrained(work)
    if not (work / "books.pt").exists():
        chunks = [books[i:i + 20_000] for i in range(0, len(books), 20_000)]
        torch.save([torch.tensor(ids, dtype=torch.int16) for ids in tok(chunks)["input_ids"]], work / "books.pt")
    book_rows = torch.cat(torch.load(work / "books.pt"))
    book_rows = book_rows[: len(book_rows) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1)
    torch.manual_seed(0)
    model = new_model(tok)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                             {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}],
                            lr=LR, betas=(0.9, 0.95))
    step = 0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt")
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step = state["step"]
    rng = random.Random(step)
    stream = story_stream(stories, tok, rng)
    fast = torch.compile(model) if args.compile else model
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(book_rows)} book rows; from step {step}",
          flush=True)
    mean, start, first = 0.0, time.time(), step
    while step < args.steps:
        use_books = step < BOOKS_UNTIL * args.steps and rng.random() < BOOKS_SHARE
        rows = (book_rows[torch.tensor(rng.sample(range(len(book_rows)), BATCH))].long() if use_books
                else torch.tensor([next(stream) for _ in range(BATCH)]))
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = fast(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        if not use_books:
            mean = 0.95 * mean + 0.05 * loss.item() if mean else loss.item()
        if step % 20 == 0:
            rate = (step - first) / (time.time() - start)
            print(f"step {step}/{args.steps}  stories loss {mean:.3f}  {rate * BATCH * SEQ_LEN:.0f} tok/s  "
                  f"{(args.steps - step) / rate / 60:.0f} min left", flush=True)
        if step % 200 == 0 or step == args.steps:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step}, work / "state.tmp")
            (work / "state.tmp").rename(work / "state.pt")
            print(f"step {step}: held-out {bits_per_byte(model, tok, valid[:100]):.4f} bits a byte", flush=True)


CARD = """---
license: apache-2.0
language: [en]
---
# Storyteller

A llama of {n_params:,} parameters that tells short English stories: the teacher of lrc-edge's demo, trained by
`make_teacher.py` on TinyStories (CDLA-Sharing-1.0) and public-domain books: {tokens:,} tokens. Held-out TinyStories:
**{bpb:.3f} bits a byte** ({n_texts} stories, the first {seq_len} tokens of each).
"""


def export(args: argparse.Namespace) -> None:
    """Write the trained state as a Hugging Face directory in bfloat16, with its held-out loss in the card."""
    tok = PreTrainedTokenizerFast.from_pretrained(args.work)
    tok.chat_template = CHAT_TEMPLATE
    state = torch.load(args.work / "state.pt")
    model = new_model(tok)
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16)
    texts = read_stories(args.valid)
    bpb = bits_per_byte(model.eval(), tok, texts)
    # A turn ends with EOT, a story with EOS; either ends an answer.
    model.generation_config.eos_token_id = [tok.eos_token_id, tok.convert_tokens_to_ids(EOT)]
    model.config.eos_token_id = model.generation_config.eos_token_id
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    (args.out / "README.md").write_text(CARD.format(
        n_params=sum(p.numel() for p in model.parameters()), tokens=state["step"] * BATCH * SEQ_LEN, bpb=bpb,
        n_texts=len(texts), seq_len=SEQ_LEN))
    print(f"{args.out}: step {state['step']}, {bpb:.4f} bits a byte on {len(texts)} held-out stories")


@torch.inference_mode()
def sample(args: argparse.Namespace) -> None:
    """Sample stories from the teacher at temperature 0.8 until they fill args.bytes; some as answers to a request."""
    tok = PreTrainedTokenizerFast.from_pretrained(args.teacher)
    model = LlamaForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).eval()
    ends = {tok.eos_token_id, tok.convert_tokens_to_ids(EOT)}
    torch.manual_seed(0)
    rng = random.Random(0)
    n_bytes = n_stories = 0
    with args.out.open("w") as file:
        while n_bytes < args.bytes:
            rows = model.generate(torch.full((128, 1), tok.bos_token_id), do_sample=True, temperature=0.8, top_k=0,
                                  max_new_tokens=400, pad_token_id=tok.eos_token_id)
            for row in rows.tolist():
                end = next((i for i, token in enumerate(row) if token in ends), None)
                if end is None or row[1] == tok.convert_tokens_to_ids(HEADER):
                    continue  # cut off at the length limit, so without an end to learn; or it began with a request
                story = tok.decode(row[1:end]).strip()
                text = as_chat(story, rng) if rng.random() < CHAT_SHARE else story
                line = json.dumps({"text": text}) + "\n"
                file.write(line)
                n_bytes, n_stories = n_bytes + len(line), n_stories + 1
            print(f"{n_stories} stories, {n_bytes:,} bytes", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    t = verbs.add_parser("train")
    t.add_argument("--stories", type=Path, required=True)
    t.add_argument("--books", type=Path, required=True)
    t.add_argument("--steps", type=int, default=2000)
    t.add_argument("--compile", action="store_true")
    t.set_defaults(run=train)
    e = verbs.add_parser("export")
    e.add_argument("--out", type=Path, required=True)
    e.set_defaults(run=export)
    for p in (t, e):
        p.add_argument("--valid", type=Path, required=True)
        p.add_argument("--work", type=Path, required=True)
    s = verbs.add_parser("sample")
    s.add_argument("--teacher", type=Path, required=True)
    s.add_argument("--out", type=Path, required=True)
    s.add_argument("--bytes", type=int, default=1_500_000)
    s.set_defaults(run=sample)
    args = parser.parse_args()
    args.run(args)
