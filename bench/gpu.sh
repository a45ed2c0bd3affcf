#!/usr/bin/env bash
# Tests and benches on a bare GPU machine, in under 9 minutes: bash bench/gpu.sh
#
# Nothing is installed: fastkd runs from this checkout, and its C++ extension is built in place if the tools are there.
# Every step has its own time limit (535 s together) and none hides another's failure; the summary comes last.
#   --dry-run (or FASTKD_DRY_RUN=1)  the same on the CPU with tiny shapes, in under a minute
#   OUT=folder                       where the rows go (default bench/results)
#   COMMIT=name                      what to call the code, where git cannot tell
#   LIMIT=seconds                    one limit for every step
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

dry=${FASTKD_DRY_RUN:-0}
[[ ${1:-} == --dry-run ]] && dry=1
python=${PYTHON:-python3}
# Absolute, because some steps start Python in another folder.
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET # the kernels are compiled; checks that interpret them say so themselves
cannot_run=2
failed=0
summary=()
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

has() { "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }

note() { summary+=("$1"); echo "$1"; }

fail() {
    failed=1
    note "FAILED   $1"
}

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=${LIMIT:-$2} start=$SECONDS status
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    timeout --kill-after=5 "$limit" "$@"
    status=$?
    if ((status == 0)); then
        none_skipped "$name" && note "ok       $name ($((SECONDS - start)) s)"
    elif ((status == cannot_run && dry)); then
        note "skipped  $name: cannot run here, see above"
    else
        fail "$name: exit status $status$( ((status == 124 || status == 137)) && echo ", over $limit s")"
    fi
}

# Of the tests that run here none has a reason to be skipped, and without a GPU most of them would be.
none_skipped() {
    [[ -e $scratch/$1.xml ]] || return 0
    [[ $(<"$scratch/$1.xml") =~ \ skipped=\"([0-9]+)\"\ tests=\"([0-9]+)\" ]]
    if ((${BASH_REMATCH[1]:-1} == 0 && ${BASH_REMATCH[2]:-0} > 0)); then return 0; fi
    fail "$1: ${BASH_REMATCH[1]:-all} of ${BASH_REMATCH[2]:-all} tests were skipped"
    return 1
}

build() {
    if ((dry)); then
        note "skipped  build: a dry run leaves the checkout as it is"
    elif [[ ! -f setup.py ]]; then
        note "skipped  build: there is no setup.py"
    elif ! has setuptools pybind11 ninja; then
        note "skipped  build: it needs setuptools, pybind11 and ninja"
    elif ! "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)'; then
        note "skipped  build: setuptools older than 77 cannot read pyproject.toml; the Triton kernels need no build"
    else
        step build 45 "$python" setup.py -q build_ext --inplace
    fi
}

# tests NAME SECONDS WORDS...
# The files are named: importing another's needs may warn, and that is an error while tests are collected. Warnings are
# shown here, since versions differ from those that the suite is held to; plugins other than xdist are left out.
tests() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -q -p xdist -p no:cacheprovider \
        -W default --maxprocesses=12 --junitxml="$scratch/$name.xml" "$@"
}

checks() {
    if ((dry)); then
        step checks 40 "$python" bench/gpu_checks.py --interpret --only "exact jsd float32" infinite
    elif has pytest xdist; then
        tests tests 120 tests/test_bench_gpu.py::test_on_gpu tests/test_bench_gpu_relation.py::test_on_gpu \
            tests/test_bench_gpu_int8.py::test_on_gpu tests/test_triton_kernels.py \
            tests/test_matmul.py tests/test_head_device_compaction.py
    else
        # One after another, so that not everything fits: float16 is widened where bfloat16 is.
        step checks 110 "$python" bench/gpu_checks.py --skip float16
        step relations 30 "$python" bench/gpu_relation_checks.py
        step int8-checks 20 "$python" bench/gpu_int8_checks.py
    fi
}

# The public function against the oracle. Last, because each case compiles kernels of its own.
more_checks() {
    if ((!dry)) && has pytest xdist; then
        tests losses 45 tests/test_logit.py -k "triton and (another_dtype or storage_at_once or layouts or \
            test_exact and bfloat16 and peaked and (two_teachers or shared_vocab or by_row or smoothing))"
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
        bench head 20 head "${tiny[@]}" --vocab 257 --rows 8 --hidden 16
        bench topk 20 topk "${tiny[@]}" cross-entropy --vocab 257 --rows 8 --k 4
        bench attention 20 attention "${tiny[@]}" --tokens 40 --heads 2 --dim 8
        bench relation 20 relation "${tiny[@]}" --loss rkd-angle gram --rows 9 --width 4
        bench int8 20 int8 "${tiny[@]}" --shape 3,64,32
        bench call 20 call "${tiny[@]}" --calls 3
        return
    fi
    # What matters most comes first: rows are written case by case, and a time limit loses the last ones alone.
    bench kd 70 kd --device cuda --vocab 128256 50257 151936 32000 262144
    bench head 75 head --device cuda --vocab 128256 --hidden 4096 --rows 8192 1024 2048 --mode forward+backward --repeat 10
    bench kd-divergences 40 kd --device cuda --vocab 128256 --mode forward+backward --divergence jsd tvd reverse_kl
    bench attention 35 attention --device cuda --tokens 8192 --mode forward+backward
    bench relation 25 relation --device cuda --loss rkd-angle rkd-distance gram --rows 1024 --width 512
    bench int8 20 int8 --device cuda
    bench topk 20 topk --device cuda --vocab 128256 --mode forward+backward
    bench call 15 call --device cuda
}

out=${OUT:-bench/results}
if ((dry)) && [[ -z ${OUT:-} ]]; then
    out=$scratch
fi
step environment 15 "$python" -c '
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
import fastkd
fastkd.explain()'
if ((!dry)); then
    step gpu 10 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv
fi
build
checks
benches
more_checks

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
