#!/usr/bin/env bash
# bash scripts/test.sh [--slow] [pytest arguments]: style, types, import layers, tests. --slow adds soak,
# browser, mutation, documentation and other long tests.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev

select=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    select=()
    shift
fi
if [ $# -eq 0 ]; then # a run of chosen tests goes straight to them
    .venv/bin/ruff format --check .
    .venv/bin/ruff check .
    .venv/bin/mypy
    .venv/bin/lint-imports
    export OMP_NUM_THREADS=1 # workers side by side share the cores
    # a file's fixtures are made once; tests/conftest.py orders the files
    set -- --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
fi
exec $python -m pytest ${select[@]+"${select[@]}"} "$@"
