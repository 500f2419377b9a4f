"""A server of ``lavis-cir serve`` under mixed load: answers, errors and memory over minutes.

A process of its own serves an index of drawn garments with a small random model. Clients search by pictures and texts,
look at pictures, send wrong requests, and leave in the middle of one; every 20 seconds the index gets a new picture.
The memory is that of the serving process, read once a second. The script fails where an answer is not what its
request should get, or where the memory of the last fifth of the time is more than 10 % above that of the second fifth.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import requests
import torch
from PIL import Image

from lavis_cir_plugin.garments import draw_for_name
from lavis_cir_plugin.garments.attributes import CATEGORIES
from lavis_cir_plugin.search import Encoder, build_index_folder, open_index

MOST_GROWTH = 0.1
NEW_PICTURE_EVERY = 20.0
NAME = "toys"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--clients", type=int, default=50, help="at a time (default: 50)")
    parser.add_argument("--pictures", type=int, default=500, help="of the index (default: 500)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load = run(Path(folder), arguments.minutes * 60, arguments.clients, arguments.pictures)
    print("\n".join(report(load)))
    if load.wrong or growth(load.memory) > MOST_GROWTH:
        sys.exit("the server failed: see above.")


@dataclass
class Load:
    """What was measured.

    Attributes:
        seconds: Taken by each request, by its kind.
        statuses: How often each kind of request had which status.
        wrong: What should not have happened, with how often it did.
        memory: MiB of the serving process, once a second.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def run(folder: Path, seconds: float, clients: int, pictures: int) -> Load:
    """Serve, ask and measure."""
    encoder = make_encoder()
    for number in range(pictures):
        draw(folder / "p", number)
    update(folder, encoder)
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=serve, args=(folder, port), daemon=True)
    server.start()
    load = Load()
    try:
        base = f"http://127.0.0.1:{port.get(timeout=300)}"
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=client, args=(base, number, end, load, folder / "p")) for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        observe(server.pid or 0, end, load, folder, encoder, pictures)
        for thread in threads:
            thread.join()
        if not server.is_alive():
            load.wrong["the server ended"] += 1
    finally:
        server.terminate()
        server.join(30)
    return load


def make_encoder() -> Encoder:
    """Return the small model, with the same random weights in every process."""
    from lavis.models import load_model_and_preprocess

    import lavis_cir_plugin  # noqa: F401 (registers the model)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, vis, text = load_model_and_preprocess("blip2_cir", "tiny", is_eval=True)
    return Encoder(model, vis["eval"], text["eval"])


