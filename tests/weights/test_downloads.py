"""Downloads from a server in a thread: resuming, wrong files, interruptions; no other network is touched."""

import contextlib
import fcntl
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from purify import load_score_model
from purify.__main__ import main
from purify.checkpoints import PUBLIC, public
from purify.weights.downloads import cache_folder, checked, download, hash_file

CONTENT = bytes(range(256)) * 20000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.content``, by ranges if asked; may break off after ``server.limit`` bytes, or go slowly.

    It may ignore If-Range (``careless``), and replace headers of a part (``part``) or of any answer (``headers``).
    """

    def do_GET(self):
        s, content = self.server.settings, self.server.settings.content
        wanted = self.headers.get("Range") if s.ranges else None
        s.requests.append((self.path, self.headers.get("Range")))
        start = 0
        if wanted and (s.careless or self.headers.get("If-Range") in (None, s.etag)):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(s.status if start == 0 else 206)
        headers = {"Content-Type": s.kind, "Content-Length": str(len(content) - start), "ETag": s.etag}
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}", **s.part}
        for name, value in {**headers, **s.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        body = content[start:] if s.limit is None else content[start : start + s.limit]
        with contextlib.suppress(ConnectionError):  # the client was killed
            for i in range(0, len(body), 65536):
                self.wfile.write(body[i : i + 65536])
                time.sleep(s.pause)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Settings of a server; ``url`` is where it listens."""
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    settings = SimpleNamespace(
        content=CONTENT, etag='"1"', ranges=True, limit=None, pause=0.0, status=200, careless=False,
        part={}, headers={}, kind="application/octet-stream", requests=[],
        url=f"http://127.0.0.1:{http_server.server_port}/file.pt",
    )  # fmt: skip
    http_server.settings = settings
    threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
    yield settings
    http_server.shutdown()
    http_server.server_close()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_download_is_complete_checked_and_recorded(tmp_path, server):
    path = tmp_path / "new" / "file.pt"
    assert download(server.url, path, SHA256) == SHA256
    assert path.read_bytes() == CONTENT
    comment, line = (tmp_path / "new" / "file.pt.sha256").read_text().splitlines()
    assert comment == f"# size {len(CONTENT)} mtime_ns {path.stat().st_mtime_ns}"
    assert line == f"{SHA256}  file.pt"
    assert names(path.parent) == ["file.pt", "file.pt.lock", "file.pt.sha256"]
    assert download(server.url, path, SHA256) == SHA256  # is only checked
    assert len(server.requests) == 1


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["known", "unknown"])
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server, sha256):
    path = tmp_path / "file.pt"
    server.limit = 2_000_000
    for done in (2_000_000, 4_000_000):
        with pytest.raises(OSError, match=f"broke off after {done} of {len(CONTENT)} bytes; run it again"):
            download(server.url, path, sha256)
        assert not path.exists()
    assert download(server.url, path, sha256) == SHA256
    assert [r for _, r in server.requests] == [None, "bytes=2000000-", "bytes=4000000-"]
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file.pt", "file.pt.lock", "file.pt.sha256"]


@pytest.mark.parametrize("change", ["version", "no ranges", "no validator"])
def test_what_cannot_go_on_starts_over(tmp_path, server, change):
    path = tmp_path / "file.pt"
    server.limit = 2_000_000
    server.etag = None if change == "no validator" else '"1"'
    with pytest.raises(OSError, match="broke off"):
        download(server.url, path)
    server.limit = None
    if change == "version":
        server.content, server.etag = CONTENT[::-1], '"2"'
    server.ranges = change != "no ranges"
    download(server.url, path)
    assert path.read_bytes() == server.content


def test_a_complete_partial_file_needs_no_byte_more(tmp_path, server):
    (tmp_path / "file.pt.partial").write_bytes(CONTENT)
    (tmp_path / "file.pt.etag").write_text('"1"')
    assert download(server.url, tmp_path / "file.pt", SHA256) == SHA256
    assert server.requests == [("/file.pt", f"bytes={len(CONTENT)}-")]


def broken_off(path, server, sha256=None):
    """The first 2 MB are here; the rest is to come."""
    server.limit = 2_000_000
    with pytest.raises(OSError, match="broke off"):
        download(server.url, path, sha256)
    server.limit = None


@pytest.mark.parametrize(
    "part",
    [
        {"ETag": '"2"'},
        {"ETag": 'W/"1"'},
        {"ETag": None},
        {"Content-Range": None},
        {"Content-Range": f"bytes 2000001-{len(CONTENT) - 1}/{len(CONTENT)}"},
        {"Content-Range": f"bytes 1999999-{len(CONTENT) - 1}/{len(CONTENT)}"},
        {"Content-Range": f"bytes 2000000-{len(CONTENT) - 1}/{len(CONTENT) + 1}"},
        {"Content-Range": f"bytes 2000000-{len(CONTENT) - 1}/*"},
        {"Content-Length": "2000000"},
    ],
    ids=str,
)
def test_a_part_that_does_not_continue_this_version_starts_over(part, tmp_path, server):
    path = tmp_path / "file.pt"
    broken_off(path, server)
    server.part = part
    assert download(server.url, path) == SHA256
    assert [r for _, r in server.requests] == [None, "bytes=2000000-", None]


