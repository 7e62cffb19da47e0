#!/usr/bin/env bash
# Measures kdsweep on a GPU machine that has PyTorch but reaches no package registry: installs the wheels of a folder
# beside it, runs the tests that need a GPU, then benchmarks/gpu.py. A part that fails is recorded, the next one runs.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu.sh [--wheels FOLDER] [--out FOLDER] [--device DEVICE] [--minutes N] [-- OPTIONS OF gpu.py]

  --wheels   installed with pip --no-index --no-deps; without it, the packages must be there  ($KDSWEEP_WHEELS)
  --out      all results and logs                                        ($KDSWEEP_OUT, gpu-results)
  --device   cuda or cpu                                                 ($KDSWEEP_DEVICE, cuda)
  --minutes  in all                                                      ($KDSWEEP_MINUTES, 9)

PYTHON chooses the interpreter (python3). Small sizes rehearse it on a CPU:
  benchmarks/gpu.sh --device cpu -- --precisions fp32,bf16 --batch 4 --image-size 64 --images 25 --teacher resnet18
TEXT
}

wheels=${KDSWEEP_WHEELS:-} out=${KDSWEEP_OUT:-gpu-results} device=${KDSWEEP_DEVICE:-cuda} minutes=${KDSWEEP_MINUTES:-9}
python=${PYTHON:-python3}
while (($#)); do
  case $1 in
    --wheels | --out | --device | --minutes)
      if (($# < 2)); then echo "gpu.sh: $1 needs a value" >&2; exit 2; fi
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "gpu.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done
if [[ ! $minutes =~ ^[1-9][0-9]*$ ]]; then echo "gpu.sh: --minutes $minutes: use a positive integer" >&2; exit 2; fi
if [[ -n $wheels ]] && ! compgen -G "$wheels/*.whl" >/dev/null; then
  echo "gpu.sh: --wheels $wheels: there is no wheel in it" >&2; exit 2
fi
mkdir -p "$out" || exit 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) out=$(cd "$out" && pwd)
site=$(mktemp -d) || exit 2
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$root:$root/kdsweep/plugins:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
limit=$((60 * minutes)) failed=0
START_S=30 # until gpu.py has been imported, from a cold disk, and its clock starts
SECONDS=0
: >"$out/summary.txt"

# part NAME LIMIT_S COMMAND...: runs it with its output in NAME.log; summary.txt gets exit code and seconds
part() {
  local name=$1 most=$2 start=$SECONDS code=0
  shift 2
  if ((most > 0)); then
    timeout --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "$name: exit code $code, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  else
    code=1
    echo "$name: left out, no time was left of $limit s" | tee -a "$out/summary.txt"
  fi
  if ((code)); then failed=1; fi
}

left() { echo $((limit - SECONDS - 10)); }

if [[ -n $wheels ]]; then
  part install "$(left)" "$python" -m pip install --no-index --no-deps --no-compile --disable-pip-version-check \
    --target "$site" "$wheels"/*.whl
fi
# shellcheck disable=SC2016  # the inner bash expands it
part machine 30 bash -c 'nvidia-smi; "$1" -m pip list --disable-pip-version-check' - "$python"
gpu=("$python" "$root/benchmarks/gpu.py" --device "$device" --out "$out/gpu.json" "$@")
most=$(($(left) / 3)) # the figures are worth more than the tests, if these are slow
part tests "$most" "${gpu[@]}" --stages tests --limit "$((most - START_S))"
most=$(left)
part measure "$most" "${gpu[@]}" --stages table4,lockstep,profile,torchdistill --limit "$((most - START_S))"
exit "$failed"
