#!/usr/bin/env bash
# Sets up .venv and runs every check and test: bash tests/run.sh [--all] [pytest arguments]
#   --all        also the tests marked slow
#   PYTHON=...   the Python (3.11 to 3.13) to make .venv with
#   TSQ_DATA=... the development data (default ../shared/data; without it, its tests are skipped)
# All checks run even when one fails; the exit code is the first failure's.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/setup_venv.sh

filter=(-m "not slow")
arguments=()
names_tests=false
for argument in "$@"; do
    if [ "$argument" = --all ]; then
        filter=()
    else
        arguments+=("$argument")
        if [ -e "${argument%%::*}" ]; then
            names_tests=true
        fi
    fi
done

setup_venv dev,weights

if ! command -v chromium >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium (the report's screenshot test needs a browser)"
        {
            apt-get update -qq &&
                DEBIAN_FRONTEND=noninteractive \
                    apt-get install -y -qq --no-install-recommends chromium
        } >/dev/null 2>&1 ||
            echo "chromium could not be installed: the screenshot tests are skipped"
    else
        echo "no chromium, and no right to install it: the screenshot tests are skipped"
    fi
fi

status=0
check() {
    local code=0
    echo "== $*"
    "$VENV_PYTHON" -m "$@" || code=$?
    if [ "$status" = 0 ]; then
        status=$code
    fi
}
tests() {
    check pytest --durations 30 --durations-min 5 "$@" ${filter[@]+"${filter[@]}"} ${arguments[@]+"${arguments[@]}"}
}

check ruff check .
check ruff format --check .
check codespell_lib tsq_ray jobs tests docs cluster README.md .github
check mypy
if [ "$names_tests" = true ]; then
    tests
else
    # tests that start a cluster need the machine to themselves
    tests tests/unit -n auto
    tests tests/integration
fi
exit "$status"