def draw(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw_for_name(str(number), CATEGORIES[number % len(CATEGORIES)]).save(folder / f"{number:05d}.jpg")


def update(folder: Path, encoder: Encoder) -> None:
    rows = [f"{path.name},{int(path.stem) % 100}" for path in sorted((folder / "p").iterdir())]
    (folder / "m.csv").write_text("\n".join(["path,price", *rows]))
    build_index_folder([folder / "p"], folder / "i", encoder, metadata=folder / "m.csv", workers=0, quiet=True)


def serve(folder: Path, port: multiprocessing.Queue[int]) -> None:
    """Serve the index in this process, and say on which port."""
    from lavis_cir_plugin.serving.limits import Limits
    from lavis_cir_plugin.serving.opened import Opened
    from lavis_cir_plugin.serving.server import hosts_for, listening, server_for

    opened = {NAME: Opened(NAME, open_index(folder / "i", make_encoder()))}
    with listening("127.0.0.1", 0) as listener:
        port.put(listener.getsockname()[1])
        server_for(opened, Limits(), None, hosts_for("127.0.0.1")).run(sockets=[listener])


def observe(process: int, end: float, load: Load, folder: Path, encoder: Encoder, pictures: int) -> None:
    """Read the memory once a second, and let the index grow."""
    due = time.monotonic() + NEW_PICTURE_EVERY
    while time.monotonic() < end:
        time.sleep(1)
        load.memory.append(memory_of(process))
        if time.monotonic() > due:
            draw(folder / "p", pictures)
            update(folder, encoder)
            pictures, due = pictures + 1, time.monotonic() + NEW_PICTURE_EVERY


def memory_of(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def client(base: str, number: int, end: float, load: Load, pictures: Path) -> None:
    """Ask one thing after the other until the time is over."""
    drawn = random.Random(number)
    kinds = requests_of(base, drawn, sorted(pictures.iterdir()))
    with requests.Session() as session:
        while time.monotonic() < end:
            (name, (_, ask, expected)) = drawn.choices(list(kinds.items()), [kind[0] for kind in kinds.values()])[0]
            begin = time.monotonic()
            try:
                status = ask(session)
            except requests.RequestException as error:
                with load.lock:
                    load.wrong[f"{name}: {type(error).__name__}"] += 1
                continue
            with load.lock:
                load.seconds[name].append(time.monotonic() - begin)
                load.statuses[name, status] += 1
                if status not in (expected, 503):
                    load.wrong[f"{name}: {status} in place of {expected}"] += 1
            time.sleep(drawn.uniform(0, 0.5))


def requests_of(
    base: str, drawn: random.Random, paths: list[Path]
) -> dict[str, tuple[int, Callable[[requests.Session], int], int]]:
    """Return the kinds of requests: how often each is made, what makes it, and the status it should get."""
    index = f"{base}/api/v1/indexes/{NAME}"

    def search(session: requests.Session, picture: bytes | None = None, **fields: object) -> int:
        files = {"picture": picture} if picture is not None else None
        return session.post(f"{index}/search", fields, files=files, timeout=120).status_code

    def get(session: requests.Session, path: str) -> int:
        return session.get(f"{index}/{path}", timeout=120).status_code

    def some() -> int:
        return drawn.randint(1, len(paths))

    def leave(session: requests.Session) -> int:
        address = base.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=60) as connection:
            head = f"POST /api/v1/indexes/{NAME}/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
        return 0

    large = io.BytesIO()
    Image.effect_noise((2000, 1500), 60).convert("RGB").save(large, "JPEG", quality=90)
    return {
        "picture and text": (30, lambda s: search(s, drawn.choice(paths).read_bytes(), text=f"is {some()}"), 200),
        "3-megapixel picture": (6, lambda s: search(s, large.getvalue()), 200),
        "text and condition": (16, lambda s: search(s, text=f"is {some()}", where=f"price < {some() % 100 + 1}"), 200),
        "picture by its id": (10, lambda s: search(s, picture_id=some(), text="is red", k=100), 200),
        "small picture": (24, lambda s: get(s, f"pictures/{some()}/thumbnail?side={drawn.choice([160, 320])}"), 200),
        "file": (6, lambda s: get(s, f"pictures/{some()}/file"), 200),
        "no picture": (3, lambda s: search(s, b"no picture" * 1000), 415),
        "wrong condition": (3, lambda s: search(s, text="a", where="price <"), 422),
        "unknown id": (2, lambda s: get(s, "pictures/999999/file"), 404),
        "leaves early": (3, leave, 0),
    }


def growth(memory: list[float]) -> float:
    """Return by which share the memory of the last fifth of the time is above that of the second fifth."""
    fifth = max(1, len(memory) // 5)
    return statistics.median(memory[-fifth:]) / statistics.median(memory[fifth : 2 * fifth] or memory) - 1


def report(load: Load) -> list[str]:
    """Lay out what was measured."""
    lines = [f"{'request':<22}{'count':>9}{'median':>10}{'95 %':>10}{'most':>10}{'told to wait':>15}"]
    for name, seconds in sorted(load.seconds.items()):
        ordered = sorted(seconds)
        high = ordered[int(0.95 * (len(ordered) - 1))]
        times = "".join(f"{1000 * value:>7,.0f} ms" for value in (statistics.median(ordered), high, ordered[-1]))
        lines.append(f"{name:<22}{len(ordered):>9,}{times}{load.statuses[name, 503]:>15,}")
    lines.append(f"{sum(map(len, load.seconds.values())):,} requests in all, {sum(load.wrong.values())} wrong")
    lines += [f"  {count} x {what}" for what, count in load.wrong.most_common()]
    places = [round(part * (len(load.memory) - 1) / 10) for part in range(11)] if load.memory else []
    lines.append("memory in MiB over the time: " + ", ".join(f"{load.memory[place]:.0f}" for place in places))
    lines.append(f"the last fifth of the time beside the second: {100 * growth(load.memory):+.1f} %")
    return lines


if __name__ == "__main__":
    main()
