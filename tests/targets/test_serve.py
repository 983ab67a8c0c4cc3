"""`lrc-edge serve`: a page in which the model answers, opened in Chromium."""
from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from served_page import PHONE, use
from tiny_models import make_tiny
from worker_cases import STORYTELLER, gguf, native

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.targets.serve.chat import Chat
from lrc_edge.targets.serve.command import page_server

runs_chromium = pytest.mark.targets

NO_TORCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
sys.modules |= dict.fromkeys(("torch", "transformers", "llama_cpp", "onnxruntime"))  # as if not installed
from lrc_edge.cli import main
sys.argv[1:] = ["serve", {path!r}, "--port", "0"]
main()
"""
GREEDY = {"temperature": 0, "length": 24}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher, which has a chat template, without quantization."""
    return gguf(DenseCheckpoint.open(STORYTELLER), tmp_path_factory.mktemp("story"), "f16")


@runs_chromium
def test_it_answers(story: Path) -> None:
    """In the words that llama.cpp has natively for the same conversation, with figures, without a request."""
    found = use(story, asks=["Tell me about a dog.", "And then?"], settings=GREEDY, offline=True)
    chat = Chat(story, n_ctx=512, threads=1)
    for turn, text in zip(found["turns"], ("Tell me about a dog.", "And then?"), strict=True):
        assert turn == {"question": text, "answer": "".join(chat.reply(text, 0.0, 24)), "note": "Stopped at 24 tokens."}
    assert (found["failed"], found["foreign"], found["violations"], found["isolated"]) == (False, [], [], True)
    assert story.name in found["facts"] and "thread" in found["facts"]
    assert float(found["decode"]) > 1 and float(found["prefill"]) > 1
    assert story.stat().st_size / 1e6 < float(found["memory"]) < story.stat().st_size / 1e6 + 30
    assert 60 < int(found["used"]) < 120 and found["context"] == "of 512"


@runs_chromium
def test_it_continues_text(story: Path) -> None:
    found = use(story, asks=["Once upon a time"], settings={**GREEDY, "plain": True})
    with native("llama.cpp") as worker:
        worker.ask("open", path=str(story), n_ctx=512, threads=1)
        [ids] = worker.ask("tokenize", texts=["Once upon a time"])["ids"]
        made = worker.ask("generate", ids=ids, n_tokens=24, stop=[])["ids"]
    expected = DenseCheckpoint.open(STORYTELLER).tokenizer().decode(made)
    assert found["turns"] == [{"question": "Once upon a time", "answer": expected, "note": "Stopped at 24 tokens."}]


@runs_chromium
def test_a_phone(story: Path) -> None:
    found = use(story, asks=["Tell me about a dog. " * 3 + "x" * 200], settings=GREEDY, dark=True, **PHONE)
    assert found["turns"][0]["answer"] and not found["scrolls"] and not found["failed"]


@runs_chromium
def test_the_stop_button(story: Path) -> None:
    found = use(story, asks=["Tell me about a dog.", "Again!"], settings={"length": 400}, stop=True)
    assert [turn["note"] for turn in found["turns"]] == ["Stopped.", "Stopped."]
    assert all(len(turn["answer"]) < 800 for turn in found["turns"])


@pytest.fixture(scope="module")
def babble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 128 tokens of context and no chat template."""
    out = tmp_path_factory.mktemp("babble")
    tiny = make_tiny(out / "tiny", tokenizer="gpt2", max_position_embeddings=128)
    return gguf(DenseCheckpoint.open(tiny), out, "f32")


@runs_chromium
def test_the_end_of_the_context(babble: Path) -> None:
    """While it writes, and of a text that is too long; afterwards it answers again."""
    asks = ["The end " * 20, "The end " * 300, "The end " * 20]
    found = use(babble, asks=asks, settings={"temperature": 0, "length": 1000})
    full, too_long, last = found["turns"]
    assert full == last and full["note"] == "The context of 128 tokens is full."
    assert too_long["answer"] == "" and "The context is full: this needs " in too_long["note"]
    assert found["intro"].startswith("Write a beginning; the model goes on.")


@runs_chromium
def test_an_error_of_llamacpp(babble: Path) -> None:
    """wllama dies of half a letter, which this model writes after "The"; the page says so and starts it anew."""
    found = use(babble, asks=["The"], settings={"temperature": 0})
    assert found["failed"] and "llama.cpp stopped: " in found["message"] and "invalid UTF-8" in found["message"]
    found = use(babble, asks=["The", "The end " * 20], settings={"temperature": 0, "length": 1000}, offline=True)
    assert [turn["note"] for turn in found["turns"]] == ["Stopped.", "The context of 128 tokens is full."]
    assert not found["failed"]


@runs_chromium
def test_a_page_that_is_not_isolated(story: Path) -> None:
    """http, and not localhost: browsers give it no threads, and the page says so."""
    found = use(story, host=socket.gethostname(), asks=["Tell me about a dog."], settings=GREEDY)
    assert not found["isolated"] and "It runs on one thread" in found["intro"]
    assert found["turns"][0]["answer"] and found["facts"].endswith("1\u00a0thread")


@runs_chromium
def test_a_browser_without_jspi(story: Path) -> None:
    """Safari gets wllama's other program, and from here."""
    asked = {"asks": ["Tell me about a dog."], "settings": GREEDY}
    found = use(story, before="delete WebAssembly.Suspending", **asked)
    assert found["turns"] == use(story, **asked)["turns"]
    assert (found["foreign"], found["violations"]) == ([], [])


@runs_chromium
def test_a_corrupted_file(story: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(story.read_bytes()[:300_000])
    found = use(file, **PHONE)
    assert found["failed"] and not found["scrolls"]
    assert found["message"].startswith("broken.gguf cannot be loaded: ") and "corrupted" in found["message"]
    file.write_bytes(b"no model")
    assert "invalid magic" in use(file)["message"]


@runs_chromium
def test_the_page_may_ask_nobody_else(story: Path) -> None:
    found = use(story, evaluate="fetch('https://example.com/x').then(() => 'reached', String)")
    assert found["evaluated"] == "TypeError: Failed to fetch"
    assert found["violations"] and found["foreign"] == []


@runs_chromium
def test_the_command_needs_no_pytorch(story: Path) -> None:
    command = subprocess.Popen([sys.executable, "-c", NO_TORCH.format(path=str(story.parent.parent))],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None
    url = command.stdout.readline().split()[0]
    with urllib.request.urlopen(url) as response:
        assert b"<textarea" in response.read()
    command.send_signal(signal.SIGINT)
    assert (command.wait(10), command.communicate()[1]) == (0, "")


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no GGUF here; build or export one"):
        page_server(tmp_path, "", "127.0.0.1", 0)
    (tmp_path / "a-Q8_0.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no GGUF in q4_0 here"):
        page_server(tmp_path, "q4_0", "127.0.0.1", 0)
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"wllama is not installed; run lrc-edge targets setup wllama"):
        page_server(tmp_path, "Q8_0", "127.0.0.1", 0)
