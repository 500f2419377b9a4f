"""Who may ask, what may be sent, and which files are handed out."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib

import numpy as np
import pytest
from PIL import Image
from search_world import draw, draw_some, index

from lavis_cir_plugin.search import open_index
from lavis_cir_plugin.serving.guard import COOKIE
from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.pictures import Kept

pytest_plugins = ["serving_world"]
TOKEN = "correct horse battery staple"
SEARCH = "/api/v1/indexes/toys/search"
SECRET = "nobody may read this"


def message(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def upload(client, content, **data):
    return client.post(SEARCH, files=[("picture", content)], data=data)


def encoded(kind="PNG", size=(8, 8), **settings):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **settings)
    return buffer.getvalue()


def claiming(width, height):
    """Return a small PNG whose header claims this size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


# -- who may ask -----------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_said(make_client):
    client = make_client(token=TOKEN)
    for path in ("server", "indexes/toys/sample", "indexes/toys/pictures/1", "indexes/toys/pictures/1/file"):
        response = client.get(f"/api/v1/{path}")
        assert "asks for its token" in message(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert "asks for its token" in message(client.post(SEARCH, data={"text": "a"}), 401)
    assert client.get("/").status_code == 200, "the page itself asks for the token"


@pytest.mark.parametrize("shown", [f"Bearer {TOKEN}", f"bearer  {TOKEN} "])
def test_the_token_lets_a_program_in(make_client, shown):
    assert make_client(token=TOKEN).get("/api/v1/server", headers={"Authorization": shown}).status_code == 200


@pytest.mark.parametrize("shown", [TOKEN, f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}x", "Bearer caf\u00e9"])
def test_anything_else_does_not(make_client, shown):
    headers = {"Authorization": shown.encode("latin-1")}
    assert make_client(token=TOKEN).get("/api/v1/server", headers=headers).status_code == 401


def test_the_page_signs_in_once(make_client):
    client = make_client(token=TOKEN)
    assert client.get("/api/v1/session").json() == {"open": False, "signed_in": False}
    assert "not the server's token" in message(client.post("/api/v1/session", json={"token": "wrong"}), 401)
    assert client.get("/api/v1/server").status_code == 401
    signed = client.post("/api/v1/session", json={"token": TOKEN})
    cookie = signed.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert client.get("/api/v1/session").json() == {"open": False, "signed_in": True}
    assert client.get("/api/v1/indexes/toys/pictures/1/thumbnail").status_code == 200
    client.cookies.clear()
    client.cookies.set(COOKIE, "0" * 64)
    assert client.get("/api/v1/indexes/toys/pictures/1/thumbnail").status_code == 401


@pytest.mark.parametrize("other", ['theme={"dark": true}', "a=b c", "without_value", "a@b=1", 'open="quote'])
def test_a_cookie_of_another_server_of_this_machine_signs_nobody_out(make_client, other):
    """Cookies know no ports: a browser sends those of every server that it has met under one name."""
    client = make_client(token=TOKEN)
    client.post("/api/v1/session", json={"token": TOKEN})
    own = "; ".join(f"{cookie.name}={cookie.value}" for cookie in client.cookies.jar)
    client.cookies.clear()
    headers = {"Cookie": f"{other}; {own}"}
    assert client.get("/api/v1/session", headers=headers).json()["signed_in"]
    assert client.get("/api/v1/server", headers=headers).status_code == 200


def test_a_server_without_token_says_so(client):
    assert client.get("/api/v1/session").json() == {"open": True, "signed_in": True}


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_a_server_of_this_machine_answers_to_its_own_names(client, host):
    assert client.get("/api/v1/server", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::", "a@localhost:x"]
)
def test_and_to_no_other(client, host):
    assert "this server answers to" in message(client.get("/", headers={"Host": host}), 403)


def test_a_server_for_others_has_any_name_and_a_token(make_client):
    client = make_client(token=TOKEN, host="0.0.0.0")
    headers = {"Host": "pictures.example", "Authorization": f"Bearer {TOKEN}"}
    assert client.get("/api/v1/server", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    ],
)
def test_pages_of_other_sites_may_not_ask(client, headers):
    assert "pages of other sites" in message(client.post(SEARCH, data={"text": "a"}, headers=headers), 403)
    assert "pages of other sites" in message(client.get("/api/v1/indexes/toys/pictures/1/file", headers=headers), 403)


def test_its_own_page_may_and_a_link_to_it_may_be_followed(client):
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert client.post(SEARCH, data={"text": "a"}, headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/", headers=link).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/api/v1/server", "/nothing", "/openapi.json", "/api/v1/indexes/toys/pictures/1/file"]
)
def test_every_answer_has_the_headers_that_protect(make_client, path):
    for client in (make_client(), make_client(token=TOKEN)):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


