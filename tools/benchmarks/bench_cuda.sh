#!/usr/bin/env bash
# Build the patched runtime for an NVIDIA GPU, prove it there, and measure it.
#
#   tools/benchmarks/bench_cuda.sh [--only steering ...]
#
# 1. Sets up .venv with CMAKE_ARGS=-DGGML_CUDA=on (own values of CMAKE_ARGS are kept).
# 2. Runs the parity tests with all layers on the GPU, and with one of them.
# 3. Checks that steered tokens are computed by CUDA graphs.
# 4. Runs tools/benchmarks/bench.py with all layers on the GPU and writes its tables, with date and device, to
#    docs/performance.md. Arguments are passed on to it.
#
# Needs the CUDA toolkit (nvcc), a C++ compiler, cmake and Python. llama.cpp's own programs, which some
# figures are held against, are built too, unless ALIGNEZ_LLAMA_BIN names a folder of such.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for program in nvidia-smi nvcc cmake python3; do
    if ! command -v "$program" >/dev/null; then
        echo "bench_cuda.sh: $program is not installed; this needs an NVIDIA GPU and the CUDA toolkit" >&2
        exit 1
    fi
done
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

export CMAKE_ARGS="-DGGML_CUDA=on${CMAKE_ARGS:+ $CMAKE_ARGS}"
PYTHONPATH=tools python3 -c 'import setup_environment; setup_environment.ensure()'
python=.venv/bin/python
"$python" -c '
import sys, llama_cpp
sys.exit(0 if llama_cpp.llama_supports_gpu_offload() else "bench_cuda.sh: the runtime was built without CUDA")
'

# PyTorch on the CPU is the oracle, so that products must not be rounded to TF32, as far as ggml leaves that open.
for layers in -1 1; do
    echo "parity, layers on the GPU: $layers"
    NVIDIA_TF32_OVERRIDE=0 ALIGNEZ_TEST_GPU_LAYERS=$layers \
        "$python" -m pytest -q tests/runtime/test_patch.py tests/steering/test_steer.py
done

model=$("$python" tools/benchmarks/make_bench_model.py 22x2048)
echo "CUDA graphs under steering"
PYTHONPATH=tools "$python" -m benchmarks.cuda_graphs "$model"

if [[ -z ${ALIGNEZ_LLAMA_BIN:-} ]]; then
    "$python" tools/build_llama_tools.py llama-batched-bench llama-cvector-generator
fi
if [[ $# -eq 0 ]]; then
    set -- --only steering --only generation --only reading --only switching --only end_to_end
fi
mkdir -p build/bench
"$python" tools/benchmarks/bench.py --model "$model" --gpu-layers -1 --write docs/performance.md --json "$@" |
    tee build/bench/cuda.txt
