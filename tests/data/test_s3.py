"""Packed images in a bucket: an S3-compatible server (moto) behind a proxy that fails, delays and cuts answers."""

import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from simmim.cli import main
from simmim.data.packed import format as packed_format

for package in ("moto", "s3fs", "flask"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 's3fs' 'moto[server]'")

pytestmark = pytest.mark.slow

TRAIN = (
    "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=48 num_heads=3 --image-size 32 --mask-cell 16 "
    "--objective pixels --batch-size 4 --steps 24 --val-images 2 --precision fp32 --device cpu --workers 2 "
    "--save-every-steps 12 --log-every-steps 6"
)


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to the server at `port`, and spoils a share of the answers."""

    protocol_version = "HTTP/1.1"
    port = 0
    share = 0.0
    """Of the answers that are spoilt, in [0, 1]."""
    kinds: tuple[str, ...] = ()
    draw = random.Random(0)
    spoilt: ClassVar[Counter[str]] = Counter()

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.draw.choice(self.kinds) if self.draw.random() < self.share else ""
        self.spoilt[fault] += 1
        if fault == "refused":
            self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>", 40)
            return
        if fault == "dropped before":
            self.close_connection = True
            return
        time.sleep(0.5 * (fault == "slow"))
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        server.request(self.command, self.path, body, dict(self.headers))
        found = server.getresponse()
        content = found.read()
        if fault == "dropped after":  # the request was carried out, and no one hears of it
            self.close_connection = True
            return
        self.answer(found.status, found.getheaders(), content, len(content) // 2 if fault == "cut" else len(content))
        self.close_connection |= fault == "cut"

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", len(content))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content[:sent])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket, which this process and its children reach through the proxy."""
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        Proxy.port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(Proxy.port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    Thread(target=proxy.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "a"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", Proxy.port), 1):
                break
            time.sleep(0.1)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("images")
        yield "s3://images"
    proxy.shutdown()
    server.kill()
    server.wait()


@pytest.fixture
def faults() -> Iterator[Counter[str]]:
    """Counts of the answers that were spoilt; a third are."""
    Proxy.spoilt.clear()
    Proxy.share, Proxy.draw, Proxy.kinds = 0.33, random.Random(0), ("refused", "slow", "cut")
    yield Proxy.spoilt
    Proxy.share = 0.0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def packed(photos: Path, bucket: str) -> Path:
    """Shards of `photos`, which are in the bucket as `copied` too."""
    import s3fs

    out = photos.parent / "packed"
    assert main(["pack", str(photos), "--out", str(out), "--shard-size", "16"]) == 0
    s3fs.S3FileSystem(skip_instance_cache=True).put(str(out), f"{bucket}/copied", recursive=True)
    return out


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("readers", ["threads", "processes"])
def test_a_training_from_a_bucket_that_fails_at_times_is_that_from_the_disk(
    packed: Path, bucket: str, faults: Counter[str], tmp_path: Path, readers: str
) -> None:
    for data, run in ((str(packed), "disk"), (f"{bucket}/copied", "bucket")):
        words = f"pretrain --data {data} --out {tmp_path / run} {TRAIN} --readers {readers}"
        assert main(words.split()) == 0
    assert losses(tmp_path / "bucket") == losses(tmp_path / "disk")
    weights = [(tmp_path / run / "encoder/model.safetensors").read_bytes() for run in ("bucket", "disk")]
    assert weights[0] == weights[1]
    assert min(faults[kind] for kind in ("refused", "slow", "cut")) > 3
    assert not (tmp_path / "bucket/bad_images.txt").exists()


def stored(url: str) -> dict[str, bytes]:
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    return {path.split("/")[-1]: files.cat_file(path) for path in files.ls(url, detail=False)}


def on_disk(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def test_packing_into_a_bucket_that_fails_at_times_gives_the_files_of_the_disk(
    packed: Path, photos: Path, bucket: str, faults: Counter[str]
) -> None:
    Proxy.kinds = ("refused", "slow", "cut", "dropped before", "dropped after")
    assert main(["pack", str(photos), "--out", f"{bucket}/sent", "--shard-size", "4"]) == 0
    assert all(faults[kind] for kind in Proxy.kinds)
    Proxy.share = 0.0
    assert main(["pack", str(photos), "--out", f"{packed}-4", "--shard-size", "4"]) == 0
    assert stored(f"{bucket}/sent") == on_disk(Path(f"{packed}-4"))


def test_packing_that_is_killed_or_cut_off_leaves_no_pack_and_goes_on(
    packed: Path, photos: Path, bucket: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    url = f"{bucket}/killed"
    words = ["pack", str(photos), "--out", url, "--shard-size", "4"]
    monkeypatch.setattr(Proxy, "share", 1.0)
    Proxy.kinds = ("slow",)
    process = subprocess.Popen([sys.executable, "-m", "simmim", *words], stderr=subprocess.DEVNULL)
    files, deadline = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False), time.monotonic() + 120
    while not files.exists(f"{url}/00001.json") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -9
    Proxy.share = 0.0
    assert "packing.json" in stored(url) and "pack.json" not in stored(url)
    monkeypatch.setattr(packed_format, "_TRIES", 1)  # s3fs tries again itself: with ours it takes minutes
    Proxy.share, Proxy.kinds = 1.0, ("dropped before",)
    assert main(words) == 2
    Proxy.share = 0.0
    monkeypatch.undo()
    assert capfd.readouterr().err.splitlines()[-1].endswith("then repeat the command, which goes on")
    assert main(words) == 0
    assert main(["pack", str(photos), "--out", f"{packed}-killed", "--shard-size", "4"]) == 0
    assert stored(url) == on_disk(Path(f"{packed}-killed"))


def test_a_bucket_that_is_not_there_is_a_line(photos: Path, bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(photos), "--out", "s3://no-such-bucket/set"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "s3://no-such-bucket/set/packing.json cannot be written: " in line and "bucket does not exist" in line
