"""getdata.sh against mirrors on the loopback interface: a good one, a corrupt one, a dead one."""

import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import threading

import pytest
from conftest import ROOT
from data import SPLITS

PREFIXES = {"penn": "ptb.", "wikitext-2": ""}  # of the files' names on the mirrors
FILES = {f"data/{corpus}/{split}.txt" for corpus in PREFIXES for split in SPLITS}
DEAD = "http://127.0.0.1:9"  # the port of a service that is long gone


def stand_in(corpus, split):
    return f"a small stand-in for {corpus} {split}\n".encode()


@pytest.fixture
def project(tmp_path):
    """A folder with the script, in which the digests are those of the stand-ins."""
    folder = tmp_path / "project"
    folder.mkdir()
    text, count = re.subn(
        r"(data/([\w-]+)/(\w+)\.txt )[0-9a-f]{64}",
        lambda found: found[1] + hashlib.sha256(stand_in(found[2], found[3])).hexdigest(),
        (ROOT / "getdata.sh").read_text(),
    )
    assert count == len(FILES)
    (folder / "getdata.sh").write_text(text)
    (folder / "getdata.sh").chmod(0o755)
    return folder


@pytest.fixture
def server(tmp_path):
    """A server's URL, under which lie the mirrors `good` and `corrupt`."""
    www = tmp_path / "www"
    for kind, more in (("good", b""), ("corrupt", b"!")):
        for corpus, prefix in PREFIXES.items():
            folder = www / kind / corpus
            folder.mkdir(parents=True)
            for split in SPLITS:
                (folder / f"{prefix}{split}.txt").write_bytes(stand_in(corpus, split) + more)

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=www)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(project, *bases, **environment):
    """Runs the script with mirrors below `bases`."""
    for variable, corpus in (("PTB_MIRRORS", "penn"), ("WIKITEXT2_MIRRORS", "wikitext-2")):
        environment[variable] = " ".join(f"{base}/{corpus}" for base in bases)
    return subprocess.run(
        [project / "getdata.sh"], cwd="/", capture_output=True, text=True, timeout=120,
        env={**os.environ, "no_proxy": "127.0.0.1", **environment},
    )


def files(project):
    """The names of what the script has fetched; the contents are as published."""
    found = {str(path.relative_to(project)) for path in project.rglob("*.*")}
    for name in found & FILES:
        _, corpus, file = name.split("/")
        assert (project / name).read_bytes() == stand_in(corpus, file.removesuffix(".txt"))
    return found - {"getdata.sh"}


@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_mirrors_are_tried_in_turn_and_a_second_run_does_nothing(tool, project, server, tmp_path):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is absent")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "mkdir", "mv", "rm", "rmdir", "cut", "sha256sum", tool):
        (tools / name).symlink_to(shutil.which(name))
    mirrors = DEAD, f"{server}/absent", f"{server}/corrupt", f"{server}/good"
    done = run(project, *mirrors, PATH=str(tools))
    assert done.returncode == 0, done.stderr
    assert files(project) == FILES
    assert done.stderr.count("wrong SHA-256") == 6
    again = run(project, DEAD)
    assert again.returncode == 0
    assert again.stdout.count("already here") == 6


def test_no_good_mirror_leaves_nothing_behind(project, server):
    done = run(project, f"{server}/corrupt", DEAD)
    assert done.returncode == 1
    assert "data/penn/train.txt: no mirror had it" in done.stderr
    assert files(project) == set()
    assert not (project / "data" / "penn").exists()


def test_a_file_that_is_not_the_published_one_is_not_overwritten(project, server):
    mine = project / "data" / "penn" / "train.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own text\n")
    done = run(project, f"{server}/good")
    assert done.returncode == 1
    assert "exists and is not the published file" in done.stderr
    assert mine.read_text() == "my own text\n"


def test_digests_are_those_of_the_real_corpora(real_corpus):
    text = (ROOT / "getdata.sh").read_text()
    for name in FILES:
        _, corpus, file = name.split("/")
        digest = hashlib.sha256((real_corpus(corpus) / file).read_bytes()).hexdigest()
        assert f"{name} {digest}" in text
