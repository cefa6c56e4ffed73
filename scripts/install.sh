#!/usr/bin/env bash
# Installs Seamark from this checkout into its own virtual environment, .venv, unless that was done already.
#
#   scripts/install.sh          what users need
#   scripts/install.sh dev      and what the tests need
#
# PYTHON=/path/to/python chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
venv=.venv
version=$(git rev-parse HEAD:setup.cfg 2>/dev/null || cksum <setup.cfg)
wanted="seamark${extra:+[$extra]} $version"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "install.sh: Python 3.11 or newer with the venv module is needed: set PYTHON=/path/to/python" >&2
    return 69
}

# What the tests need holds what users need.
if [[ -x $venv/bin/seamark ]] && grep -qxF -e "$wanted" -e "seamark[dev] $version" "$venv/seamark-installed" 2>/dev/null; then
    exit 0
fi
python=$(find_python)
echo "installing Seamark and PyTorch into $venv (a minute or two, the first time)"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --editable ".${extra:+[$extra]}"
# The byte code of what training imports, once: also where PYTHONDONTWRITEBYTECODE would have every process compile
# torch anew, and without the minutes that pip takes to compile what nobody imports.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import torch._dynamo, torch.nn.parallel, seamark.inprocess.wrapper'
echo "$wanted" >"$venv/seamark-installed"
