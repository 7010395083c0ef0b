#!/usr/bin/env bash
# bash scripts/docs.sh [mkdocs arguments]: builds the pages as a site in site/; a warning is an error.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" docs

export NO_MKDOCS_2_WARNING=1 # an advertisement of mkdocs-material's
$python -m mkdocs build --strict "$@"
