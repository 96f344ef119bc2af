#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: does it install and compile, is it right, is it clean, does it repeat, does it
# train, how fast is it, what is left to fuse. What a stage found is on disk when it ends, and so is the summary. The stages together
# take longer than one call's time: the same command goes on where the last one stopped.
#
#   benchmarks/gpu_check.sh [--toy] [--seconds N] [--only STAGE[,STAGE...]] [FOLDER]
#
#   --seconds N   all that this call takes at the most, default 540
#   --only ...    these stages alone, also where they are done: how a stage is repeated
#   --toy         every stage on the CPU at toy size, to show that the stages themselves work
#   FOLDER        of logs and results, default gpu_check
#
# PYTHON chooses the interpreter, by default that of .venv, else python3.
# Exit code: 0 if no stage failed, 1 otherwise. summary.md in FOLDER says how each ended.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    echo "gpu_check.sh: $1; usage: benchmarks/gpu_check.sh [--toy] [--seconds N] [--only STAGE[,STAGE...]] [FOLDER]" >&2
    exit 2
}

toy=
only=
total=540
folder=gpu_check
while [ $# -gt 0 ]; do
    case $1 in
        --toy) toy=--toy ;;
        --seconds | --only)
            [ $# -gt 1 ] || usage "$1 needs a value"
            [ "$1" = --only ] && only=,$2, || total=$2
            shift
            ;;
        -*) usage "unknown option $1" ;;
        *) folder=$1 ;;
    esac
    shift
done
[[ $total =~ ^[1-9][0-9]*$ ]] || usage "--seconds: expected a positive whole number, got $total"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
"$python" -c 'import torch' || { echo "gpu_check.sh: $python has no PyTorch; make install, or name another in PYTHON" >&2; exit 2; }
if [ -z "$toy" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "gpu_check.sh: PyTorch sees no GPU; --toy shows on a CPU that the stages work" >&2; exit 2; }
fi
mkdir -p "$folder/log" || exit 2
folder=$(cd "$folder" && pwd)
began=$SECONDS

# The commands of the stages. They know $seconds, what is left for them. 77 is "cannot be run here", 75 "not finished, goes on".

# Installs into a folder of its own, asking no index, and runs from there.
install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$folder/installed" --upgrade . &&
        cd "$folder" &&
        PYTHONPATH="$folder/installed" "$python" -c "
import fastdeit, fastdeit.ops, fastdeit.kernels.attention.forward
assert fastdeit.__file__.startswith('$folder/installed'), fastdeit.__file__
print(fastdeit.__version__, fastdeit.__file__)"
}

# What the compiler at hand makes of every kernel, on all cores; the stages after it find the kernels compiled.
kernels() {
    local chosen=(--arch sm_90 --only mlp --committed)
    [ -z "$toy" ] && chosen=(--arch "$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')")
    "$python" -m fastdeit kernels "${chosen[@]}"
}

# A whole model with its layers, as a user would ask.
verify() {
    local chosen=(deit_base_distilled_patch16_224)
    [ -n "$toy" ] && chosen=(deit_tiny_distilled_patch16_224 --device cpu --img-size 32 --batch-size 1)
    "$python" -m fastdeit verify "${chosen[@]}"
}

# The command that users train with: some epochs on digits, one more after a restart, and the same epochs as recorded steps.
train() {
    local run=("$python" -m fastdeit train --warmup-epochs 0 --teacher-epochs 1)
    if [ -n "$toy" ]; then
        "${run[@]}" --dry-run
        return
    fi
    rm -rf "$folder/train"
    "${run[@]}" --epochs 2 --output "$folder/train/plain" &&
        "${run[@]}" --epochs 3 --output "$folder/train/plain" --resume auto &&
        "${run[@]}" --epochs 3 --output "$folder/train/graphs" --cuda-graphs
}

