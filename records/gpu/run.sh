#!/usr/bin/env bash
# Measurements for a machine with a GPU; each takes ten minutes.
#
#     records/gpu/run.sh list
#     records/gpu/run.sh ptb FOLDER
#
# An entry ends within 560 seconds, or with END=300 after about 300 (use 250 or more, for the four
# models of `models` 400), and needs no network. Entries that train "for as many epochs as there is
# time for" measure two epochs first, and train for at most 90. EPOCHS=60 sets their number instead:
# with --cuda-graphs the epochs after the ramp are faster than the two measured. FOLDER gets
# log.txt, written as the run goes (so that it survives the loss of the machine), table.md, which
# table.py makes from the log, and the JSON lines of each model. PYTHON names the interpreter
# (default: python3), COMMIT the commit where there is no git. main.py gets the flags in FLAGS, such
# as "--precision bf16 --pad-to 8 --cuda-graphs", too. REHEARSE=1 runs an entry on a CPU, with tiny
# models, and ignores END.
set -u

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}

# name, corpus, description
entries="\
check     none       the tests on a GPU, the benchmark in TF32 and bfloat16, the profile of a step
ptb-fast  penn       the fast recipe on Penn Treebank, for as many epochs as there is time for
wt2-fast  wikitext-2 the same on WikiText-2
gru-fast  penn       the same with GRU on Penn Treebank
ptb       penn       the published command for Penn Treebank
ptb-80    penn       the same with batches of 80
qrnn      penn       the published QRNN command for Penn Treebank
char      penn       the published command for the characters of Penn Treebank
models    penn       LSTM, GRU, biLM and attention, for equal seconds"

run_entry() {
    local penn=(--dropouti 0.4 --dropouth 0.25 --seed 141)
    case $1 in
        check) check ;;
        ptb-fast) budget fast ptb-fast penn "${penn[@]}" ;;
        wt2-fast) budget fast wt2-fast wikitext-2 --batch_size 80 --dropouth 0.2 --seed 1882 ;;
        gru-fast) budget fast-gru gru-fast penn --model GRU "${penn[@]}" ;;
        ptb) train_and_evaluate ptb penn --batch_size 20 "${penn[@]}" --epochs 500 ;;
        ptb-80) train_and_evaluate ptb-80 penn --batch_size 80 "${penn[@]}" --epochs 500 ;;
        qrnn)
            train_and_evaluate qrnn penn --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 \
                --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 --seed 9001 --dropouti 0.4 \
                --epochs 550 ;;
        char)
            [ ! -e "$root/data/penn" ] || make_pennchar
            train_and_evaluate char pennchar --epochs 500 --nlayers 3 --emsize 200 --nhid 1000 \
                --alpha 0 --beta 0 --dropoute 0 --dropouth 0.25 --dropouti 0.1 --dropout 0.1 \
                --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 --optimizer adam --lr 2e-3 \
                --when 300 400 ;;
        models)
            shares 4
            penn+=(--batch_size 20 --epochs 500)
            share train_and_cache lstm penn "${penn[@]}"
            share train_and_cache gru penn --model GRU "${penn[@]}"
            share train_and_cache bilm penn --model biLM "${penn[@]}"
            share train_and_cache attention penn --attention single "${penn[@]}" ;;
    esac
}

# Seconds after the start when training stops and when all ends; seconds that a command takes to
# start. The time after training has three parts: the cache on two splits, dynamic evaluation.
end=${END:-550} stop=$((${END:-550} - 130)) testing=$((${END:-550} / 3)) startup=15 parts=3
precisions=(tf32 bf16)
tiny=() tiny_bench=() on=() reading=
if [ -n "${REHEARSE:-}" ]; then
    stop=30 end=500 testing=400 reading=15
    precisions=(fp32 bf16)
    on=(--device cpu --data sample)
    tiny=("${on[@]}" --emsize 16 --nhid 24 --log-interval 20)
    tiny_bench=(--device cpu --emsize 16 --nhid 24 --ntoken 200 --bptt 7 --steps 3)
    export AWD_LSTM_DEVICE=cpu
fi
export PYTHONUNBUFFERED=1 # each line is in the log at once

# ------------------------------------------------------------ parts of an entry

make_pennchar() { # data/pennchar, in the temporary folder, from the words of data/penn
    rm data && mkdir data && ln -s "$root/data/penn" data/penn && cp "$root/getdata.sh" .
    ./getdata.sh pennchar >>"$log" 2>&1 || note "failed: data/pennchar could not be made"
}

