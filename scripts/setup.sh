# Sourced by demo.sh and test.sh: makes .venv if it is missing or out of date and installs this project into it.
# Usage: source scripts/setup.sh [EXTRA …], where EXTRA is an extra of pyproject.toml such as dev.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "$*")
python=.venv/bin/python
# Installed once for each content of pyproject.toml, so that an interrupted or outdated set-up is completed.
stamp=.venv/.installed-${extras:-base}-$(cksum pyproject.toml | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    if [ ! -x $python ]; then
        base=${PYTHON:-}
        if [ -z "$base" ]; then
            for candidate in python3 python3.12 python3.11 python3.13; do
                if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                    base=$candidate
                    break
                fi
            done
        fi
        if [ -z "$base" ]; then
            echo "no Python 3.11 or later found: install one, or name it with PYTHON=/path/to/python3.12" >&2
            exit 1
        fi
        echo "making .venv with $("$base" --version)"
        "$base" -m venv .venv
    fi
    echo "installing the project into .venv (a few minutes, mostly PyTorch)"
    if ! $python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"; then
        echo "the installation failed: see the lines above, then run this command again" >&2
        exit 1
    fi
    touch "$stamp"
fi
