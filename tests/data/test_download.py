from __future__ import annotations

import errno
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from parcnn.data.download import download, fetch
from parcnn.data.published import RemoteFile
from parcnn.errors import DataError, DataUnavailableError
from tests.data.server import Server, serve

CONTENT = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()
FILE = RemoteFile("images.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
GOOD = {"/images.gz": CONTENT}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def get(folder: Path, *servers: Server) -> bytes:
    """Download from the servers in turn; the file's content, after which there is no other file."""
    download([FILE], [server.url for server in servers], folder, "test")
    assert [path.name for path in folder.iterdir()] == ["images.gz"]
    return (folder / "images.gz").read_bytes()


def test_a_file_and_the_folders_above_it(tmp_path: Path) -> None:
    with serve(Server(GOOD)) as server:
        assert get(tmp_path / "a" / "b", server) == CONTENT
        assert server.requests == [("/images.gz", None)]
        assert get(tmp_path / "a" / "b", server) == CONTENT
        assert len(server.requests) == 1  # it is there


@pytest.mark.parametrize("have", [1, 100_000, len(CONTENT) - 1])
def test_what_came_before_is_not_fetched_again(tmp_path: Path, have: int) -> None:
    (tmp_path / "images.gz.part").write_bytes(CONTENT[:have])
    with serve(Server(GOOD)) as server:
        assert get(tmp_path, server) == CONTENT
        assert server.requests == [("/images.gz", f"bytes={have}-")]


def test_a_whole_part_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / "images.gz.part").write_bytes(CONTENT)
    with serve(Server(GOOD)) as server:
        assert get(tmp_path, server) == CONTENT
        assert server.requests == []


def test_a_server_without_ranges_sends_it_all(tmp_path: Path) -> None:
    (tmp_path / "images.gz.part").write_bytes(CONTENT[:1000])
    with serve(Server(GOOD, ranges=False)) as server:
        assert get(tmp_path, server) == CONTENT
        assert server.requests == [("/images.gz", "bytes=1000-")]


@pytest.mark.parametrize("size", [5000, len(CONTENT), len(CONTENT) + 7])
def test_a_part_of_something_else_is_thrown_away(tmp_path: Path, size: int) -> None:
    (tmp_path / "images.gz.part").write_bytes(bytes(size))
    with serve(Server(GOOD)) as server:
        assert get(tmp_path, server) == CONTENT
        assert server.requests[-1] == ("/images.gz", None)


def test_a_connection_cut_is_continued_at_the_next_mirror(tmp_path: Path) -> None:
    with serve(Server(GOOD, cut_at=120_000)) as first, serve(Server(GOOD)) as second:
        assert get(tmp_path, first, second) == CONTENT
        assert second.requests == [("/images.gz", "bytes=120000-")]


def test_a_connection_cut_keeps_what_came_for_the_next_run(tmp_path: Path) -> None:
    with serve(Server(GOOD, cut_at=120_000)) as server:
        with pytest.raises(DataUnavailableError, match=r"ended after 120000 of 300001 bytes|IncompleteRead"):
            get(tmp_path, server)
        assert [path.name for path in tmp_path.iterdir()] == ["images.gz.part"]
        server.cut_at = None
        assert get(tmp_path, server) == CONTENT
        assert server.requests[-1] == ("/images.gz", "bytes=120000-")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"/images.gz": b"<html>moved</html>"},
        {"/images.gz": CONTENT[:-1] + b"x"},
        {"/images.gz": CONTENT + b"x"},
        {"/images.gz": CONTENT + bytes(1_000_000)},
        {"/images.gz": b""},
    ],
    ids=["404", "html", "other content", "one byte more", "megabyte more", "empty"],
)
def test_a_mirror_without_the_file_falls_through_to_the_next(tmp_path: Path, wrong: dict[str, bytes]) -> None:
    with serve(Server(wrong)) as first, serve(Server(GOOD)) as second:
        assert get(tmp_path, first, second) == CONTENT
        assert first.requests
        assert second.requests


def test_a_mirror_that_does_not_answer_falls_through(tmp_path: Path) -> None:
    with serve(Server(GOOD)) as dead:
        pass
    with serve(Server(GOOD)) as alive:
        assert get(tmp_path, dead, alive) == CONTENT


def test_a_wrong_sum_everywhere_leaves_nothing_in_place(tmp_path: Path) -> None:
    with serve(Server({"/images.gz": CONTENT[:-1] + b"x"})) as server:
        with pytest.raises(DataUnavailableError, match=r"not the published file(.|\n)*" + FILE.sha256) as caught:
            get(tmp_path, server, server)
        assert str(caught.value).count(server.url) == 2
    assert not (tmp_path / "images.gz").exists()
    assert (tmp_path / "images.gz.part").stat().st_size == 0


def test_every_mirror_and_its_fault_is_named(tmp_path: Path) -> None:
    with serve(Server()) as first, serve(Server({"/images.gz": b"x"})) as second:
        with pytest.raises(DataUnavailableError) as caught:
            get(tmp_path, first, second)
        assert f"{first.url}images.gz: HTTP 404 Not Found" in str(caught.value)
        assert f"{second.url}images.gz: ended after 1 of 300001 bytes" in str(caught.value)
        assert caught.value.where == "images.gz"


def test_two_at_once_do_not_spoil_the_file(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def one(server: Server) -> None:
        try:
            download([FILE], [server.url], tmp_path, "test")
        except DataError as error:
            failures.append(error)

    with serve(Server(GOOD)) as server:
        threads = [threading.Thread(target=one, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert (tmp_path / "images.gz").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        download([FILE], ["http://127.0.0.1:9/"], tmp_path / "file" / "data", "test")


def test_a_part_that_cannot_be_opened_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "images.gz.part").mkdir()
    with pytest.raises(DataError, match=r"images\.gz\.part: cannot be written"):
        download([FILE], ["http://127.0.0.1:9/"], tmp_path, "test")


@pytest.mark.parametrize("call", ["fcntl.flock", "os.fsync"])
def test_a_file_system_without_locks_or_room_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(f"parcnn.data.download.{call}", refuse)
    with serve(Server(GOOD)) as server, pytest.raises(DataError, match=r"images\.gz\.part: cannot be written"):
        fetch(FILE, [server.url + FILE.name], tmp_path / FILE.name, lambda have: None)


def test_a_full_disk_is_a_data_error_and_not_a_fault_of_the_mirror(tmp_path: Path) -> None:
    (tmp_path / "images.gz.part").symlink_to("/dev/full")
    with serve(Server(GOOD)) as server, pytest.raises(DataError, match="No space left") as caught:
        get(tmp_path, server, server)
    assert not isinstance(caught.value, DataUnavailableError)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    with serve(Server(GOOD)) as server:
        get(tmp_path, server)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("images.gz" in shown.err) == terminal
    assert terminal or shown.err == ""


def test_a_server_that_never_stops_is_cut_off(tmp_path: Path) -> None:
    had: list[int] = []
    endless = Server({"/images.gz": CONTENT + bytes(10_000_000)})
    with serve(endless) as server, pytest.raises(DataUnavailableError, match="not the published file"):
        fetch(FILE, [server.url + "images.gz"], tmp_path / "images.gz", had.append)
    assert FILE.size < max(had) < FILE.size + 100_000
