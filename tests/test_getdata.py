"""getdata.sh against mirrors on the loopback interface: a good one, a corrupt one, a dead one."""

import hashlib
import http.server
import os
import re
import shutil
import socket
import subprocess
import threading

import pytest
from conftest import ROOT

SPLITS = ("train", "valid", "test")


@pytest.fixture
def mirrors(tmp_path):
    """(script in a folder of its own, URLs of a good and of a corrupt mirror, requests seen)."""
    folder = tmp_path / "project"
    folder.mkdir()
    www = tmp_path / "www"
    text = (ROOT / "getdata.sh").read_text()
    for corpus, prefix in (("penn", "ptb."), ("wikitext-2", "")):
        for kind in ("good", "corrupt"):
            (www / kind / corpus).mkdir(parents=True)
        for split in SPLITS:
            content = f"a small stand-in for {corpus} {split}\n".encode()
            (www / "good" / corpus / f"{prefix}{split}.txt").write_bytes(content)
            (www / "corrupt" / corpus / f"{prefix}{split}.txt").write_bytes(content + b"!")
            # The published files are large; the script under test checks the stand-ins' digests.
            text, n = re.subn(
                rf"(data/{corpus}/{split}\.txt )[0-9a-f]{{64}}",
                rf"\g<1>{hashlib.sha256(content).hexdigest()}", text,
            )
            assert n == 1
    script = folder / "getdata.sh"
    script.write_text(text)
    script.chmod(0o755)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=www)

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield script, f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def run(script, bases, path=None):
    environment = {
        **os.environ, "no_proxy": "127.0.0.1",
        "PTB_MIRRORS": " ".join(f"{base}/penn" for base in bases),
        "WIKITEXT2_MIRRORS": " ".join(f"{base}/wikitext-2" for base in bases),
    }
    if path:
        environment["PATH"] = str(path)
    return subprocess.run(
        [script], cwd="/", env=environment, capture_output=True, text=True, timeout=120
    )


def files(script):
    return sorted(str(p.relative_to(script.parent)) for p in script.parent.rglob("*.*"))


ALL = sorted(["getdata.sh"] + [f"data/{c}/{s}.txt" for c in ("penn", "wikitext-2") for s in SPLITS])


def dead_mirror():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_mirrors_are_tried_in_turn_and_a_second_run_does_nothing(mirrors):
    script, server, requests = mirrors
    bases = [dead_mirror(), f"{server}/absent", f"{server}/corrupt", f"{server}/good"]
    done = run(script, bases)
    assert done.returncode == 0, done.stderr
    assert files(script) == ALL
    for corpus in ("penn", "wikitext-2"):
        for split in SPLITS:
            content = (script.parent / "data" / corpus / f"{split}.txt").read_text()
            assert content == f"a small stand-in for {corpus} {split}\n"
    assert done.stderr.count("wrong SHA-256") == 6
    requests.clear()
    again = run(script, bases)
    assert again.returncode == 0
    assert again.stdout.count("already here") == 6
    assert requests == []


def test_no_good_mirror_leaves_nothing_behind(mirrors):
    script, server, _ = mirrors
    done = run(script, [f"{server}/corrupt", dead_mirror()])
    assert done.returncode == 1
    assert "data/penn/train.txt: no mirror had it" in done.stderr
    assert files(script) == ["getdata.sh"]
    assert not (script.parent / "data" / "penn").exists()


def test_a_file_that_is_not_the_published_one_is_not_overwritten(mirrors):
    script, server, _ = mirrors
    mine = script.parent / "data" / "penn" / "train.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own text\n")
    done = run(script, [f"{server}/good"])
    assert done.returncode == 1
    assert "exists and is not the published file" in done.stderr
    assert mine.read_text() == "my own text\n"


@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_either_downloader_serves(mirrors, tmp_path, tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is absent")
    script, server, _ = mirrors
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "mkdir", "mv", "rm", "rmdir", "cut", "sha256sum", tool):
        (tools / name).symlink_to(shutil.which(name))
    done = run(script, [f"{server}/absent", f"{server}/good"], path=tools)
    assert done.returncode == 0, done.stderr
    assert files(script) == ALL


def test_digests_are_those_of_the_real_corpora(real_corpus):
    text = (ROOT / "getdata.sh").read_text()
    for corpus in ("penn", "wikitext-2"):
        for split in SPLITS:
            digest = hashlib.sha256((real_corpus(corpus) / f"{split}.txt").read_bytes()).hexdigest()
            assert f"data/{corpus}/{split}.txt {digest}" in text