# -- what may be sent ------------------------------------------------------------------------------------------------

SMALL = Limits(upload_bytes=20_000, upload_pixels=10_000, pictures=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_pictures_of_the_usual_kinds_are_taken(client, kind):
    assert upload(client, encoded(kind)).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 415, "no whole picture of a kind that is taken (JPEG, PNG"),
        (b"hello" * 100, 415, "no whole picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "no whole picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', 415, "no whole picture"),
        (encoded("TIFF"), 415, "no whole picture"),
        (encoded("ICO"), 415, "no whole picture"),
        (encoded(size=(200, 100)), 413, "a picture has 200 x 100 pixels, at most 10,000 are taken; scale it down."),
        (claiming(100_000, 100_000), 413, "pixels"),
        (claiming(2**31 - 1, 1), 413, "pixels"),
        (np.random.default_rng(0).bytes(20_001), 413, "a picture has 20,001 bytes; at most 20,000 are taken."),
        (encoded("JPEG", (90, 90))[:-30], 422, "cannot be read as an image"),
    ],
)
def test_what_is_no_picture_or_too_large_a_one_is_refused(make_client, content, status, said):
    assert said in message(upload(make_client(SMALL), content), status)


def test_too_large_a_body_is_refused_before_it_is_read(make_client):
    client = make_client(SMALL)
    body = b"x" * (SMALL.body_bytes + 1)
    assert "send at most 2 pictures of 20,000 bytes each" in message(client.post(SEARCH, content=body), 413)
    for length in ("-1", "1e9", "12, 12"):
        assert client.post(SEARCH, content=b"x", headers={"Content-Length": length}).status_code == 400


def test_too_large_a_body_is_refused_while_it_is_read(make_client):
    client = make_client(SMALL)
    taken = []

    def pieces():
        yield b'--b\r\nContent-Disposition: form-data; name="picture"; filename="x"\r\n\r\n'
        for number in range(1000):
            taken.append(number)
            yield b"x" * 10_000

    response = client.post(SEARCH, content=pieces(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert "is larger than" in message(response, 413)


def test_bodies_share_the_memory_that_there_is(make_client):
    client = make_client(Limits(bodies_bytes=5_000))
    response = upload(client, b"x" * 6_000)
    assert "try again in a second" in message(response, 503)
    assert response.headers["retry-after"] == "1"
    assert upload(client, encoded()).status_code == 200, "what a refused body took is free again"


def test_uploads_are_written_nowhere(make_client, monkeypatch):
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: pytest.fail("written to a file"))
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert buffer.tell() > 2 * 2**20, "larger than what Starlette keeps in memory by itself"
    assert upload(make_client(), buffer.getvalue()).status_code == 200


def test_a_form_of_thousands_of_fields_is_refused(client):
    assert client.post(SEARCH, files=[("x", b"")] * 1001).status_code == 400


def test_who_comes_while_too_many_wait_is_told_so(make_client):
    client = make_client(Limits(waiting=-2))
    assert "too many people are asking" in message(client.post(SEARCH, data={"text": "a"}), 503)


# -- which files are handed out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/..%2fsecret.txt", "/%2e%2e/%2e%2e/secret.txt", "/static/app.py", "/app.py", "//etc/passwd",
        "/api/v1/indexes/toys/pictures/../../../../secret.txt", "/api/v1/indexes/..%2f..%2f/pictures/1/file",
        "/api/v1/indexes/toys/pictures/1%00/file", "/api/v1/indexes/toys/pictures/%2fetc%2fpasswd/file",
        "/api/v1/indexes/toys/pictures/-1/file", "/api/v1/indexes/toys/pictures/99999999999999999999/file",
        "/api/v1/indexes/toys/pictures/1e0/file", "/api/v1/indexes/toys/pictures/0x1/file", "/app.js%00.html",
        "/api/v1/indexes/toys/pictures/1;cat/file", "/api/v1/indexes/toys/pictures/1/file/../../../../x",
    ],
)  # fmt: skip
def test_no_path_leads_out(client, path):
    response = client.get(path, follow_redirects=False)
    assert response.status_code in (307, 404, 405, 422)
    assert SECRET not in response.text
    assert "root:" not in response.text


