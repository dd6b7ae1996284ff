#!/usr/bin/env bash
# Collect what an Ascend server without network needs of PyPI. On a machine with network, with a Python of the server's version:
#
#   PYTHON=python3.9 scripts/collect_wheels.sh [x86_64 | aarch64] [FOLDER]
#
# fills FOLDER (wheels) and prints what is in it. On the server: pip install --no-index --find-links FOLDER -r requirements.txt
# For aarch64 PyPI has neither TensorFlow 2.6.5 nor h5py 3.1.0: the rest is collected, and these two are built there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
machine=${1:-$(uname -m)}
folder=${2:-wheels}
[[ $machine =~ ^(x86_64|aarch64)$ ]] || { echo "$(basename "$0"): '$machine' is neither x86_64 nor aarch64." >&2; exit 1; }
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $version =~ ^3\.[789]$ ]] || { echo "$(basename "$0"): PYTHON is $version; TensorFlow 2.6.5 takes 3.7 to 3.9." >&2; exit 1; }
export PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

# Of these PyPI has only sources. As wheels they fit every machine: wrapt without its extension, which is for speed only.
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet 'pip<24.1' 'setuptools<66' wheel
WRAPT_EXTENSIONS=false "$work/venv/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
    clang==5.0 termcolor==1.1.0 wrapt==1.12.1

# pip weighs conditions such as platform_machine on the machine that it runs on, so the lines are chosen here.
sed -n 's/; python_version < "3\.10".*//p; s/; python_version [<>]=* "3\.8"//p; /^tqdm/p' "$root/requirements.txt" |
    grep -v '^tensorflow==' >"$work/requirements.txt"
[ "$version" = 3.7 ] && sed -i '/^pillow>/d' "$work/requirements.txt" || sed -i '/^pillow==/d' "$work/requirements.txt"
if [ "$machine" = aarch64 ]; then # what TensorFlow 2.6.5 wants, instead of itself and of h5py
    sed -i '/^tensorflow-cpu/d; /^h5py/d' "$work/requirements.txt"
    printf '%s\n' 'keras==2.6.0' 'tensorboard>=2.6,<2.7' 'tensorflow-estimator>=2.6,<2.7' 'astunparse~=1.6.3' 'clang~=5.0' \
        'flatbuffers~=1.12.0' 'gast==0.4.0' 'google-pasta~=0.2' 'grpcio>=1.37,<2' 'keras-preprocessing~=1.1.2' 'opt-einsum~=3.3.0' \
        'six~=1.15.0' 'termcolor~=1.1.0' 'typing-extensions>=3.7,<3.11' 'wheel~=0.35' 'wrapt~=1.12.1' >>"$work/requirements.txt"
fi
platforms=()
for tag in manylinux1 manylinux2010 manylinux2014 manylinux_2_5 manylinux_2_12 manylinux_2_17; do
    platforms+=(--platform "${tag}_$machine")
done
"$work/venv/bin/python" -m pip download --quiet --only-binary=:all: "${platforms[@]}" --find-links "$folder" --dest "$folder" \
    --requirement "$work/requirements.txt"
(cd "$folder" && printf '%s\n' *.whl)
