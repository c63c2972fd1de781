#!/bin/sh
# Type-check the package as it is installed: the folders passes/ and kernels/ are qcompile.passes and qcompile.kernels (pyproject.toml, package-dir),
# which mypy cannot be told. So a temporary folder gets links under the installed names, and messages get the repository's paths back.
# Usage: .ci/mypy.sh [options of mypy]; PYTHON names the interpreter that has mypy.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/qcompile"
for path in "$root"/qcompile/*; do ln -s "$path" "$tree/qcompile/"; done
ln -s "$root/passes" "$root/kernels" "$tree/qcompile/"
cd "$tree"
status=0
MYPYPATH="$tree" "${PYTHON:-python}" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" -p qcompile "$@" >"$tree/out" 2>&1 || status=$?
sed -e 's#^qcompile/\(passes\|kernels\)/#\1/#' "$tree/out"
exit $status
