"""llama-server's own rendering of a chat template, where $LLAMA_SERVER or PATH has one."""
from __future__ import annotations

from pathlib import Path

import pytest
from paths import STORYTELLER

from lrc_edge.artifact import smallest_gguf
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import QUIET
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.targets.runtimes.llama_server import LlamaServer, server_program
from lrc_edge.targets.runtimes.worker import WorkerFailed

TALK = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": "Once <|im_end|> there"},
        {"role": "user", "content": "Go on."}]

pytestmark = pytest.mark.skipif(server_program() is None, reason="no llama-server on PATH or in LLAMA_SERVER")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    export_gguf(DenseCheckpoint.open(STORYTELLER), folder, ["q8_0"], QUIET)
    return smallest_gguf(folder)


def test_it_renders_a_conversation_as_hugging_face_does(file: Path) -> None:
    program = server_program()
    assert program is not None
    tokenizer = DenseCheckpoint.open(STORYTELLER).tokenizer()
    with LlamaServer(program, file) as server:
        text, ids = server.render_chat(TALK)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    # The server removes the BOS that the template writes, and adds it again when it tokenizes.
    assert expected == tokenizer.bos_token + text
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_a_file_that_does_not_load_is_an_error_and_no_process(tmp_path: Path) -> None:
    program, broken = server_program(), tmp_path / "broken.gguf"
    assert program is not None
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WorkerFailed, match="llama-server"), LlamaServer(program, broken):
        pass
