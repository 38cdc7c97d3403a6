"""A client of language servers, as an editor is one: it starts a real server and talks to it over stdio."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest

_TIMEOUT_S = 60
_NODE_MODULES = Path(sys.prefix) / "lib" / "node_modules"
#: What editors tell a server about themselves.
_CAPABILITIES: Mapping[str, Any] = {
    "workspace": {"configuration": True, "workspaceFolders": True},
    "textDocument": {"completion": {"completionItem": {"snippetSupport": True}}, "publishDiagnostics": {}},
}


def find_server(name: str) -> tuple[list[str], dict[str, str]]:
    """Return the command of a server, and its variables. Skip the test if it is not installed."""
    if name == "tombi":
        program = shutil.which("tombi", path=str(Path(sys.executable).parent)) or shutil.which("tombi")
        if program is None:
            pytest.skip("tombi is not installed; `pip install tombi`")
        return [program, "lsp", "--offline"], {}
    node = shutil.which("node")
    if node is None or not (_NODE_MODULES / "@taplo" / "lsp").is_dir():
        pytest.skip(f"taplo's server is not installed; `npm install --global --prefix {sys.prefix} @taplo/lsp@0.8.0`")
    return [node, str(Path(__file__).with_name("taplo_server.cjs"))], {"NODE_PATH": str(_NODE_MODULES)}


class LanguageServer:
    """A server that has a folder open."""

    def __init__(self, name: str, folder: Path) -> None:
        command, variables = find_server(name)
        env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache"), **variables}
        self._process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._last_id = 0
        self._diagnostics: dict[str, list[dict[str, Any]]] = {}
        self._folder = {"uri": folder.as_uri(), "name": folder.name}
        parameters = {"processId": None, "rootUri": folder.as_uri(), "workspaceFolders": [self._folder]}
        self.request("initialize", {**parameters, "capabilities": _CAPABILITIES})
        self._send({"method": "initialized", "params": {}})

    def open(self, path: Path) -> None:
        """Open a file, as an editor does that has just read it."""
        document = {"uri": path.as_uri(), "languageId": "toml", "version": 1, "text": path.read_text()}
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": document}})

    def wait_for_diagnostics(self, path: Path) -> list[dict[str, Any]]:
        """Return what the server has against a file. It may say nothing first, while it loads the schema."""
        while not self._diagnostics.get(path.as_uri()):
            self._handle(self._receive())
        return self._diagnostics[path.as_uri()]

    def complete(self, path: Path, line: int, character: int) -> list[dict[str, Any]]:
        """Return what the server offers at a place, both counted from 0."""
        found = self.request("textDocument/completion", _make_position(path, line, character))
        return list(found["items"] if isinstance(found, dict) else found or ())

    def hover(self, path: Path, line: int, character: int) -> str:
        """Return the text that the server shows about a place, both counted from 0."""
        found = self.request("textDocument/hover", _make_position(path, line, character))
        return "" if found is None else json.dumps(found["contents"])

    def request(self, method: str, parameters: object) -> Any:
        """Send a request and return the result."""
        self._last_id += 1
        self._send({"id": self._last_id, "method": method, "params": parameters})
        while True:
            message = self._receive()
            if message.get("id") == self._last_id and "method" not in message:
                assert "error" not in message, message
                return message.get("result")
            self._handle(message)

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()

    def _handle(self, message: dict[str, Any]) -> None:
        """Keep diagnostics, and answer what the server asks."""
        method, parameters = message.get("method"), message.get("params")
        if method == "textDocument/publishDiagnostics":
            self._diagnostics[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif method is not None and "id" in message:
            answers = {
                "workspace/configuration": [None for _ in (parameters or {}).get("items", ())],
                "workspace/workspaceFolders": [self._folder],
            }
            self._send({"id": message["id"], "result": answers.get(method)})

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        message = self._messages.get(timeout=_TIMEOUT_S)
        assert message is not None, "the language server has ended"
        return message

    def _read(self) -> None:
        assert self._process.stdout is not None
        while (message := _read_message(self._process.stdout)) is not None:
            self._messages.put(message)
        self._messages.put(None)


def _read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read one message. None if the stream has ended."""
    length = 0
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return json.loads(stream.read(length)) if length else None


def _make_position(path: Path, line: int, character: int) -> dict[str, object]:
    return {"textDocument": {"uri": path.as_uri()}, "position": {"line": line, "character": character}}
