"""A model that nobody has is told at once: no name of the hub, or a hub that does not answer."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from support.clouds import free_port
from support.commands import Command
from tightbeam.common.backbone import hub, resolve_model
from tightbeam.common.errors import UsageError


class Away:
    """A hub that hangs up on everybody, and counts them."""

    def __init__(self, server: socket.socket) -> None:
        self._server, self.num_calls = server, 0
        self.url = f"http://127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self._server.accept()[0].close()
            except OSError:
                return
            self.num_calls += 1


@pytest.fixture
def away() -> Iterator[Away]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Away(server)
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("model", ["./no/such", "/no/such", "three/parts/here", "a model", "no/such/"])
def test_what_can_be_no_name_of_the_hub_asks_nobody(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda endpoint: pytest.fail("the hub was asked"))
    with pytest.raises(UsageError, match=r"There is no folder '.*', and no model on the hub.*--model"):
        resolve_model(model)


@pytest.mark.parametrize("command", ["serve", "data"])
def test_a_hub_that_does_not_answer_is_asked_once(command: str, away: Away, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    words = {
        "serve": ("serve", "--insecure", "--listen", f"127.0.0.1:{free_port()}", "--model", "models/tinny"),
        "data": ("data", "check", "train.jsonl", "--model", "models/tinny"),
    }
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": away.url, "HF_HOME": str(tmp_path / "hf")}
    done = Command(tmp_path, *words[command], environment=hub, before=_reread).wait()
    assert done.code == 2
    assert "'models/tinny' is neither a folder nor in this machine's cache" in done.error
    assert "the hub cannot be reached. Check the spelling of --model" in done.error
    assert away.num_calls <= 2  # ours, and one of the library that it does not repeat


def _reread() -> None:
    """What the environment says of the hub was read when the process was forked from another."""
    vars(constants)["HF_HUB_OFFLINE"] = False
    vars(constants)["ENDPOINT"] = os.environ["HF_ENDPOINT"]


def test_an_answer_of_any_kind_is_one(away: Away) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        assert hub._answers(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join(10)
    assert not hub._answers(away.url)


def test_silence_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        started_s = time.monotonic()
        assert not hub._answers(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - started_s < 30