# The tests of ops, kernels and modules run on the GPU where there is one. Each process compiles what it meets: many at a time.
parity() {
    local quietly=($pytest_options) chosen=(tests/ops tests/kernels tests/nn tests/test_losses.py)
    # What needs no GPU: the compiler's report, and what runs on the fake CUDA runtime.
    chosen+=(--ignore=tests/aot/test_resources.py --ignore=tests/aot/test_catalog.py)
    chosen+=(-m "not fake_device")
    [ -n "$toy" ] && chosen=(tests/ops/test_layer_norm.py -k "layout or frozen")
    [ -z "$toy" ] && "$python" -c 'import xdist' && chosen+=(-n auto --maxprocesses 12 --dist worksteal)
    OMP_NUM_THREADS=1 "$python" -m pytest "${quietly[@]}" "${chosen[@]}"
}

# Recorded training steps beside the same steps launched kernel by kernel, models under torch.compile, the way of measuring.
gpu_tests() {
    local quietly=($pytest_options) chosen=(tests/train/test_graphs.py tests/train/test_on_gpu.py)
    chosen+=(tests/settings tests/benchmarks/test_timing.py -m "gpu and not fake_device")
    [ -n "$toy" ] && chosen=(tests/train/test_graphs.py -k replayed)
    "$python" -m pytest "${quietly[@]}" "${chosen[@]}"
}

# Another machine, driver or source begins another folder of results: they would not compare.
bench() {
    local chosen=(--seconds "$((seconds > 60 ? seconds - 25 : seconds))") results code
    [ -n "$toy" ] && chosen=(--toy --only layer_norm -k fp32-forward)
    results=$folder/bench/$("$python" -c "
import sys
from fastdeit.benchmarks import results_folder as results
print(results.digest(results.identity(bool(sys.argv[1]))))" "$toy") || return
    "$python" -m fastdeit bench quick --out "$results" "${chosen[@]}"
    code=$?
    "$python" -m fastdeit bench report "$results" >"$folder/bench.md" || return
    [ "$code" -eq 0 ] && grep -q '^## Not measured' "$folder/bench.md" && return 75
    return "$code"
}

# Memory that PyTorch keeps would hide an access beyond a tensor's end.
sanitizer() {
    local tool=$1
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed"
        return 77
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" -m fastdeit.benchmarks.small_kernels
}

tune() {
    [ -n "$toy" ] && { echo "a CPU has nothing to tune"; return 77; }
    local end=$((SECONDS + seconds - 25)) code=70
    while [ "$code" -eq 70 ]; do # a candidate took the device down, and is left out from now on
        [ "$((end - SECONDS))" -lt 30 ] && return 75
        "$python" -m fastdeit tune all --out "$folder/tuning" --seconds "$((end - SECONDS))" >"$folder/tuning.txt"
        code=$?
        cat "$folder/tuning.txt"
    done
    [ "$code" -eq 0 ] && grep -q 'cases are left' "$folder/tuning.txt" && return 75
    return "$code"
}

export -f install kernels verify train parity gpu_tests bench sanitizer tune
# A test that hangs says where: Python's stacks are printed.
pytest_options="-q -p no:cacheprovider --import-mode=importlib -o faulthandler_timeout=60"
export python folder toy pytest_options
export PYTHONUNBUFFERED=1 # a command that is cut off has said what it found
export PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer's usual place

names=()

# stage NAME SECONDS COMMAND...: runs it within its time, keeps its output, notes how it ended, and sums up what there is.
stage() {
    local name=$1 limit=$2 from=$SECONDS cut= code outcome
    shift 2
    names+=("$name")
    if [ -n "$only" ]; then
        [[ $only == *",$name,"* ]] || return
    elif grep -qsE '^(passed|FAILED)' "$folder/log/$name.outcome"; then
        return
    fi
    local left=$((total - SECONDS + began))
    if [ "$left" -lt 10 ]; then
        echo "not run: the time is over, the same command goes on" >"$folder/log/$name.outcome"
        echo 0 >"$folder/log/$name.seconds"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left cut=1
    echo "== $name (at most $limit s)"
    # Interrupted, not killed: pytest then says what had failed, and Python where it was.
    seconds=$limit timeout --signal=INT --kill-after=10 "$limit" "$@" >"$folder/log/$name.txt" 2>&1
    code=$?
    case $code in
        0) outcome="passed" ;;
        75) outcome="not finished: the same command goes on" ;;
        77) outcome="not run: $(tail -n 1 "$folder/log/$name.txt")" ;;
        124 | 137) outcome="FAILED: over its $limit s"; [ -n "$cut" ] && outcome="not finished: cut off after $limit s" ;;
        *) outcome="FAILED: exit code $code" ;;
    esac
    echo "$outcome" >"$folder/log/$name.outcome"
    echo "$((SECONDS - from))" >"$folder/log/$name.seconds"
    echo "   $outcome, $((SECONDS - from)) s"
    summarize
}

