"""A real server over sockets: slow clients, huge bodies, fifty people at once; where it listens, what it asks for."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import requests
import uvicorn
from search_world import draw_some, index
from serving_world import served

from lavis_cir_plugin.commands import main
from lavis_cir_plugin.search import open_index
from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.opened import RETRY_SECONDS, Opened, free_name
from lavis_cir_plugin.serving.patience import patient
from lavis_cir_plugin.serving.server import hosts_for, is_this_machine, listening, token_for

pytest_plugins = ["serving_world"]
DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
SEARCH = b"POST /api/v1/indexes/toys/search HTTP/1.1\r\nHost: localhost\r\n"
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
PATIENCE = 1.0


def connected(place):
    return socket.create_connection((place.host, place.port), timeout=20)


def closed_after(client):
    """Return after how many seconds the server has closed a connection, and how much came until then."""
    begin, came = time.monotonic(), 0
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            came += len(piece)
    return time.monotonic() - begin, came


def ask(place, timeout=30):
    return requests.post(f"http://{place.host}:{place.port}/api/v1/indexes/toys/search", {"text": "a"}, timeout=timeout)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        SEARCH + FORM + b"Content-Length: 100\r\n\r\ntext=",
        SEARCH + FORM + b"Transfer-Encoding: chunked\r\n\r\n5\r\nte",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTT",
    ],
)
def test_a_client_that_does_not_finish_its_request_is_cut_off(running, begun):
    place = running(Limits(seconds=PATIENCE))
    with connected(place) as client:
        client.sendall(begun)
        assert 0.5 * PATIENCE < closed_after(client)[0] < 10 * PATIENCE


def test_one_byte_at_a_time_buys_no_time(running):
    place = running(Limits(seconds=PATIENCE))
    with connected(place) as client:
        begin = time.monotonic()
        client.sendall(SEARCH + FORM + b"Content-Length: 9999\r\n\r\n")
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 10 * PATIENCE:
                client.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - begin < 10 * PATIENCE


def test_slow_clients_are_nobody_elses_trouble(running):
    place = running(Limits(seconds=30))
    slow = [connected(place) for _ in range(100)]
    try:
        for client in slow:
            client.sendall(SEARCH + FORM + b"Content-Length: 9\r\n\r\na")
        assert ask(place).status_code == 200
    finally:
        for client in slow:
            client.close()


def test_a_client_that_takes_nothing_in_is_cut_off():
    """The answer is larger than what the system keeps for a socket, so that the server would wait for ever."""
    total = 100_000_000

    async def large(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * (total // 1000), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(large, http=patient(PATIENCE), ws="none", lifespan="off", log_level="critical")
    with served(uvicorn.Server(config)) as place, connected(place) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3 * PATIENCE)
        _, came = closed_after(client)
        assert came < total, "it was cut off before the end"
    with served(uvicorn.Server(config)) as place, connected(place) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert closed_after(client)[1] > total, "who takes it in gets all, its head included"


@pytest.mark.parametrize("head", [b"Content-Length: 99999999999", b"Transfer-Encoding: chunked"])
def test_a_huge_body_is_not_read_to_its_end(running, head):
    place = running(Limits(upload_bytes=10_000, seconds=30))
    sent = 0
    with connected(place) as client:
        client.sendall(SEARCH + head + b"\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(2000):
                client.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
                sent += 1
    assert sent < 2000
    assert ask(place).status_code == 200


def test_fifty_people_at_once_all_get_their_answers(running, world):
    place = running()
    base = f"http://{place.host}:{place.port}/api/v1/indexes/toys"
    picture = world.paths[3].read_bytes()
    together = threading.Barrier(50)

    def person(number):
        with requests.Session() as session:
            together.wait(60)
            answers = [
                session.post(f"{base}/search", {"text": f"is {number}"}, files={"picture": picture}, timeout=120),
                session.post(f"{base}/search", {"text": f"is {number}", "where": "price < 6"}, timeout=120),
                session.get(f"{base}/pictures/{number % 12 + 1}/thumbnail", timeout=120),
                session.get(f"{base}/pictures/{number % 12 + 1}/file", timeout=120),
            ]
            assert [answer.status_code for answer in answers] == [200] * 4
            return [hit["id"] for hit in answers[0].json()["hits"]]

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(person, range(50)))
    alone = [world.index.search(picture, f"is {number}", 24).hits for number in range(50)]
    assert found == [[hit.picture.id for hit in hits] for hits in alone], "nobody gets the answer of another"


def test_the_client_of_the_documentation_works(running, world, tmp_path, monkeypatch):
    """Its code is run as it stands, but for the address."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    place = running(token="correct horse battery staple")
    (tmp_path / "shirt.jpg").write_bytes(world.paths[3].read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIS_CIR_TOKEN", "correct horse battery staple")
    known: dict[str, object] = {}
    exec(
        code.replace("http://127.0.0.1:8000", f"http://{place.host}:{place.port}").replace('"my_index"', '"toys"'),
        known,
    )
    expected = world.index.search(world.paths[3], "with longer sleeves", 5, where="price < 50").hits
    assert [hit["path"] for hit in known["answer"]["hits"]] == [hit.path for hit in expected]


# -- indexes that change ---------------------------------------------------------------------------------------------


def test_a_new_state_is_seen_and_the_old_one_stays_open_while_it_is_used(world, tmp_path):
    draw_some(tmp_path / "p", 3)
    index(tmp_path / "p", tmp_path / "i", world.encoder)
    opened = Opened("toys", open_index(tmp_path / "i", world.encoder))
    with opened.in_use() as before:
        draw_some(tmp_path / "p", 2, start=3)
        index(tmp_path / "p", tmp_path / "i", world.encoder)
        with opened.in_use() as after:
            assert (len(before), len(after)) == (3, 5)
        assert len(before.search(text="a").hits) == 3
    with pytest.raises(Exception, match="closed"):
        before.search(text="a")
    with opened.in_use() as still:
        assert still is after
        assert len(still.search(text="a").hits) == 5


def test_a_state_that_cannot_be_opened_is_said_once_and_the_one_before_is_kept(world, tmp_path, caplog):
    draw_some(tmp_path / "p", 3)
    index(tmp_path / "p", tmp_path / "i", world.encoder)
    opened = Opened("toys", open_index(tmp_path / "i", world.encoder))
    (manifest,) = (tmp_path / "i").glob("lavis_cir_index.json")
    manifest.unlink()
    manifest.write_text("{}")
    for _ in range(3):
        with opened.in_use() as found:
            assert len(found.search(text="a").hits) == 3
    assert caplog.text.count("toys stays as it was:") == 1


class Refreshed:
    """An index whose next state is what a function returns."""

    def __init__(self, refreshed):
        self.refreshed = refreshed

    def close(self):
        pass


def test_a_new_state_that_fails_in_any_way_is_tried_again_after_a_while(caplog, monkeypatch):
    """A GPU that is full is a RuntimeError, and loading a model takes seconds."""
    tries = []

    def refreshed():
        tries.append(1)
        raise RuntimeError("CUDA out of memory\nmore")

    opened = Opened("toys", Refreshed(refreshed))
    for _ in range(3):
        with opened.in_use():
            pass
    assert (len(tries), caplog.text.count("toys stays as it was: CUDA out of memory\n")) == (1, 1)
    opened._next_try -= RETRY_SECONDS
    with opened.in_use():
        assert len(tries) == 2


def test_while_one_request_opens_a_new_state_the_others_are_answered_from_the_one_before():
    begun, go_on, fresh = threading.Event(), threading.Event(), Refreshed(lambda: fresh)

    def refreshed():
        begun.set()
        assert go_on.wait(60)
        return fresh

    before = Refreshed(refreshed)
    opened = Opened("toys", before)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: opened.in_use().__enter__())
        assert begun.wait(60)
        with opened.in_use() as found:
            assert found is before
        go_on.set()
        assert first.result() is fresh


