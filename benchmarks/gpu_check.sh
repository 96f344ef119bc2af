#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and about ten minutes: does it install, is it right, is it clean, does it
# repeat, how fast is it, what is left to fuse. Stages that fail do not stop the others; done stages are not repeated.
#
#   benchmarks/gpu_check.sh [--toy] [FOLDER]      FOLDER: of logs and results, default gpu_check
#
# --toy runs every stage on the CPU at toy size, to show that the stages themselves work. PYTHON chooses the interpreter,
# by default that of .venv.
# Exit code: 0 if every stage passed or could not be run here for a reason given in summary.md, 1 otherwise.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

toy=
folder=gpu_check
for argument in "$@"; do
    case $argument in
        --toy) toy=--toy ;;
        -*) echo "gpu_check.sh: unknown option $argument; usage: benchmarks/gpu_check.sh [--toy] [FOLDER]" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
"$python" -c 'import torch' || { echo "gpu_check.sh: $python has no PyTorch; make install, or name another in PYTHON" >&2; exit 2; }
mkdir -p "$folder/log" || exit 2
folder=$(cd "$folder" && pwd)
began=$SECONDS
total=600 # seconds, for all stages together
failed=0
stages=()

# stage NAME SECONDS COMMAND...: runs it within its time, keeps its output, notes how it ended. 77 is "cannot be run here".
stage() {
    local name=$1 limit=$2 from=$SECONDS code
    shift 2
    stages+=("$name")
    if [ -e "$folder/log/$name.passed" ]; then
        return
    fi
    local left=$((total - SECONDS + began))
    if [ "$left" -lt 10 ]; then
        echo "not run: ten minutes are over, the same command goes on" >"$folder/log/$name.outcome"
        echo 0 >"$folder/log/$name.seconds"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$folder/log/$name.txt" 2>&1
    code=$?
    case $code in
        0) : >"$folder/log/$name.passed"; echo "passed" >"$folder/log/$name.outcome" ;;
        77) echo "not run: $(tail -n 1 "$folder/log/$name.txt")" >"$folder/log/$name.outcome" ;;
        124 | 137) echo "FAILED: over its $limit s" >"$folder/log/$name.outcome" ;;
        *) echo "FAILED: exit code $code" >"$folder/log/$name.outcome" ;;
    esac
    echo "   $(cat "$folder/log/$name.outcome"), $((SECONDS - from)) s"
    echo "$((SECONDS - from))" >"$folder/log/$name.seconds"
}

# Installs into a folder of its own, asking no index, and runs from there.
install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$folder/installed" --upgrade . &&
        cd "$folder" &&
        PYTHONPATH="$folder/installed" "$python" -c "
import fastdeit, fastdeit.ops, fastdeit.kernels.attention
assert fastdeit.__file__.startswith('$folder/installed'), fastdeit.__file__
print(fastdeit.__version__, fastdeit.__file__)"
}

# The tests of ops, kernels and modules run on the GPU where there is one.
parity() {
    local chosen=(tests/ops tests/kernels tests/nn tests/test_losses.py)
    [ -n "$toy" ] && chosen=(tests/ops/test_layer_norm.py -k "layout or frozen")
    "$python" -m pytest -q -p no:cacheprovider --import-mode=importlib "${chosen[@]}"
}

sanitizer() {
    local tool=$1
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed"
        return 77
    fi
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m fastdeit.benchmarks.small_kernels
}

# A whole model with its layers, as a user would ask.
verify() {
    local chosen=(deit_base_distilled_patch16_224)
    [ -n "$toy" ] && chosen=(deit_tiny_distilled_patch16_224 --device cpu --img-size 32 --batch-size 1)
    "$python" -m fastdeit verify "${chosen[@]}"
}

# A recorded training step beside the same step launched kernel by kernel.
graphs() {
    "$python" -m pytest -q -p no:cacheprovider --import-mode=importlib tests/train/test_graphs.py ${toy:+-k replayed}
}

bench() {
    local chosen=()
    [ -n "$toy" ] && chosen=(--toy --only layer_norm -k fp32-forward)
    "$python" -m fastdeit bench quick --out "$folder/bench" "${chosen[@]}" &&
        "$python" -m fastdeit bench report "$folder/bench" >"$folder/bench.md"
}

export -f install parity graphs sanitizer verify bench
export python folder toy

if [ -z "$toy" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "gpu_check.sh: PyTorch sees no GPU; --toy shows on a CPU that the stages work" >&2; exit 2; }
    nvidia-smi >"$folder/log/nvidia-smi.txt" 2>&1
fi
"$python" -m pip list --format=freeze >"$folder/log/packages.txt" 2>/dev/null

stage install 60 bash -c install
stage small_kernels 60 "$python" -m fastdeit.benchmarks.small_kernels
stage parity 150 bash -c parity
stage verify 90 bash -c verify
stage graphs 60 bash -c graphs
stage repeat 45 "$python" -m fastdeit.benchmarks.repeat_step $toy
stage profile 60 "$python" -m fastdeit bench profile --out "$folder/profile" $toy
stage bench 200 bash -c bench
stage memcheck 60 bash -c "sanitizer memcheck"
stage racecheck 60 bash -c "sanitizer racecheck"
if [ -z "$toy" ]; then # what is left of the ten minutes
    left=$((total - 10 - SECONDS + began))
    [ "$left" -gt 60 ] && stage tune "$left" "$python" -m fastdeit tune all --out "$folder/tuning" --seconds $((left - 20))
fi

{
    echo "# GPU check"
    echo
    grep -iE '^(torch|triton|timm|numpy|fastdeit)\b' "$folder/log/packages.txt" | sed 's/^/- /'
    echo
    echo "| stage | outcome | seconds | output |"
    echo "|---|---|---:|---|"
    for name in "${stages[@]}"; do
        echo "| $name | $(cat "$folder/log/$name.outcome") | $(cat "$folder/log/$name.seconds") | log/$name.txt |"
    done
    [ -e "$folder/profile/profile.md" ] && { echo; sed 's/^#/##/' "$folder/profile/profile.md"; }
} >"$folder/summary.md"
for name in "${stages[@]}"; do
    grep -q '^FAILED' "$folder/log/$name.outcome" && failed=1
done
echo "$folder/summary.md"
exit $failed
