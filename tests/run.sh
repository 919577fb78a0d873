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

fast="not slow"
arguments=()
names_tests=false
for argument in "$@"; do
    if [ "$argument" = --all ]; then
        fast=""
    else
        arguments+=("$argument")
        if [ -e "${argument%%::*}" ]; then
            names_tests=true
        fi
    fi
done

install_chromium() {
    if command -v chromium >/dev/null; then
        return
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "no chromium, and no right to install it: the screenshot tests are skipped"
        return
    fi
    echo "installing chromium (the report's screenshot test needs a browser)"
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive \
                apt-get install -y -qq --no-install-recommends chromium
    } >/dev/null 2>&1 ||
        echo "chromium could not be installed: the screenshot tests are skipped"
}

install_chromium &
setup_venv dev,weights
wait

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
    local marked=$1
    shift
    check pytest --durations 30 --durations-min 5 ${marked:+-m "$marked"} \
        "$@" ${arguments[@]+"${arguments[@]}"}
}

check ruff check .
check ruff format --check .
check codespell_lib tsq_ray jobs tests docs cluster README.md .github
check mypy
if [ "$names_tests" = true ]; then
    tests "$fast"
else
    # tests that start a cluster need the machine to themselves
    tests "${fast:+$fast and }not ray" -n auto tests
    tests "${fast:+$fast and }ray" tests
fi
exit "$status"