def test_two_versions_are_not_mixed(tmp_path, server):
    """The server goes on with another version, as if nothing were different."""
    path = tmp_path / "file.pt"
    broken_off(path, server)
    server.careless, server.etag, server.content = True, '"2"', CONTENT[::-1]
    download(server.url, path)
    assert path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["known", "unknown"])
def test_more_bytes_than_there_are_start_over(sha256, tmp_path, server):
    path = tmp_path / "file.pt"
    (tmp_path / "file.pt.partial").write_bytes(CONTENT + b"too much")
    (tmp_path / "file.pt.etag").write_text('"1"')
    assert download(server.url, path, sha256) == SHA256  # 416, another size
    assert [r for _, r in server.requests] == [f"bytes={len(CONTENT) + 8}-", None]


def test_nothing_missing_is_believed_only_where_the_sha256_is_known(tmp_path, server):
    (tmp_path / "file.pt.partial").write_bytes(CONTENT[::-1])
    (tmp_path / "file.pt.etag").write_text('"1"')
    assert download(server.url, tmp_path / "file.pt") == SHA256


def test_an_answer_without_a_length_needs_a_known_sha256(tmp_path, server):
    path = tmp_path / "file.pt"
    server.headers, server.limit = {"Content-Length": None}, 1000
    with pytest.raises(ValueError, match="tells no length, and no sha256 is known; put the file at"):
        download(server.url, path)
    with pytest.raises(ValueError, match=f"instead of {SHA256}; it was deleted"):  # cut, unseen but by the sum
        download(server.url, path, SHA256)
    server.limit = None
    assert download(server.url, path, SHA256) == SHA256


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b""], ids=["whole", "cut"])
def test_chunks_tell_their_end(end, tmp_path, server):
    path = tmp_path / "file.pt"
    server.headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    server.content = b"3\r\nabc\r\n" + end
    if end:
        download(server.url, path)
        assert path.read_bytes() == b"abc"
    else:
        with pytest.raises(OSError, match="broke off"):
            download(server.url, path)
        assert not path.exists()


