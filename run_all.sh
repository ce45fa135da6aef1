#!/usr/bin/env bash
# The whole walk in one command: people, questions, responses, preferences, prefixes, policies, scores, claims.
#
#   ./run_all.sh              the laptop profile: no key, no network after the installation, no GPU; a quarter of an hour on two cores
#   ./run_all.sh test         the test suite; under 5 minutes
#   ./run_all.sh bench        speed beside what people use today
#   ./run_all.sh --help       everything else
#
# All it needs is bash and Python 3.11 or newer. The first call installs the pinned packages once (about 1.5 GB; with an
# NVIDIA card 6 GB), the next calls start at once. A run is resumable: give the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
Usage: ./run_all.sh [PROFILE] [--run NAME] [--from NN | --only NN,NN] [--set key=value]...
       ./run_all.sh rehearse [PROFILE] [--set key=value]...
       ./run_all.sh test [pytest arguments]
       ./run_all.sh bench [--shape laptop|tiny|7b]      speed beside today's tools; --help for more

PROFILE   smoke     the smallest sizes, under 5 minutes; its numbers mean nothing
          laptop    the default: a simulated world, a quarter of an hour on two cores
          gpu       one GPU, open weights, any OpenAI-compatible teacher
          paper     the paper's setting; notebook 00 projects its time and cost before anything is spent
          FILE.yaml your own; see data/profiles/laptop.yaml for every key

rehearse          checks machine, models and endpoint, tries each stage on a few rows and projects time, memory, disk and
                  dollars before anything is spent; fails, and says what to change, where something will not fit

--run NAME        folder under data/runs (default: named after the profile and what --set changes)
--from NN         run again from notebook NN on
--only NN,NN      run these notebooks again, and others only where they lack their tables
--set key=value   override a value of the profile, such as training.epochs=3 or data.preferences=my_pairs.jsonl
TEXT
}

# --- What is asked for? Wrong words are refused before anything is installed. ---------------------------------------

refuse() { echo "run_all.sh: $1" >&2; usage >&2; exit 2; }

task=run profile=laptop
case "${1:-}" in test | bench | rehearse) task="$1"; shift ;; esac
case "$task ${1:-}" in
  test\ * | bench\ * | *\ | *\ --*) ;;
  *\ -h) usage; exit 0 ;;
  *) [[ -f "data/profiles/$1.yaml" || ( "$1" == *.yaml && -f "$1" ) ]] || refuse "no profile or command '$1'"
     profile="$1"; shift ;;
esac

if [[ $task != test && $task != bench ]]; then
  words=("$@")
  for ((i = 0; i < ${#words[@]}; i++)); do
    case "${words[i]}" in
      -h | --help) usage; exit 0 ;;
      --run | --from | --only | --set) i=$((i + 1)); ((i < ${#words[@]})) || refuse "${words[i-1]} needs a value" ;;
      --run=* | --from=* | --only=* | --set=*) ;;
      *) refuse "unknown word '${words[i]}'" ;;
    esac
  done
fi

# --- An environment. An active one is used as it is; otherwise .venv is made here. ----------------------------------
# conda's base is left alone: pinned packages do not belong in an environment that everything else lives in.

modern() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ -n "${VIRTUAL_ENV:-}" ]] || [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
  python="$(command -v python)"
  modern "$python" || refuse "the active environment has $("$python" --version), but 3.11 or newer is needed"
else
  if ! [[ -x .venv/bin/python ]]; then
    for base in python3.11 python3.12 python3.13 python3 python ""; do
      [[ -n "$base" ]] || refuse "no Python 3.11 or newer found"
      if command -v "$base" >/dev/null && modern "$base"; then break; fi
    done
    echo "1/3 making .venv with $("$base" --version)"
    "$base" -m venv .venv
  fi
  python="$PWD/.venv/bin/python"
fi

# --- The packages, once: a stamp in the environment remembers what was installed from which clone. ------------------

prefix="$("$python" -c 'import sys; print(sys.prefix)')"
stamp="$prefix/.personal-alignment"
wanted="$(cat requirements.lock pyproject.toml | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $PWD"

pip_install() { "$python" -m pip install -qq --disable-pip-version-check --no-input --progress-bar off "$@"; }

# torch first, because it is the one package that exists in a CPU and in a CUDA build. Plain pip gives Linux the CUDA
# build, so a Linux machine without an NVIDIA card asks PyTorch's own CPU index; where that cannot be reached, pip's own
# configuration decides (it may name a mirror).
install_torch() {
  local torch; torch="$(grep '^torch==' requirements.lock)"
  if [[ $build == Linux-CPU ]]; then
    echo "2/3 $torch, CPU build"
    pip_install --no-deps --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "$torch" \
      2>/dev/null && return
    echo "    PyTorch's CPU index cannot be reached: asking as pip is configured here"
  else
    echo "2/3 $torch, $build build"
  fi
  pip_install --constraint requirements.lock "$torch"
}

if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null  # uv's environments have no pip
  build="$(uname)-CPU"
  if nvidia-smi >/dev/null 2>&1; then build=CUDA; fi
  install_torch
  echo "3/3 this kit and the other packages, as pinned in requirements.lock"
  pip_install --constraint requirements.lock --editable ".[dev]"  # torch stays: it is pinned, and there
  echo "$wanted" >"$stamp"
fi

# --- The work itself. ------------------------------------------------------------------------------------------------

if [[ $task == test ]]; then
  exec "$python" -m pytest "$@"
elif [[ $task == bench ]]; then
  exec "$python" tests/benchmarks/bench.py "$@"
fi
if [[ $task == rehearse ]]; then
  exec "$python" -m helpers.rehearse "$profile" "$@"
fi
exec "$python" -m helpers.run "$profile" "$@"
