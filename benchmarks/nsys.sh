#!/usr/bin/env bash
# Time, launches and idle gaps of every hot path of some training steps, by Nsight Systems (nsys).
#
#   benchmarks/nsys.sh [--dry-run] [--steps START:STOP] [--out FOLDER] PRESET --data PATH [options of d2v train]
#
# --dry-run prints the commands and runs nothing; --steps 10:20 (default) captures ten steps after ten warm-up
# steps; FOLDER (default runs/nsys-PRESET, must be new) gets the report for the nsys window, the CSV files and
# the run. PYTHON names the interpreter. Exits with 1 when less than 98% of the kernel time lies inside named
# ranges. The table and why it is not nsys's own summary: d2v/tools/nsys.py.
#
# One kernel in depth, with Nsight Compute (ncu), which replays each launch and so must see few of them. Kernel
# names are in the CSV files; a Triton kernel is called as its function in kernels/.
#
#   ncu --profile-from-start off --nvtx --kernel-name regex:attention_fwd --launch-count 3 --set full \
#       --import-source yes --export attention python -m d2v train image_base --data PATH --out runs/ncu \
#       --train.steps 3 --profile nsys --profile-steps 2:3
#   ncu --import attention.ncu-rep --page details        as text; or open it in the ncu-ui window
#
# `--set basic` is quicker; a share of the roofline alone: `--section SpeedOfLight`.
set -euo pipefail

usage() {
  sed -n '4s/^# *//p' "$0" >&2
  exit 2
}

dry_run=false steps=10:20 out=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=true; shift ;;
    --steps) steps=${2:?--steps START:STOP}; shift 2 ;;
    --out) out=${2:?--out FOLDER}; shift 2 ;;
    *) usage ;;
  esac
done
preset=${1:-}
[[ -n $preset ]] || usage
shift
out=${out:-runs/nsys-$preset}
if [[ ! $steps =~ ^([0-9]+):([0-9]+)$ ]] || ((10#${BASH_REMATCH[1]} >= 10#${BASH_REMATCH[2]})); then
  echo "nsys.sh: --steps must be START:STOP with START < STOP, got $steps" >&2
  exit 2
fi
first=${BASH_REMATCH[1]} last=${BASH_REMATCH[2]}
python=${PYTHON:-python3}

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if ! $dry_run; then
  command -v nsys >/dev/null || { echo "nsys.sh: nsys is not on PATH (NVIDIA Nsight Systems)" >&2; exit 2; }
  [[ ! -e $out ]] || { echo "nsys.sh: $out exists; choose another --out" >&2; exit 2; }
  mkdir -p "$out"
fi

# Kernels of a CUDA graph are listed one by one (node); CPU sampling would only disturb.
run nsys profile --trace=cuda,nvtx,cublas,cudnn --cuda-graph-trace=node --sample=none --cpuctxsw=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop --output="$out/steps" \
  "$python" -m d2v train "$preset" --out "$out/run" --train.steps "$last" \
  --profile nsys --profile-steps "$steps" "$@"

reports=(nvtx_pushpop_trace cuda_kern_exec_trace cuda_gpu_kern_sum nvtx_sum)
run nsys stats "${reports[@]/#/--report=}" --format=csv --force-export=true --output="$out/steps" \
  "$out/steps.nsys-rep"

run "$python" -m d2v.tools.nsys --steps $((10#$last - 10#$first)) \
  "$out"/steps_{nvtx_pushpop_trace,cuda_kern_exec_trace,cuda_gpu_kern_sum}.csv