def test_indexes_of_one_name_are_numbered():
    assert free_name("toys", {}) == "toys"
    assert free_name("toys", {"toys": 1, "toys-2": 1}) == "toys-3"


# -- where it listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"])
def test_this_machine_alone_needs_no_token(host, monkeypatch):
    monkeypatch.delenv("LAVIS_CIR_TOKEN", raising=False)
    assert is_this_machine(host)
    assert token_for(host, None) is None
    assert host.lower() in hosts_for(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "pictures.example"])
def test_others_need_one_and_it_is_new_each_time(host, monkeypatch):
    monkeypatch.delenv("LAVIS_CIR_TOKEN", raising=False)
    first, second = token_for(host, None), token_for(host, None)
    assert first != second
    assert len(first) >= 40
    assert hosts_for(host) is None


def test_a_token_of_ones_own_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIS_CIR_TOKEN", "sixteen letters.")
    assert token_for("127.0.0.1", None) == "sixteen letters."
    file = tmp_path / "token"
    file.write_text("another sixteen.\n")
    assert token_for("0.0.0.0", str(file)) == "another sixteen."
    file.write_text("short")
    with pytest.raises(ValueError, match=r"token must hold at least 16 printable ASCII characters, and holds 5\."):
        token_for("127.0.0.1", str(file))
    monkeypatch.setenv("LAVIS_CIR_TOKEN", "")
    with pytest.raises(ValueError, match="LAVIS_CIR_TOKEN must hold at least 16"):
        token_for("0.0.0.0", None)


def test_a_port_that_is_taken_is_said_in_one_sentence():
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1, port {port} .*; choose another --port"):
            listening("127.0.0.1", port)
    with pytest.raises(OSError, match=r"cannot listen at 127\.0\.0\.1, port 99999"):
        listening("127.0.0.1", 99999)


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "python_multipart"])
def test_without_the_extra_the_command_names_it(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"needs the package {name}, .* pip install 'lavis_cir_plugin\[serve\]'\."):
        main.main(["serve", str(tmp_path)])


def test_an_index_that_is_none_is_refused_before_anything_is_served(tmp_path, capsys):
    with pytest.raises(SystemExit, match="is no index"):
        main.main(["serve", str(tmp_path), "--port", "0"])
    assert "http://" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--upload-mib must be a whole number >= 1, got 0"):
        main.main(["serve", str(tmp_path), "--upload-mib", "0"])
