#!/usr/bin/env bash
# Everything a person with an H200 for ten minutes should run, most valuable first; call it again to continue.
#
#   benchmarks/gpu.sh [--dry-run] [--limit SECONDS] [--out FOLDER] [--results FOLDER] [--again PART]... \
#     [--parts A,B] [--presets A,B] [--ops A,B] [--variants A,B] [--tests A,B]
#
#   build     installs the package where it is not importable, prints what runs here (d2vkern.info), compiles
#             the kernels of all cases
#   tests     pytest -m gpu
#   ops       time, bandwidth and memory of every op in bf16, all backends (benchmarks.run)
#   step      whole training steps of the base presets: eager, ours, torch.compile, CUDA graph (bench_step)
#   profile   d2v profile of each preset
#   scaling   step time and memory against masks and tokens
#
# --limit (default 600) is for all parts together; each may take the share of it that `shares` below says, and
# what the earlier ones left. Finished parts are skipped the next time, ops, step and profile go on where they
# were stopped, --again PART redoes one. FOLDER (default runs/gpu-COMMIT) holds a folder with log and JSON for
# each part; the JSON is copied to --results (default benchmarks/results), from where `make results` makes
# README's tables. --dry-run, the rule without an NVIDIA driver, runs the same at toy sizes on the CPU and copies
# to FOLDER/results. --ops and --variants: some of them; --tests: test files instead of all. PYTHON names the
# interpreter. Exit code 0: everything is done; 1: a part failed, hit its limit or was not reached.
set -euo pipefail

all_parts=build,tests,ops,step,profile,scaling
declare -A shares=([build]=20 [tests]=25 [ops]=30 [step]=50 [profile]=20 [scaling]=30) # percent of --limit

fail() {
  echo "gpu.sh: $*" >&2
  exit 2
}

dry_run=false total=600 out='' results='' parts=$all_parts presets='' ops='' variants='' tests='' again=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=true; shift; continue ;;
    --limit | --out | --results | --again | --parts | --presets | --ops | --variants | --tests) ;;
    *) sed -n '4,5s/^# *//p' "$0" >&2; exit 2 ;;
  esac
  (($# > 1)) || fail "$1 needs a value"
  case $1 in
    --limit) total=$2 ;;
    --out) out=$(realpath -m -- "$2") ;;
    --results) results=$(realpath -m -- "$2") ;;
    --again) again+=("$2") ;;
    --parts) parts=$2 ;;
    --presets) presets=$2 ;;
    --ops) ops=$2 ;;
    --variants) variants=$2 ;;
    --tests) tests=$2 ;;
  esac
  shift 2
done
[[ $total =~ ^[1-9][0-9]*$ ]] || fail "--limit must be whole seconds, got $total"
IFS=, read -ra wanted <<<"$parts"
for part in "${wanted[@]}" "${again[@]}"; do
  [[ -n $part && ,$all_parts, == *,$part,* ]] || fail "no part '$part'; parts: ${all_parts//,/, }"
done

python=$(command -v "${PYTHON:-python3}") || fail "${PYTHON:-python3} is not an interpreter"
python=$(realpath -s -- "$python")
cd "$(dirname "$0")/.."
if ! $dry_run && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu.sh: no NVIDIA driver, so this is a dry run on the CPU"
  dry_run=true
fi
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
if $dry_run; then
  device=cpu size=--smoke presets=${presets:-image_tiny,audio_tiny,text_tiny}
  out=${out:-$PWD/runs/gpu-dry-run-$commit} results=${results:-$out/results}
else
  device=cuda size='' presets=${presets:-image_base,audio_base,text_base}
  out=${out:-$PWD/runs/gpu-$commit} results=${results:-$PWD/benchmarks/results}
fi

# Each part runs in a bash of its own, under its time limit: in the folder $folder, its results in $json.

# Sets `words` to an option and its values from a comma-separated list, or to nothing for an empty list.
option() {
  IFS=, read -ra words <<<"${2:+$1,$2}"
}

# Compiles the kernels of all cases into Triton's cache, on all cores: one process would do it while measuring.
warm_up() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  [[ $capability == @(8.0|9.0|10.0) ]] || return 0
  option --presets "$presets"
  TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$HOME/.triton/cache} "$python" -m benchmarks.aot --compiles --dtypes bf16 \
    --targets "sm_${capability/./}" --no-eager --no-nvcc --processes "$(nproc)" "${words[@]}"
}

