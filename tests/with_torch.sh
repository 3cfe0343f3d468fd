#!/usr/bin/env bash
# Runs tests under another version of PyTorch, in a virtual environment of its own:
#   tests/with_torch.sh 2.11.0                              the core
#   tests/with_torch.sh 2.15.0 tests/test_optimizers.py -k muon    what pytest is given
# The versions in requirements.txt are for the same numbers; this is for the same behaviour.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?which version of PyTorch?}
shift
[ $# -gt 0 ] || set -- tests/test_model.py tests/test_optimizers.py tests/test_training.py \
    tests/test_plan.py tests/test_machine.py tests/test_fake_cuda.py tests/test_faults.py \
    tests/test_supervisor.py tests/test_checkpoint_files.py tests/test_sample.py \
    tests/test_hellaswag.py tests/test_pretrained.py
venv=${TORCH_VENV:-${TMPDIR:-/tmp}/torch-$version}
if [ ! -e "$venv/ready" ]; then
    python3 -m venv "$venv"
    sed "s/^torch==.*/torch==$version/" requirements.txt > "$venv/requirements.txt"
    "$venv/bin/pip" install --quiet -r "$venv/requirements.txt" -r tests/requirements.txt
    touch "$venv/ready"
fi
"$venv/bin/python" -m pytest "$@"