def test_a_second_process_does_not_touch_what_the_first_one_finished(tmp_path, server, monkeypatch):
    """The first one finishes between the second's look at the folder and its lock."""
    path, flock = tmp_path / "file.pt", fcntl.flock

    def late(f, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert download(server.url, path) == SHA256
        server.content, server.etag = b"another version", '"2"'
        flock(f, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert download(server.url, path) == SHA256
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_target_that_cannot_be_written_is_said_first(tmp_path, server):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ValueError, match=r"file cannot be written to .*set PURIFY_CACHE to another folder"):
        download(server.url, tmp_path / "file" / "file.pt")
    with pytest.raises(ValueError, match=r"folder\.pt .* is a folder"):
        download(server.url, tmp_path / "folder.pt")
    assert server.requests == []


# --- records ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are hashed."""
    seen = []

    def spy(path, progress=False):
        seen.append(path.name)
        return hash_file(path, progress)

    monkeypatch.setattr("purify.weights.downloads.hash_file", spy)
    return seen


def test_a_file_is_hashed_again_when_its_size_or_time_changes(tmp_path, hashed):
    path = tmp_path / "file.pt"
    assert not checked(path)
    path.write_bytes(CONTENT)
    for _ in range(3):
        assert checked(path, SHA256)
    assert len(hashed) == 1
    os.utime(path, (1, 1))
    assert checked(path)
    assert checked(path)
    assert len(hashed) == 2
    path.write_bytes(CONTENT[::-1])
    for sha256 in (SHA256, None):
        with pytest.raises(ValueError, match=f"instead of {SHA256}; delete it"):
            checked(path, sha256)


@pytest.mark.parametrize("record", ["", "\n", "# size 1 mtime_ns 1\n"])
def test_an_empty_record_is_none(record, tmp_path, hashed):
    path = tmp_path / "file.pt"
    path.write_bytes(CONTENT)
    (tmp_path / "file.pt.sha256").write_text(record)
    assert checked(path)
    assert checked(path)
    assert len(hashed) == 1


def test_a_record_of_sha256sum_is_held_to(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(CONTENT)
    (tmp_path / "file.pt.sha256").write_text(f"{SHA256}  file.pt\n")
    assert checked(path)
    done = subprocess.run(["sha256sum", "-c", "file.pt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "file.pt: OK\n", "")


def test_a_cache_that_only_others_write_to_can_be_used(tmp_path, monkeypatch):
    """As root every folder can be written to: here the writing fails."""
    path = tmp_path / "file.pt"
    path.write_bytes(CONTENT)
    record = tmp_path / "file.pt.sha256"
    record.write_text(f"{SHA256}  file.pt\n")

    def read_only(*args):
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    assert checked(path, SHA256)
    assert download("http://127.0.0.1:9/file.pt", path) == SHA256
    assert names(tmp_path) == ["file.pt", "file.pt.sha256"]
    assert record.read_text() == f"{SHA256}  file.pt\n"


# --- interruptions ------------------------------------------------------------------------------------------------


def test_a_killed_download_resumes_to_the_same_file(tmp_path, server):
    path, partial = tmp_path / "file.pt", tmp_path / "file.pt.partial"
    server.pause = 0.05
    code = f"""
        from pathlib import Path
        from purify.weights.downloads import download
        download({server.url!r}, Path({str(path)!r}))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not (partial.is_file() and partial.stat().st_size > 1_000_000):
        time.sleep(0.01)
        assert process.poll() is None
    with pytest.raises(ValueError, match="Another process is fetching"):
        download(server.url, path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.pause = 0.0
    assert not path.exists()
    size = partial.stat().st_size
    assert 0 < size < len(CONTENT)
    assert download(server.url, path) == SHA256
    assert server.requests[-1][1] == f"bytes={size}-"


def test_wrong_files_are_refused(tmp_path, server):
    path = tmp_path / "file.pt"
    with pytest.raises(ValueError, match=f"has the sha256 {SHA256} instead of 1234; it was deleted"):
        download(server.url, path, "1234")
    assert names(tmp_path) == ["file.pt.lock"]
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(ValueError, match="answered with a web page, not the file; put the file at"):
        download(server.url, path)
    assert not path.exists()
    server.status, server.kind = 404, "text/plain"
    with pytest.raises(OSError, match="answered 404"):
        download(server.url, path)
    with pytest.raises(OSError, match="broke off after 0 bytes"):
        download("http://127.0.0.1:9/file.pt", path, timeout=2)


def test_the_first_download_is_trusted_and_later_ones_are_held_to_it(tmp_path, server):
    path = tmp_path / "file.pt"
    download(server.url, path)
    path.unlink()
    server.content, server.etag = b"something else", '"2"'
    with pytest.raises(ValueError, match=f"instead of {SHA256}"):
        download(server.url, path)
    path.write_bytes(b"changed by hand")
    with pytest.raises(ValueError, match=f"instead of {SHA256}; delete it"):
        download(server.url, path)


def test_the_command_downloads_public_networks(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path))
    monkeypatch.setitem(PUBLIC, "improved-cifar10", replace(PUBLIC["improved-cifar10"], url=server.url))
    assert main(["download"]) == 0
    assert all(name in capsys.readouterr().out for name in ["improved-cifar10"])
    assert main(["download", "improved-cifar10"]) == 0
    path = tmp_path / "improved-cifar10" / "cifar10_uncond_50M_500K.pt"
    assert f"improved-cifar10: {path}" in capsys.readouterr().out
    assert path.read_bytes() == CONTENT
    with pytest.raises(ValueError, match=r"cifar10_uncond_50M_500K\.pt"):  # found by name, and no network of any kind
        load_score_model("improved-cifar10")
    assert main(["download", "improved-cifar10", "nothing"]) == 2
    assert "Unknown public score network 'nothing'" in capsys.readouterr().err
    monkeypatch.setitem(PUBLIC, "improved-cifar10", replace(PUBLIC["improved-cifar10"], sha256="1234"))
    assert main(["download", "improved-cifar10"]) == 2
    assert "delete it and download it again" in capsys.readouterr().err


def test_repositories_of_diffusers_are_downloaded_by_the_hubs_own_sums(tmp_path, server, monkeypatch):
    def sibling(name, sha256=None):
        return SimpleNamespace(rfilename=name, lfs=None if sha256 is None else SimpleNamespace(sha256=sha256))

    class Hub:
        def model_info(self, name, files_metadata):
            assert (name, files_metadata) == ("someone/ddpm", True)
            weights = "diffusion_pytorch_model"
            return SimpleNamespace(sha="abc", siblings=[
                sibling(f"{weights}.bin", "1"), sibling(f"{weights}.safetensors", server.sha256), sibling("README.md"),
                sibling("config.json"), sibling("scheduler_config.json"), sibling("vae/config.json"),
            ])  # fmt: skip

    def address(name, file, revision):
        assert (name, revision) == ("someone/ddpm", "abc")
        return server.url.replace("file.pt", file)

    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", address)
    server.sha256 = "1234"
    with pytest.raises(ValueError, match="instead of 1234"):
        public.fetch("someone/ddpm")
    with pytest.raises(ValueError, match="is not here"):
        public.find("someone/ddpm")
    server.sha256 = SHA256
    folder = public.fetch("someone/ddpm")
    assert public.find("someone/ddpm") == folder == tmp_path / "hub" / "someone--ddpm"
    kept = [n for n in names(folder) if not n.endswith((".sha256", ".lock"))]
    assert kept == ["config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("PURIFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "purify"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / ".cache" / "purify"