train() { # NAME CORPUS FLAGS...: until $stop; main.py then tests the best model
    local name=$1 corpus=$2 grace=$(((end - stop) * 2 / 3)) # for the test
    shift 2
    logged "0 130" $((stop - SECONDS)) "$root/main.py" --data "data/$corpus" "$@" ${FLAGS:-} \
        "${tiny[@]}" --save "$name.pt"
    [ ! -e "$name.pt.jsonl" ] || cp "$name.pt.jsonl" "$folder/$name.jsonl"
}

train_and_cache() { # NAME CORPUS FLAGS...
    train "$@"
    point "$1" "$2" $(((end - SECONDS - startup) / parts)) # for each of two splits
}

train_and_evaluate() { # NAME CORPUS FLAGS...
    train_and_cache "$@"
    point "$1" "$2" $((end - SECONDS - 2 * startup)) --split test --dynamic --statistics 500
}

point() { # NAME CORPUS SECONDS FLAGS...: pointer.py, for so many seconds a split
    local name=$1 corpus=$2 seconds=${reading:-$3}
    shift 3
    # The published settings for WikiText-2; those for Penn Treebank are the defaults.
    [ "$corpus" != wikitext-2 ] || set -- --lambdasm 0.1279 --theta 0.662 --window 3785 "$@"
    if [ -e "$name.pt" ] && ((seconds > 0)); then
        logged 0 $((end - SECONDS)) "$root/pointer.py" --data "data/$corpus" "$@" \
            --seconds "$seconds" "${on[@]}" --save "$name.pt"
    else
        note "failed: there is no model, or no time, for pointer.py of $name $*"
    fi
}

budget() { # RECIPE NAME CORPUS FLAGS...: EPOCHS epochs, or as many as fit
    local recipe=$1 name=$2 corpus=$3 epochs=${EPOCHS:-}
    shift 3
    [ -n "$epochs" ] || measure "$@"
    train_and_evaluate "$name" "$corpus" --recipe "$recipe" "$@" --epochs "$epochs"
}

measure() { # FLAGS...: sets budget's epochs, judging by the second of two
    local seconds
    local flags=(--recipe "$recipe" --data "data/$corpus" "$@" ${FLAGS:-} "${tiny[@]}" --epochs)
    # The first epoch includes loading CUDA's libraries.
    begin "main.py ${flags[*]} 2 --save first.pt"
    timeout --foreground -k 20 $((stop > SECONDS ? stop - SECONDS : 1)) "$python" "$root/main.py" "${flags[@]}" 2 \
        --save first.pt >>"$log" 2>&1 </dev/null &
    touch first.pt.jsonl
    while kill -0 $! 2>/dev/null && (($(wc -l <first.pt.jsonl) < 2 && SECONDS < stop)); do
        sleep 0.2
    done
    kill $! 2>/dev/null # its test is not needed
    wait $!
    seconds=$(sed -n '$s/.*"seconds": \([0-9.]*\).*/\1/p' first.pt.jsonl)
    [ -z "${REHEARSE:-}" ] || stop=$((SECONDS + startup + 2))
    # 1.07: a margin for slower epochs.
    epochs=$(awk "BEGIN { print int(($stop - $SECONDS - $startup) / (1.07 * ${seconds:-1e9})) }")
    epochs=$((epochs > 90 ? 90 : epochs > 1 ? epochs : 1))
    note "an epoch takes ${seconds:-too many} s: --epochs $epochs"
}

shares() { # N: divides the time among N models, with 45 s for the evaluation of each
    whole=$(((end - SECONDS) / $1)) end=$SECONDS parts=2
    each=$((whole - 45))
    [ -z "${REHEARSE:-}" ] || each=$whole tiny+=(--epochs 1)
}

share() { # COMMAND...: in the next of these shares
    stop=$((SECONDS + each)) end=$((end + whole))
    "$@"
}

