"""A small index behind the real application, asked in process or over a socket."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from search_world import draw_some, index, make_encoder
from starlette.testclient import TestClient

from lavis_cir_plugin.search import open_index
from lavis_cir_plugin.serving.app import create_app
from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.opened import Opened
from lavis_cir_plugin.serving.server import hosts_for, listening, server_for


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Twelve pictures with prices and brands, and their index."""
    folder = tmp_path_factory.mktemp("served")
    paths = draw_some(folder / "p", 12)
    rows = [f"{path.name},{number},{'xyz'[number % 3]}" for number, path in enumerate(paths)]
    (folder / "m.csv").write_text("\n".join(["path,price,brand", *rows]))
    encoder = make_encoder()
    index(folder / "p", folder / "i", encoder, metadata=folder / "m.csv")
    return SimpleNamespace(paths=paths, folder=folder, encoder=encoder, index=open_index(folder / "i", encoder))


@pytest.fixture
def make_client(world):
    """Return a client of an application of its own."""

    def make(limits=None, token=None, indexes=None, host="127.0.0.1", **settings):
        opened = {name: Opened(name, found) for name, found in (indexes or {"toys": world.index}).items()}
        return TestClient(create_app(opened, limits, token, hosts_for(host)), base_url="http://localhost", **settings)

    return make


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def running(world):
    """Start servers on free ports, with the index of the world and others; each is given as its address."""
    with contextlib.ExitStack() as stack:

        def start(limits=None, token=None, **others):
            opened = {name: Opened(name, found) for name, found in {"toys": world.index, **others}.items()}
            server = server_for(opened, limits or Limits(), token, hosts_for("127.0.0.1"))
            return stack.enter_context(served(server))

        yield start


@contextlib.contextmanager
def served(server):
    """Run a uvicorn server in a thread and give its address."""
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield SimpleNamespace(host="127.0.0.1", port=listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