summarize() {
    {
        echo "# GPU check"
        echo
        sed 's/^/- /' "$folder/log/gpu.txt"
        grep -iE '^(torch|triton|timm|numpy|fastdeit)\b' "$folder/log/packages.txt" | sed 's/^/- /'
        echo
        echo "| stage | outcome | seconds | output |"
        echo "|---|---|---:|---|"
        for name in "${names[@]}"; do
            [ -e "$folder/log/$name.outcome" ] &&
                echo "| $name | $(cat "$folder/log/$name.outcome") | $(cat "$folder/log/$name.seconds") | log/$name.txt |"
        done
        [ -e "$folder/log/estimated.txt" ] && { echo; echo "## Estimated and measured"; echo; cat "$folder/log/estimated.txt"; }
        [ -e "$folder/profile/profile.md" ] && { echo; sed 's/^#/##/' "$folder/profile/profile.md"; }
        [ -e "$folder/bench.md" ] && { echo; sed 's/^#/##/' "$folder/bench.md"; }
    } >"$folder/summary.md"
}

[ -z "$toy" ] && nvidia-smi >"$folder/log/nvidia-smi.txt" 2>&1
"$python" -c 'from fastdeit.benchmarks.machine import environment as e; print(*(f"{k} {v}" for k, v in e().items()), sep="\n")' \
    >"$folder/log/gpu.txt" 2>"$folder/log/gpu.error" || echo "fastdeit cannot be imported: log/gpu.error" >"$folder/log/gpu.txt"
"$python" -m pip list --format=freeze >"$folder/log/packages.txt" 2>/dev/null

# In order: can it run, is it right, is it as fast as estimated, what does it do, how fast is it, is it clean. Expected on an H200, first
# guesses, from install on: 20, 30, 180, 60, 40, 60, 20, 40, 60, 200, 120, 120 and 120 seconds; tune takes what it is given.
# First what can hang a GPU, each alone: one attention with descriptors, then its backward from autograd's thread.
stage descriptor_forward 60 "$python" -m fastdeit.benchmarks.first_descriptors forward
stage descriptor_backward 60 "$python" -m fastdeit.benchmarks.first_descriptors backward
stage install 60 bash -c install
stage kernels 120 bash -c kernels
stage parity 300 bash -c parity
stage estimated 120 "$python" -m fastdeit.benchmarks.estimated $toy
stage small_kernels 120 "$python" -m fastdeit.benchmarks.small_kernels
stage verify 120 bash -c verify
stage repeat 60 "$python" -m fastdeit.benchmarks.repeat_step $toy
stage profile 90 "$python" -m fastdeit bench profile --out "$folder/profile" $toy
stage train 120 bash -c train
stage bench 300 bash -c bench
stage gpu_tests 180 bash -c gpu_tests
stage memcheck 180 bash -c "sanitizer memcheck"
stage racecheck 180 bash -c "sanitizer racecheck"
stage tune "$total" bash -c tune

summarize
echo "$folder/summary.md"
for name in "${names[@]}"; do
    grep -qs '^FAILED' "$folder/log/$name.outcome" && exit 1
done
exit 0
