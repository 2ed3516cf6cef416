from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.download import ETH_UCY, PUBLIC, DownloadError, fetch

CONTENT = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Home(ThreadingHTTPServer):
    """Serves CONTENT; ``plan`` holds what the next answers do, ``ranges`` what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[str] = []
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data.bin"


class Handler(BaseHTTPRequestHandler):
    server: Home

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        act = self.server.plan.pop(0) if self.server.plan else "serve"
        if act.isdigit():
            self.send_error(int(act))
            return
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
        start = 0 if act == "ignore-range" else start
        body = {"wrong": CONTENT[::-1], "longer": CONTENT + b"more"}.get(act, CONTENT)[start:]
        self.send_response(206 if start else 200)
        if start:
            shift = 7 if act == "wrong-range" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if act == "truncated":
            body = body[: len(body) // 2]
        if act != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 3] if act == "interrupted" else body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(home: Home, target: Path, **options: Any) -> Path:
    return fetch(home.url, target, SHA256, len(CONTENT), **{"backoff_s": 0.0} | options)


def assert_whole(target: Path) -> None:
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_file_arrives_whole(home: Home, tmp_path: Path) -> None:
    assert_whole(get(home, tmp_path / "new" / "data.bin"))
    assert home.ranges == [None]


def test_an_interrupted_download_resumes(home: Home, tmp_path: Path) -> None:
    home.plan = ["interrupted", "interrupted"]
    assert_whole(get(home, tmp_path / "data.bin"))
    assert home.ranges[0] is None
    assert [r for r in home.ranges if r] == ["bytes=33333-", "bytes=55555-"]


def test_a_truncated_answer_resumes_by_the_known_size(home: Home, tmp_path: Path) -> None:
    home.plan = ["truncated"]
    assert_whole(get(home, tmp_path / "data.bin"))
    assert home.ranges == [None, "bytes=50000-"]


def test_a_later_call_resumes_what_an_earlier_one_left(home: Home, tmp_path: Path) -> None:
    home.plan = ["interrupted"]
    with pytest.raises(DownloadError, match=r"33333 arrived.*run again"):
        get(home, tmp_path / "data.bin", attempts=1)
    assert not (tmp_path / "data.bin").exists()
    assert_whole(get(home, tmp_path / "data.bin"))
    assert home.ranges == [None, "bytes=33333-"]


def test_a_server_that_ignores_ranges_starts_again(home: Home, tmp_path: Path) -> None:
    home.plan = ["interrupted", "ignore-range"]
    assert_whole(get(home, tmp_path / "data.bin"))


def test_a_wrong_range_is_not_appended(home: Home, tmp_path: Path) -> None:
    home.plan = ["interrupted", "wrong-range"]
    assert_whole(get(home, tmp_path / "data.bin"))
    assert home.ranges[-1] is None


def test_a_foreign_part_is_thrown_away(home: Home, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * 500)
    assert_whole(get(home, tmp_path / "data.bin"))
    assert home.ranges == ["bytes=500-", None]


def test_a_part_that_is_too_long_is_thrown_away(home: Home, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert_whole(get(home, tmp_path / "data.bin"))


def test_a_whole_part_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert_whole(fetch("http://127.0.0.1:9/none", tmp_path / "data.bin", SHA256, len(CONTENT)))


def test_an_unsatisfiable_range_starts_again(home: Home, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:10])
    home.plan = ["416"]
    assert_whole(get(home, tmp_path / "data.bin"))
    assert home.ranges == ["bytes=10-", None]


@pytest.mark.parametrize("act", ["wrong", "longer"])
def test_a_wrong_file_is_removed_and_named(home: Home, tmp_path: Path, act: str) -> None:
    home.plan = [act] * 9
    with pytest.raises(DownloadError, match=f"expected sha256 {SHA256[:12]}, found .*removed"):
        get(home, tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []
    assert len(home.ranges) == 1


def test_a_server_error_is_tried_again(home: Home, tmp_path: Path) -> None:
    home.plan = ["503", "429"]
    assert_whole(get(home, tmp_path / "data.bin"))


def test_a_missing_file_is_not_tried_again(home: Home, tmp_path: Path) -> None:
    home.plan = ["404"] * 9
    with pytest.raises(DownloadError, match=r"404 .* put it at .*data\.bin"):
        get(home, tmp_path / "data.bin")
    assert len(home.ranges) == 1


def test_without_size_a_truncation_still_fails(home: Home, tmp_path: Path) -> None:
    home.plan = ["truncated"] * 9
    with pytest.raises(DownloadError, match="sha256"):
        fetch(home.url, tmp_path / "data.bin", SHA256, backoff_s=0.0)
    assert not (tmp_path / "data.bin").exists()


def test_an_answer_without_length(home: Home, tmp_path: Path) -> None:
    home.plan = ["unsized"]
    assert_whole(get(home, tmp_path / "data.bin"))


def test_no_network(tmp_path: Path) -> None:
    with Home() as closed:
        url = closed.url
    with pytest.raises(DownloadError, match=r"no answer .* 2 times; check the network"):
        fetch(url, tmp_path / "data.bin", SHA256, attempts=2, backoff_s=0.0)


def test_a_folder_that_cannot_be_written(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot be written .*data\.path"):
        get(home, tmp_path / "file" / "data.bin")


def test_public_files_are_pinned() -> None:
    for files in PUBLIC.values():
        for file in files:
            assert len(file.sha256) == 64
            assert file.size > 0
            assert file.url.startswith("http")
            assert "/" not in file.name


def test_every_scene_of_eth_ucy_has_its_files() -> None:
    for scene, held_out in ETH_UCY.items():
        files = [file.url.split("/datasets/")[1] for file in PUBLIC[f"eth_ucy/{scene}"]]
        assert [file for file in files if "/test/" in file] == [f"{scene}/test/{name}.txt" for name in held_out]
        for part in ("train", "val"):
            names = [file.removeprefix(f"{scene}/{part}/") for file in files if f"/{part}/" in file]
            assert len(names) == len(set(names)) == 8 - len(held_out)
            assert not any(name.startswith(held_out) for name in names)
