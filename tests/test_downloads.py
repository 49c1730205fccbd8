"""Downloads from a server in a thread: resuming, wrong files, interruptions; no other network is touched."""

import contextlib
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
from purify.downloads import cache_folder, download

CONTENT = bytes(range(256)) * 20000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.content``, by ranges if asked; may break off after ``server.limit`` bytes, or go slowly."""

    def do_GET(self):
        s, content = self.server.settings, self.server.settings.content
        wanted = self.headers.get("Range") if s.ranges else None
        s.requests.append((self.path, self.headers.get("Range")))
        start = 0
        if wanted and self.headers.get("If-Range") in (None, s.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(s.status if start == 0 else 206)
        self.send_header("Content-Type", s.kind)
        self.send_header("Content-Length", str(len(content) - start))
        if s.etag:
            self.send_header("ETag", s.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
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
        content=CONTENT, etag='"1"', ranges=True, limit=None, pause=0.0, status=200,
        kind="application/octet-stream", requests=[], url=f"http://127.0.0.1:{http_server.server_port}/file.pt",
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
    assert (tmp_path / "new" / "file.pt.sha256").read_text() == f"{SHA256}  file.pt\n"
    assert names(path.parent) == ["file.pt", "file.pt.sha256"]
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
    assert names(tmp_path) == ["file.pt", "file.pt.sha256"]


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


def test_a_killed_download_resumes_to_the_same_file(tmp_path, server):
    path, partial = tmp_path / "file.pt", tmp_path / "file.pt.partial"
    server.pause = 0.05
    code = f"""
        from pathlib import Path
        from purify.downloads import download
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
    assert names(tmp_path) == []
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
    kept = [n for n in names(folder) if not n.endswith(".sha256")]
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
