#!/usr/bin/env bash
# Everything that needs a CUDA device, in under nine minutes, with no network:
#
#     bench/gpu.sh OUT_DIR [WHEEL_DIR]
#
# Needs torch, triton, transformers, pytest and pytest-benchmark. Wheels of peers in WHEEL_DIR are installed beside them
# (into OUT_DIR/peers, without their dependencies). Results and logs are written to OUT_DIR as they come.
# STAGES chooses what runs, in this order: "peers tests bench table" is all.   STAGES="bench table" bench/gpu.sh out
# BENCH_ARGS goes to pytest, for example BENCH_ARGS='-k sega'. PYTHON is the interpreter (python3).
set -u
OUT=${1:?usage: bench/gpu.sh OUT_DIR [WHEEL_DIR]}
WHEELS=${2:-}
STAGES=${STAGES:-peers tests bench table}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
[ -n "$WHEELS" ] && WHEELS=$(cd "$WHEELS" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD:$OUT/peers:$OUT/peers/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
BEGIN=$SECONDS
LIMIT=${LIMIT:-520} # seconds for all stages together
FAILED=0

left() { echo $((LIMIT - (SECONDS - BEGIN) > 1 ? LIMIT - (SECONDS - BEGIN) : 1)); }

# stage NAME SECONDS COMMAND...: runs it if chosen, for at most SECONDS and what is left, with a log of its own.
stage() {
    local name=$1 most=$2 rc begin=$SECONDS
    shift 2
    case " $STAGES " in *" $name "*) ;; *) return 0 ;; esac
    [ "$most" -gt "$(left)" ] && most=$(left)
    timeout --signal=INT --kill-after=10 "$most" "$@" >"$OUT/$name.log" 2>&1
    rc=$?
    [ $rc -ne 0 ] && FAILED=1
    printf '%-6s rc %-3s %4ss   %s\n' "$name" "$rc" "$((SECONDS - begin))" "$(tail -n 1 "$OUT/$name.log")" | tee -a "$OUT/stages.txt"
}

install_peers() {
    local wheel
    for wheel in "$WHEELS"/*.whl; do
        # One at a time: a wheel that cannot be installed leaves the others.
        "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$OUT/peers" --upgrade "$wheel" || echo "failed: $wheel"
    done
    "$PYTHON" -m pip list --path "$OUT/peers" 2>/dev/null
    echo "installed"
}

bench() {
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest bench/ --benchmark-json="$OUT/cuda.json" --rows-log="$OUT/cuda.jsonl" -rs ${BENCH_ARGS:-}
}

: >"$OUT/stages.txt"
CHECK='import sys, torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device", "torch", torch.__version__)
sys.exit(not torch.cuda.is_available())'
"$PYTHON" -c "$CHECK" >"$OUT/device.txt" 2>&1 || NO_DEVICE=1
tail -n 1 "$OUT/device.txt"
# ANY_DEVICE=1 goes on without one, to try the script itself.
[ -n "${NO_DEVICE:-}" ] && [ -z "${ANY_DEVICE:-}" ] && exit 1
export -f install_peers bench
export PYTHON WHEELS OUT BENCH_ARGS
[ -n "$WHEELS" ] && stage peers 60 bash -c install_peers
stage tests 200 "$PYTHON" -m pytest --maxfail=20 --continue-on-collection-errors
stage bench 480 bash -c bench
if [ -s "$OUT/cuda.json" ]; then
    stage table 30 "$PYTHON" -m bench.report --text "$OUT/cuda.json"
    [ -s "$OUT/table.log" ] && cut -c1-150 "$OUT/table.log"
fi
cat "$OUT/stages.txt"
exit $FAILED
