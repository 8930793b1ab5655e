#!/bin/sh
# Switches off each regularizer in turn, from the same seed, on a twentieth of Penn Treebank.
#
#     records/ablation/run.sh data/penn OUT
#
# trains one model after another and writes the log and JSON lines of each to the folder OUT. Then
# records/ablation/table.py OUT prints a table of the runs.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
penn=$1
out=$2
python=${PYTHON:-python}

# The first twentieth of the training text and an eighth of validation and test: few enough
# tokens for a small model to overfit within minutes, which regularizers should prevent.
mkdir -p "$out/penn-twentieth"
head -n 2100 "$penn/train.txt" >"$out/penn-twentieth/train.txt"
head -n 420 "$penn/valid.txt" >"$out/penn-twentieth/valid.txt"
head -n 470 "$penn/test.txt" >"$out/penn-twentieth/test.txt"

run() { # NAME FLAGS...
    name=$1
    shift
    set -- --data "$out/penn-twentieth" --emsize 200 --nhid 300 --nlayers 2 --batch_size 10 --bptt 35 --lr 20 \
        --dropout 0.4 --dropouth 0.25 --dropouti 0.4 --dropoute 0.1 --wdrop 0.5 --nonmono 2 \
        --epochs "${EPOCHS:-16}" --seed 141 --save "$out/$name.pt" "$@"
    echo "python main.py $*" >"$out/$name.log"
    "$python" "$here/../../main.py" "$@" >>"$out/$name.log" 2>&1
}

run all
run all-seed-142 --seed 142
run no-weight-drop --wdrop 0
run no-embedding-dropout --dropoute 0
run no-locked-dropout --dropout 0 --dropouth 0 --dropouti 0
run no-ar-tar --alpha 0 --beta 0
run no-averaging --nonmono 1000
run none --wdrop 0 --dropoute 0 --dropout 0 --dropouth 0 --dropouti 0 --alpha 0 --beta 0 --nonmono 1000
