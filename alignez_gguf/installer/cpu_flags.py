"""Which ggml build flags suit this CPU, and which to try next when a build dies on it.

ggml's default (`GGML_NATIVE=ON`, `-march=native`) believes what the CPU advertises, which not every virtual
machine keeps: the first quantized matrix product may die with an illegal instruction, where F32 and F16
models run. And it uses AVX512-FP16 at a loss: attention takes vectors of 128 numbers then, and a head of 64
goes number by number (GGML_F16_STEP in ggml-cpu/simd-mappings.h). Knows nothing of how a build is run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_AVX512 = ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw")
_AMX = ("amx_tile", "amx_int8")

# ggml's CMake option (ggml/CMakeLists.txt) and the names in /proc/cpuinfo of what it turns on.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_AVX512": _AVX512,
    "GGML_AVX512_VBMI": (*_AVX512, "avx512vbmi"),
    "GGML_AVX512_VNNI": (*_AVX512, "avx512_vnni"),
    "GGML_AVX512_BF16": (*_AVX512, "avx512_bf16"),
    "GGML_AMX_TILE": (*_AVX512, "avx512_vnni", *_AMX),
    "GGML_AMX_INT8": (*_AVX512, "avx512_vnni", *_AMX),
}

VARIANTS = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    # Where ggml installs backends that are loaded (ggml_add_backend_library, ggml/src/CMakeLists.txt), and
    # where they find libggml-base
    "-DCMAKE_INSTALL_BINDIR=llama_cpp/lib",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)
"""A CPU backend per instruction set, of which the best that the CPU supports is loaded."""


@dataclass(frozen=True)
class Attempt:
    """One way to build."""

    cmake_args: tuple[str, ...]
    reason: str = ""
    """Why these are not simply the flags that were asked for; empty where they are."""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The features that Linux names for an x86 CPU; empty on other systems and CPUs."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()[2:]) for line in lines if line.startswith("flags\t")), frozenset())


def attempts(asked: Sequence[str], flags: frozenset[str]) -> list[Attempt]:
    """The builds to try, in order, each meant for when the one before it dies.

    Args:
        asked: the user's CMake arguments; every attempt keeps them, later arguments override them.
        flags: what `cpu_flags` says.
    """
    as_asked = Attempt(tuple(asked))
    if not flags:
        return [as_asked, Attempt((*asked, "-DGGML_NATIVE=OFF"), "without -march=native")]

    def named(features: frozenset[str], reason: str) -> Attempt:
        return Attempt((*asked, *_arguments(features)), reason)

    chosen_by_user = any(argument.startswith("-DGGML_NATIVE") for argument in asked)
    first = as_asked
    if "avx512_fp16" in flags and not chosen_by_user:
        first = named(
            flags,
            "without AVX512-FP16, which slows ggml's attention (CMAKE_ARGS=-DGGML_NATIVE=ON builds with it)",
        )
    without_amx = named(flags.difference(_AMX), "for what this CPU says it has, except AMX")
    baseline = named(flags.difference(_AVX512), "without AVX-512 and AMX")
    # Where two are the same build, the one that comes first.
    plan = {attempt.cmake_args: attempt for attempt in (baseline, without_amx, first)}
    return list(reversed(plan.values()))


def portable_flags(platform: str = sys.platform) -> tuple[str, ...]:
    """Return the flags that build a library for every CPU that the platform runs on.

    On macOS that is one backend, for the first Apple silicon: Metal does the heavy work there.
    """
    return ("-DGGML_NATIVE=OFF",) if platform == "darwin" else VARIANTS


def _arguments(flags: frozenset[str]) -> list[str]:
    switches = (f"-D{name}={'ON' if flags.issuperset(needs) else 'OFF'}" for name, needs in _OPTIONS.items())
    return ["-DGGML_NATIVE=OFF", *switches]
