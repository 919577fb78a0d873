# Sourced by jobs/quickstart.sh and tests/run.sh. `setup_venv EXTRAS` installs this package with its
# extras into .venv at the repository's root and sets VENV_PYTHON to its interpreter. PYTHON names
# the Python to create it with (3.11 to 3.13). A stamp file records what is installed, so a second
# call returns immediately.

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
        if [ "$candidate" = "${PYTHON:-}" ]; then
            echo "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13; name one of those" >&2
            return 2
        fi
    done
    echo "no Python 3.11, 3.12 or 3.13 found;" \
        "install one, or name it: PYTHON=/path/to/python3.11" >&2
    return 2
}

setup_venv() {
    local extras=$1 root python stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    VENV_PYTHON=$root/.venv/bin/python
    if [ ! -x "$VENV_PYTHON" ]; then
        python=$(find_python) || return
        echo "creating .venv with $("$python" --version)"
        if ! "$python" -m venv "$root/.venv"; then
            rm -rf "$root/.venv"
            echo "could not create .venv; on Debian and Ubuntu, install python3-venv" >&2
            return 2
        fi
    fi
    # `.[dev,weights]` includes `.[weights]`, so either stamp will do; both hold the same key
    want=$("$VENV_PYTHON" - "$root/pyproject.toml" "$root/tests/constraints.txt" <<'PY'
import hashlib, pathlib, sys
files = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(sys.version.encode() + files).hexdigest())
PY
    )
    for stamp in "$root/.venv/.installed-$extras" "$root/.venv/.installed-dev,weights"; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
            return 0
        fi
    done
    echo "installing .[$extras] into .venv (a minute or more; about 7 GB with torch and CUDA)"
    rm -f "$root/.venv/".installed-*
    # uv needs a quarter of pip's time but does not read pip.conf: where it fails, pip installs.
    # Compiled here, as pip does: otherwise every process spends 5 s on compiling torch if
    # bytecode cannot be written or PYTHONDONTWRITEBYTECODE is set
    local packages=(-e "$root[$extras]" -c "$root/tests/constraints.txt")
    local pip=("$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-input)
    if ! { "${pip[@]}" uv -c "$root/tests/constraints.txt" &&
        "$VENV_PYTHON" -m uv pip install --quiet --compile-bytecode \
            --python "$VENV_PYTHON" "${packages[@]}"; }; then
        echo "uv could not install; trying pip" >&2
        "${pip[@]}" "${packages[@]}" || return
    fi
    echo "$want" >"$root/.venv/.installed-$extras"
}
