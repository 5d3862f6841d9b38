#!/usr/bin/env bash
# For a GPU machine that has Python 3.12, PyTorch and nvcc, and no package registry.
#
#   bare_machine.sh gather [NAME ...]      where there is a registry: the wheels that it lacks, into .wheels/
#   bare_machine.sh run [ARGUMENT ...]     there: installs them beside what is there, builds the extension for its GPU,
#                                          and runs: python -m benchmarks gpu_campaign ARGUMENT ...
#
# Parts that were done are kept. Where one command may run ten minutes: --budget 500, as often as something is left.
#
#   bare_machine.sh run --budget 500 --out results --data DATA
#
# gather takes further names, for what a machine lacks beside the usual (its own part 0 says so): pyarrow, tensorboard.
# Both go quickly over what is done already. PYTHON chooses the interpreter (python3), RMK_BUILD the way to build (cuda,
# and cpu where that fails).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
wheels=.wheels
# What the trainer imports and PyTorch does not bring; small, and pure Python but for PyYAML and MarkupSafe.
usual=(PyYAML lightning-fabric lightning-utilities packaging typing_extensions fsspec
  rich markdown-it-py mdurl Pygments Jinja2 MarkupSafe pybind11 setuptools)
limit=$((40 * 1024)) # KiB, so that 18 MB of images go along within 64 MiB

gather() {
  mkdir -p "$wheels"
  local platforms=() minor
  for minor in $(seq 39 -1 17); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$wheels" "${usual[@]}" "$@"
  git describe --always --abbrev=40 --dirty --exclude='*' >"$wheels/commit" 2>/dev/null || rm -f "$wheels/commit"
  "$python" benchmarks/gpu_campaign/wheels.py needed "$wheels"
  local size
  size=$(du -sk "$wheels" | cut -f1)
  echo "$wheels: $size KiB"
  if ((size > limit)); then
    echo "error: $wheels: expected at most $limit KiB, got $size; name fewer packages" >&2
    exit 1
  fi
}

build() {
  local built sources
  built=robust_moe_kernels/_C$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  # By content, noted beside it: files that were carried to another machine may all have the time of the transfer.
  sources=$(find csrc setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
  if [[ -f $built && -f $built.sources && $(<"$built.sources") == "$sources" ]]; then return; fi # of this Python
  local gpu
  gpu=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null) || gpu=
  local mode
  for mode in ${RMK_BUILD:-cuda cpu}; do
    if RMK_BUILD=$mode RMK_CUDA_ARCHS=$gpu "$python" setup.py --quiet build_ext --inplace; then
      echo "$sources" >"$built.sources"
      return
    fi
    echo "the extension was not built with RMK_BUILD=$mode" >&2
  done
}

run() {
  local site missing
  site=$PWD/$wheels/site
  export PYTHONPATH="$site:$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
  if [[ -d $wheels ]]; then
    mapfile -t missing < <("$python" benchmarks/gpu_campaign/wheels.py missing "$wheels")
    if ((${#missing[@]})); then
      "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${missing[@]}"
    fi
  fi
  build
  exec "$python" -m benchmarks gpu_campaign "$@"
}

case ${1:-} in
  gather | run) "$@" ;;
  *)
    echo "usage: $0 gather [NAME ...] | run [ARGUMENT ...]" >&2
    exit 2
    ;;
esac
