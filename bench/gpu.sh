#!/usr/bin/env bash
# Tests and benches on a bare GPU machine, in under 9 minutes: bash bench/gpu.sh
#
# Nothing is installed: fastkd runs from this checkout, and its C++ extension is built in place if the tools are there.
# Every step has its own time limit (525 s together) and none hides another's failure; the summary comes last.
#   --dry-run (or FASTKD_DRY_RUN=1)  the same on the CPU with tiny shapes, in under a minute
#   OUT=folder                       where the rows go (default bench/results)
#   COMMIT=name                      what to call the code, where git cannot tell
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

dry=${FASTKD_DRY_RUN:-0}
[[ ${1:-} == --dry-run ]] && dry=1
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cannot_run=2
failed=0
summary=()

has() { "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }

note() { summary+=("$1"); echo "$1"; }

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    timeout --kill-after=5 "$limit" "$@"
    status=$?
    if ((status == 0)); then
        note "ok       $name ($((SECONDS - start)) s)"
    elif ((status == cannot_run && dry)); then
        note "skipped  $name: cannot run here, see above"
    else
        failed=1
        note "FAILED   $name: exit status $status$( ((status == 124 || status == 137)) && echo ", over $limit s")"
    fi
}

build() {
    if ((dry)); then
        note "skipped  build: a dry run leaves the checkout as it is"
    elif [[ ! -f setup.py ]]; then
        note "skipped  build: there is no setup.py"
    elif has setuptools pybind11 ninja; then
        step build 80 "$python" setup.py -q build_ext --inplace
    else
        note "skipped  build: it needs setuptools, pybind11 and ninja"
    fi
}

checks() {
    if ((dry)); then
        step checks 40 "$python" bench/gpu_checks.py --interpret --only "exact jsd float32" infinite
    elif has pytest; then
        step tests 170 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
    else
        step checks 170 "$python" bench/gpu_checks.py
    fi
}

# bench NAME SECONDS FAMILY ARGUMENTS...
bench() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" bench/run.py "$@" --out "$out" ${COMMIT:+--commit "$COMMIT"}
}

benches() {
    if ((dry)); then
        local tiny=(--device cpu --threads 1 --repeat 2 --providers eager fastkd)
        bench kd 30 kd "${tiny[@]}" fastkd-overwrite --vocab 257 --rows 8
        bench call 20 call "${tiny[@]}" --calls 3
        return
    fi
    # What matters most comes first: rows are written case by case, and a time limit loses the last ones alone.
    bench kd 140 kd --device cuda --vocab 128256 50257 151936 32000 262144
    bench kd-divergences 85 kd --device cuda --vocab 128256 --mode forward+backward --divergence jsd tvd reverse_kl
    bench call 25 call --device cuda
}

out=${OUT:-bench/results}
if ((dry)) && [[ -z ${OUT:-} ]]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
step environment 20 "$python" -c '
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
import fastkd
fastkd.explain()'
if ((!dry)); then
    step gpu 5 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv
fi
build
checks
benches

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
