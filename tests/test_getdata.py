"""getdata.sh against mirrors on the loopback interface: a good one, a corrupt one, a dead one."""

import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
from conftest import ROOT
from data import SPLITS, Corpus

PREFIXES = {"penn": "ptb.", "wikitext-2": ""}  # of the files' names on the mirrors
FILES = {f"data/{corpus}/{split}.txt" for corpus in PREFIXES for split in SPLITS}
DEAD = "http://127.0.0.1:9"  # the port of a service that is long gone
MIRRORS = ("PTB_MIRRORS", "WIKITEXT2_MIRRORS", "WIKITEXT103_MIRRORS", "ENWIK8_MIRRORS")
LINE = re.compile(r"(?m)^(penn|pennchar|wikitext-2|wikitext-103|enwik8) ([0-9a-f]{64}) (\S+)$")
ENWIK8 = "<page>\n  é 12\n\n".encode() * 80_000 + b"last line"


def stand_in(corpus, split):
    if corpus == "penn":  # as there, a line begins and ends with a space
        return f" a small <unk> for {split} \n no it was n't \n".encode()
    return f"a small stand-in for {corpus} {split}\n".encode()


def spelled(split):
    """What becomes of a stand-in for penn in pennchar: Mikolov's format."""
    lines = stand_in("penn", split).decode().splitlines()
    text = "".join("_".join(line.split()) + "\n" for line in lines)
    return "".join(f"{character} " for character in text).encode()


def archive(**members):
    """The bytes of a zip archive with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zip:
        for name, content in members.items():
            zip.writestr(name, content)
    return file.getvalue()


ARCHIVES = {
    "enwik8.zip": archive(enwik8=ENWIK8),
    "wikitext-103-v1.zip": archive(**{
        f"wikitext-103/wiki.{split}.tokens": stand_in("wikitext-103", split) for split in SPLITS
    }),
}


def content_of(corpus, name):
    """The file on the mirrors, or in pennchar, of a line of the script's table."""
    split = name.removeprefix("ptb.").removesuffix(".txt")
    if name in ARCHIVES:
        return ARCHIVES[name]
    return spelled(split) if corpus == "pennchar" else stand_in(corpus, split)


@pytest.fixture
def project(tmp_path):
    """A folder with the script, in which the digests are those of the stand-ins."""
    folder = tmp_path / "project"
    folder.mkdir()

    def of_stand_in(line):
        corpus, name = line[1], line[3]
        return f"{corpus} {hashlib.sha256(content_of(corpus, name)).hexdigest()} {name}"

    text, count = LINE.subn(of_stand_in, (ROOT / "getdata.sh").read_text())
    assert count == 11
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
        for name, content in ARCHIVES.items():
            (www / kind / name).write_bytes(content + more)

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=www)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(project, *bases, corpora=(), **environment):
    """Runs the script with mirrors below `bases`."""
    for variable, folder in zip(MIRRORS, ("/penn", "/wikitext-2", "", "")):
        environment[variable] = " ".join(f"{base}{folder}" for base in bases)
    environment["PYTHON"] = sys.executable
    return subprocess.run(
        [project / "getdata.sh", *corpora], cwd="/", capture_output=True, text=True, timeout=120,
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
    assert done.returncode == 2
    assert "data/penn/train.txt: no mirror had it" in done.stderr
    assert files(project) == set()
    assert not (project / "data" / "penn").exists()


def test_a_file_that_is_not_the_published_one_is_not_overwritten(project, server):
    mine = project / "data" / "penn" / "train.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own text\n")
    done = run(project, f"{server}/good")
    assert done.returncode == 2
    assert "exists and is not the published file" in done.stderr
    assert mine.read_text() == "my own text\n"


def test_digests_are_those_of_the_real_corpora(real_corpus):
    lines = LINE.findall((ROOT / "getdata.sh").read_text())
    for corpus, digest, name in lines:
        if corpus in PREFIXES:
            content = (real_corpus(corpus) / name.removeprefix("ptb.")).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest


