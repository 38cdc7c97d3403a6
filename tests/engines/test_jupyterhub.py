"""A real JupyterHub with its proxy: two users of two groups, each with a kernel under their own policy."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tests.pages import ROOT, blocks
from tfenv.deploy import launch

pytestmark = pytest.mark.exhaustive

_TOKEN = "token-of-the-tests"
_START_S = 90.0
_BIN = Path(sys.executable).parent

CONFIG = """
import os
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub_port}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.command = ["{proxy}"]
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.DummyAuthenticator.password = "x"
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie"
c.JupyterHub.load_groups = {{"students": {{"users": ["bob"]}}, "staff": {{"users": ["alice"]}}}}
c.JupyterHub.services = [{{"name": "tests", "api_token": "{token}"}}]
c.JupyterHub.load_roles = [
    {{"name": "tests-role", "scopes": ["admin:users", "admin:servers", "access:servers"], "services": ["tests"]}}
]
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/home/{{username}}"
c.Spawner.cmd = ["{single_user}", "--allow-root"]
handed = ("TFGPU_", "LD_", "PYTHON")
c.Spawner.environment = {{name: value for name, value in os.environ.items() if name.startswith(handed)}}
"""
CELL = """
import json, tensorflow, tfenv
told = tfenv.explain()
limit = next(setting.chosen for setting in told.settings if setting.name == "memory_limit")
held = [ceiling.value for ceiling in told.ceilings]
print(json.dumps({"limit": limit.value, "from": limit.path, "ceilings": held, "job": dict(told.grant.job)}))
"""


class Hub:
    """A hub and what a user does there."""

    def __init__(self, port: int, process: subprocess.Popen[str], folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.folder = folder

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Ask the hub's or a server's API."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            headers={"Authorization": f"token {_TOKEN}", "Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def start_server(self, user: str) -> None:
        self.ask("POST", f"/hub/api/users/{user}/server", {})
        deadline = time.monotonic() + _START_S
        while not self.ask("GET", f"/hub/api/users/{user}")["servers"].get("", {}).get("ready"):
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.3)

    def run_cell(self, user: str, code: str, notebook: str = "a.ipynb") -> str:
        """Run code in a new kernel of the user's, as a notebook's session. Return what it prints."""
        session = {"path": notebook, "name": Path(notebook).name, "type": "notebook", "kernel": {"name": "python3"}}
        kernel = self.ask("POST", f"/user/{user}/api/sessions", session)["kernel"]["id"]
        return asyncio.run(self._execute(user, kernel, code))

    async def _execute(self, user: str, kernel: str, code: str) -> str:
        from tornado.httpclient import HTTPRequest
        from tornado.websocket import websocket_connect

        url = f"{self.url.replace('http', 'ws')}/user/{user}/api/kernels/{kernel}/channels"
        channel = await websocket_connect(HTTPRequest(url, headers={"Authorization": f"token {_TOKEN}"}))
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "s", "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": True}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        await channel.write_message(json.dumps({**message, "buffers": []}))
        printed = ""
        while True:
            text = await asyncio.wait_for(asyncio.ensure_future(channel.read_message()), 120)
            answer = json.loads(text or "{}")
            if answer["parent_header"].get("msg_id") != header["msg_id"]:
                continue
            if answer["msg_type"] == "stream":
                printed += answer["content"]["text"]
            elif answer["msg_type"] == "error":
                raise AssertionError(answer["content"])
            elif answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
                channel.close()
                return printed


def _find_free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def _write_files(folder: Path) -> str:
    """Write the files of the recipe below the folder. Return its jupyterhub_config.py, which names that folder."""
    config = ""
    for block in blocks(pages=[ROOT / "docs" / "recipes" / "jupyterhub.md"]):
        first = block.text.partition("\n")[0]
        if first == "# jupyterhub_config.py" and "pre_spawn_hook" in block.text and "policy_from" not in block.text:
            config = block.text
        elif block.language == "toml" and first.startswith("# /etc/tfgpu-hub/"):
            path = folder / first.removeprefix("# /etc/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    assert config
    return config.replace("tfenv.jupyterhub.policy", f'tfenv.jupyterhub.policy_from("{folder}/tfgpu-hub")')


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, simulated_gpus: SimulatedGpus) -> Iterator[Hub]:
    """Start a hub with the configuration of the recipe."""
    proxy = shutil.which("configurable-http-proxy", path=os.pathsep.join((str(_BIN), os.environ.get("PATH", ""))))
    if find_spec("jupyterhub") is None or find_spec("jupyter_server") is None:
        pytest.skip("jupyterhub and jupyter-server are not installed here")
    if proxy is None:
        pytest.skip("configurable-http-proxy, of npm, is not installed here")
    folder = tmp_path_factory.mktemp("hub")
    folder.chmod(0o755)
    port, hub_port, proxy_port = _find_free_ports(3)
    text = CONFIG.format(
        port=port, hub_port=hub_port, proxy_port=proxy_port, proxy=proxy, folder=folder, token=_TOKEN,
        single_user=_BIN / "jupyterhub-singleuser",
    )  # fmt: skip
    (folder / "jupyterhub_config.py").write_text(text + _write_files(folder))
    stand_in = folder / "stand-in" / "tensorflow"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("")
    for user in ("alice", "bob"):
        (folder / "home" / user).mkdir(parents=True)
    env = launch.build_environment(simulated_gpus()) | {"HOME": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join((str(stand_in.parent), env.get("PYTHONPATH", "")))
    log = (folder / "hub.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterhub", "-f", str(folder / "jupyterhub_config.py")],
        cwd=folder, env=env, stdout=log, stderr=log, text=True, start_new_session=True,
    )  # fmt: skip
    made = Hub(port, process, folder)
    try:
        _wait_for(made)
        for user in ("alice", "bob"):
            made.start_server(user)
        yield made
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        log.close()


def _wait_for(hub: Hub) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            hub.ask("GET", "/hub/api/users")
        except (urllib.error.URLError, ConnectionError):
            ended = hub.process.poll() is not None or time.monotonic() > deadline
            assert not ended, (hub.folder / "hub.log").read_text()
            time.sleep(0.3)
        else:
            return


def read(printed: str) -> dict[str, Any]:
    """What the cell printed. The line about the stand-in for TensorFlow comes first."""
    seen: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return seen


def test_each_user_has_the_policy_of_their_group(hub: Hub) -> None:
    """alice is of the staff, bob is a student. The file of each is the site's, and holds in their kernels."""
    for user, limit, group in (("alice", "16GiB", "staff"), ("bob", "4GiB", "students")):
        seen = read(hub.run_cell(user, CELL))
        assert (seen["limit"], seen["from"]) == (limit, f"{hub.folder}/tfgpu-hub/groups/{group}.toml")
        assert seen["job"]["hub_user"] == user


def test_a_notebooks_own_file_counts_beside_the_hubs(hub: Hub) -> None:
    """A project's limit of 2 GiB is nearer than the group's 4 GiB. The group's ceilings hold all the same."""
    project = hub.folder / "home" / "bob" / "vision"
    project.mkdir()
    (project / "tfgpu.toml").write_text('[gpu]\nmemory_limit = "2GiB"\n')
    seen = read(hub.run_cell("bob", CELL, "vision/train.ipynb"))
    assert (seen["limit"], seen["from"]) == ("2GiB", str(project / "tfgpu.toml"))
    assert seen["ceilings"] == ["8GiB"]
    assert seen["job"]["notebook"] == str(project / "train.ipynb")