part_build() {
  if $dry_run; then
    echo "dry run: nothing is installed"
  elif ! (cd / && "$python" -c 'import d2v, d2vkern, kornia, matplotlib, pytest, tyro'); then
    "$python" -m pip install 'setuptools>=77'
    "$python" -m pip install --no-build-isolation -e '.[train,dev]'
  fi
  "$python" -m d2vkern.info
  if ! $dry_run; then
    nvidia-smi
    "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")'
    warm_up
  fi
}

# Kernels are compiled test by test, so many workers; what takes tens of GiB goes one after another.
part_tests() {
  local large='offsets or elements or ten_thousand' workers status=0 others=0
  IFS=, read -ra words <<<"$tests"
  if $dry_run; then
    "$python" -m pytest -q -m gpu "${words[@]}"
    return
  fi
  workers=$(nproc)
  "$python" -m pytest -q -m gpu -n "$((workers < 14 ? workers : 14))" --dist worksteal -k "not ($large)" \
    "${words[@]}" || others=$?
  "$python" -m pytest -q -m gpu -k "$large" "${words[@]}" || status=$?
  ((others == 0 && (status == 0 || status == 5))) # 5: none of the chosen files has any
}

part_ops() {
  option --presets "$presets"
  local options=("${words[@]}" ${size:+"$size"})
  option --ops "$ops"
  "$python" -m benchmarks.run --device "$device" --precision bf16 --no-compile --rounds 5 \
    "${options[@]}" "${words[@]}" --resume --out "$json/ops_$device.json"
}

part_step() {
  option --presets "$presets"
  local options=("${words[@]}" ${size:+"$size"})
  option --variants "$variants"
  "$python" -m benchmarks.bench_step --device "$device" --precision bf16 "${options[@]}" "${words[@]}" \
    --resume --out "$json/step_$device.json"
}

part_profile() {
  local preset batch
  IFS=, read -ra words <<<"$presets"
  for preset in "${words[@]}"; do
    [[ ! -e $json/profile_${device}_$preset.json ]] || continue
    batch=16
    [[ $preset != image* ]] || batch=64
    ! $dry_run || batch=1
    "$python" -m d2v profile "$preset" --out "$folder/$preset" --steps 3 --batch "$batch" --precision bf16 \
      --train.device "$device" --data.max-seconds 15.6
    cp "$folder/$preset/profile.json" "$json/profile_${device}_$preset.json"
  done
}

part_scaling() {
  option --presets "$presets"
  "$python" -m benchmarks.scaling --device "$device" --axes masks tokens --rounds 3 "${words[@]}" \
    ${size:+"$size"} --out "$json/scaling_$device.json"
}

export python device size dry_run presets ops variants tests folder json
export -f option warm_up part_build part_tests part_ops part_step part_profile part_scaling

child=
stop() {
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  wait
  exit 130
}
trap stop INT TERM

summary=() exit_code=0
note() { # part, seconds, what became of it
  summary+=("$(printf '%-8s %5s s  %s' "$1" "$2" "$3")")
  echo "gpu.sh: ${summary[-1]}"
}

for part in "${again[@]}"; do
  rm -rf -- "${out:?}/$part"
done
mkdir -p "$results"
for part in "${wanted[@]}"; do
  folder=$out/$part left=$((total - SECONDS)) limit=$((total * shares[$part] / 100))
  limit=$((limit < left ? limit : left))
  if [[ -e $folder/done ]]; then
    note "$part" "$(<"$folder/done")" "done before"
    continue
  elif ((limit < 1)); then
    note "$part" 0 "not reached: no time left"
    exit_code=1
    continue
  fi
  echo "gpu.sh: $part, at most $limit s, log in $folder/log"
  json=$folder/json
  mkdir -p "$json"
  begun=$SECONDS status=0
  timeout --kill-after=10 "$limit" bash -euo pipefail -c "part_$part" >"$folder/log" 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=
  spent=$((SECONDS - begun))
  for file in "$json"/*.json; do
    [[ ! -e $file ]] || cp "$file" "$results"
  done
  case $status in
    0) echo "$spent" >"$folder/done"; note "$part" "$spent" done; continue ;;
    124 | 137) note "$part" "$spent" "stopped at its limit of $limit s" ;;
    *) note "$part" "$spent" "FAILED with exit code $status" ;;
  esac
  exit_code=1
  tail -n 15 "$folder/log" | sed 's/^/  | /'
done

printf '%s\n' "" "${summary[@]}" "results in $results"
((exit_code == 0)) || echo "not everything is done: call it again to continue"
exit "$exit_code"