# ------------------------------------------------------------ what is made or unpacked


def read(project, corpus):
    """{split: text} of what the script has made; nothing else is in the folder."""
    folder = project / "data" / corpus
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{s}.txt" for s in SPLITS)
    return {split: (folder / f"{split}.txt").read_bytes() for split in SPLITS}


def test_pennchar_is_made_from_the_words(project, server):
    for _ in range(2):
        done = run(project, f"{server}/good", corpora=["pennchar"])
        assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("already here") == 6
    assert read(project, "pennchar") == {split: spelled(split) for split in SPLITS}
    corpus = Corpus(project / "data" / "pennchar")
    words = [corpus.dictionary.idx2word[i] for i in corpus.train]
    assert words[:13] == [*"a_small_<unk>"]
    assert words.count("<eos>") == 3 and words[-2:] == ["<eos>"] * 2


def test_pennchar_has_the_sizes_of_mikolovs_files(real_corpus, tmp_path):
    folder = tmp_path / "data" / "penn"
    shutil.copytree(real_corpus("penn"), folder)
    script = shutil.copy(ROOT / "getdata.sh", tmp_path)
    done = subprocess.run([script, "pennchar"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    sizes = [len(getattr(Corpus(tmp_path / "data" / "pennchar"), split)) for split in SPLITS]
    assert sizes == [5_017_483, 393_043, 442_424]


def test_enwik8s_bytes_become_numbers_and_its_lines_stay_lines(project, server):
    done = run(project, DEAD, f"{server}/corrupt", f"{server}/good", corpora=["enwik8"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrong SHA-256") == 1
    assert [path.name for path in (project / "data").iterdir()] == ["enwik8"]
    found = read(project, "enwik8")
    assert found["train"].startswith(b"60 112 97 103 101 62 \n 32 32 195 169 32 49 50 \n \n 60 ")
    bytes_of = {
        split: b"\n".join(bytes(map(int, line.split())) for line in text.split(b"\n"))
        for split, text in found.items()
    }
    held_out = len(ENWIK8) // 20
    assert bytes_of["valid"] == ENWIK8[-2 * held_out : -held_out]
    assert bytes_of["test"] == ENWIK8[-held_out:]
    assert b"".join(bytes_of.values()) == ENWIK8
    again = run(project, DEAD, corpora=["enwik8"])
    assert (again.returncode, "already here" in again.stdout) == (0, True)


def test_wikitext_103_is_unpacked(project, server):
    done = run(project, f"{server}/good", corpora=["wikitext-103"])
    assert (done.returncode, done.stderr) == (0, "")
    assert read(project, "wikitext-103") == {s: stand_in("wikitext-103", s) for s in SPLITS}
    assert [path.name for path in (project / "data").iterdir()] == ["wikitext-103"]


def test_what_cannot_be_unpacked_leaves_no_folder(project, server):
    script = project / "getdata.sh"
    broken = b"not an archive"
    good = hashlib.sha256(ARCHIVES["enwik8.zip"]).hexdigest()
    script.write_text(script.read_text().replace(good, hashlib.sha256(broken).hexdigest()))
    (project / "data").mkdir()
    (project / "data" / "enwik8.zip").write_bytes(broken)
    done = run(project, f"{server}/good", corpora=["enwik8"])
    assert done.returncode == 2
    assert done.stderr.endswith("getdata.sh: data/enwik8.zip could not be unpacked\n")
    assert [path.name for path in (project / "data").iterdir()] == ["enwik8.zip"]
    (project / "data" / "enwik8").mkdir()
    done = run(project, f"{server}/good", corpora=["enwik8"])
    assert (done.returncode, done.stderr) == (
        2, "getdata.sh: data/enwik8 exists without train.txt; move it away\n"
    )


def test_an_unknown_corpus_is_refused_before_anything_is_fetched(project, server):
    done = run(project, f"{server}/good", corpora=["penn", "text8"])
    assert (done.returncode, files(project)) == (2, set())
    assert done.stderr.startswith("getdata.sh: text8: no such corpus; choose from penn ")