check() {
    cd "$root" # so that pytest prints paths from there
    # After a capture that failed, a process cannot use CUDA any more: the tests of graphs have their own.
    logged 0 60 -m pytest -v --no-header -p no:cacheprovider tests/test_cuda.py -k graph
    logged 0 "$testing" -m pytest -v --no-header -p no:cacheprovider tests/test_cuda.py \
        -k "not graph"
    cd "$tmp"
    local sizes recipe batch model pad graphs precision until=$((end - 45)) # the rest is the profile's
    [ -z "${REHEARSE:-}" ] || until=$((SECONDS + 55))
    # The published batch sizes first.
    for sizes in ptb:20 ptb:20:LSTM:1:--cuda-graphs ptb:20:LSTM:8:--cuda-graphs wt2:80 \
        wt2:80:LSTM:1:--cuda-graphs ptb:20:GRU:1:--cuda-graphs ptb:80 wt2:20; do
        IFS=: read -r recipe batch model pad graphs <<<"$sizes"
        [ -z "${REHEARSE:-}" ] || graphs=
        for precision in "${precisions[@]}"; do
            set -- --recipe "$recipe" --batch_size "$batch" --model "${model:-LSTM}" \
                --precision "$precision" --pad-to "${pad:-1}" $graphs
            if ((SECONDS + 40 > until)); then
                note "skipped, as there is no time: bench.py $*"
            else
                logged 0 $((until - SECONDS)) "$root/bench.py" "$@" --baseline --json \
                    "${tiny_bench[@]}"
            fi
        done
    done
    logged 0 $((end - SECONDS)) "$root/bench.py" --recipe ptb --batch_size 20 --profile \
        "${tiny_bench[@]}"
}

# ------------------------------------------------------------ the log

logged() { # GOOD SECONDS ARGUMENTS...: runs python for at most SECONDS; GOOD: exit codes of success
    local good=$1 seconds=$(($2 > 0 ? $2 : 1)) code=0 # to timeout, 0 is no limit
    shift 2
    begin "${*//"$root/"/}"
    # At SIGINT main.py tests its best model; it is killed if that takes too long.
    timeout --foreground --preserve-status -s INT -k "${grace:-5}" "$seconds" \
        "$python" "$@" >>"$log" 2>&1 </dev/null || code=$?
    case " $good " in
        *" $code "*) note "exit code $code, $SECONDS s after the start" ;;
        *) note "failed with exit code $code, $SECONDS s after the start: ${*//"$root/"/}" ;;
    esac
}

begin() { # COMMAND
    printf '\n$ python %s\n' "$1" >>"$log"
    echo "$SECONDS s: python $1"
}

note() { # LINE: adds it to the log and makes the table again
    echo "# $1" >>"$log"
    [ "${1#failed}" = "$1" ] || status=1
    "$python" "$root/records/gpu/table.py" "$log" >"$tmp/table.md" &&
        cp "$tmp/table.md" "$folder/table.md"
}

header() { # NAME: fails where there is no GPU
    echo "# command:  ${REHEARSE:+REHEARSE=1 }${END:+END=$END }${EPOCHS:+EPOCHS=$EPOCHS }${FLAGS:+FLAGS=\"$FLAGS\" }records/gpu/run.sh $1 FOLDER"
    echo "# date:     $(date -u '+%Y-%m-%d %H:%M') UTC"
    echo "# commit:   $(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null ||
        echo "${COMMIT:-unknown}")"
    "$python" - <<'END'
import os, platform, re, sys, torch
cuda = torch.cuda.is_available()
gpu = torch.cuda.get_device_name() if cuda else "no GPU"
cpu = re.search("model name.*: (.*)", open("/proc/cpuinfo").read())
print(f"# machine:  {gpu}; {os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}")
print(f"# versions: Python {platform.python_version()}, torch {torch.__version__}, "
      f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
sys.exit(not cuda and not os.environ.get("REHEARSE"))
END
}

# ------------------------------------------------------------ the command line

die() { echo "run.sh: error: $1" >&2; exit 2; }

list() {
    local name corpus what commit
    while read -r name corpus what; do
        commit=$(sed -n 's/^# commit: *//p' "$root/records/gpu/$name/log.txt" 2>/dev/null)
        [ "$corpus" = none ] && corpus= || corpus=", data/$corpus"
        echo "$name: $what (one GPU, 10 minutes$corpus; ${commit:+log of commit }${commit:-no log})"
    done <<<"$entries"
}

[ "$*" != list ] || { list; exit; }
corpus=$(awk -v name="${1:-}" '$1 == name { print $2 }' <<<"$entries")
if [ $# != 2 ] || [ -z "$corpus" ]; then
    die "usage: run.sh list | NAME FOLDER, NAME one of $(awk '{ printf "%s ", $1 }' <<<"$entries")"
fi
[ "$corpus" = none ] || [ -n "${REHEARSE:-}" ] || [ -e "$root/data/$corpus/train.txt" ] ||
    die "data/$corpus is missing; ./getdata.sh fetches it"
mkdir -p "$2" && folder=$(cd "$2" && pwd) || die "$2: cannot write to this folder"
log=$folder/log.txt status=0
header "$1" >"$log" || die "torch finds no GPU; REHEARSE=1 rehearses on a CPU"
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
cd "$tmp" && ln -s "$root/data" data || exit 1
run_entry "$1"
cat table.md
exit $status