@pytest.fixture
def own(world, tmp_path, make_client):
    """An index of its own, whose files may be changed, and a file that is none of it."""
    paths = draw_some(tmp_path / "p", 3)
    index(tmp_path / "p", tmp_path / "i", world.encoder)
    (tmp_path / "secret.txt").write_text(SECRET)
    return paths, make_client(indexes={"toys": open_index(tmp_path / "i", world.encoder)}), tmp_path


@pytest.mark.parametrize("what", ["file", "thumbnail", "search"])
@pytest.mark.parametrize("change", ["link", "same size", "other picture", "folder", "pipe", "gone"])
def test_a_file_that_is_not_what_was_indexed_is_not_handed_out(own, change, what):
    paths, client, folder = own
    path = paths[0]
    size = path.stat().st_size
    path.unlink()
    if change == "link":
        path.symlink_to(folder / "secret.txt")
    elif change == "same size":
        path.write_bytes(SECRET.encode().ljust(size))
    elif change == "other picture":
        draw(path, seed=77)
    elif change == "folder":
        path.mkdir()
    elif change == "pipe":
        os.mkfifo(path)
    response = asked(client, 1, what)
    assert "bring the index up to date" in message(response, 409)
    assert SECRET not in response.text
    assert asked(client, 2, what).status_code == 200


def asked(client, picture_id, what):
    """Ask for a picture, or for others like it."""
    if what == "search":
        return client.post(SEARCH, data={"picture_id": picture_id})
    return client.get(f"/api/v1/indexes/toys/pictures/{picture_id}/{what}")


def test_a_model_that_is_gone_is_not_said_to_be_a_picture(own, make_client):
    _, _, folder = own
    found = open_index(folder / "i")
    object.__setattr__(found.manifest, "name", str(folder / "gone.pth"))
    client = make_client(indexes={"toys": found}, raise_server_exceptions=False)
    assert "the server failed; its log says why" in message(client.post(SEARCH, data={"picture_id": 1}), 500)


def test_a_link_to_the_very_content_is_as_good_as_the_file(own):
    paths, client, folder = own
    paths[0].rename(folder / "moved.png")
    paths[0].symlink_to(folder / "moved.png")
    assert client.get("/api/v1/indexes/toys/pictures/1/file").status_code == 200


def test_small_copies_take_no_more_memory_than_they_may():
    kept = Kept(10)
    kept.put(("a", 1), b"1234")
    kept.put(("b", 1), b"1234")
    assert kept.get(("a", 1)) == b"1234"
    kept.put(("c", 1), b"1234")  # b was not asked for for the longest time
    assert [kept.get((name, 1)) for name in "abc"] == [b"1234", None, b"1234"]
    assert kept.bytes == 8
    kept.put(("a", 1), b"12345678901")
    assert (kept.bytes, kept.get(("a", 1))) == (0, None), "one that is too large alone is not kept"
