"""Which ggml build flags suit this CPU, and which to try next when a build dies on it.

ggml's default (`GGML_NATIVE=ON`, `-march=native`) believes what the CPU advertises, which not every virtual
machine keeps: the first quantized matrix product may die with an illegal instruction, where F32 and F16
models run. Knows nothing of how a build is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_AVX512 = ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw")

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
}


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
    portable = Attempt((*asked, *_arguments(flags)), "for what this CPU says it has, except AMX")
    baseline = Attempt((*asked, *_arguments(flags.difference(_AVX512))), "without AVX-512 and AMX")
    fallbacks = [portable] if baseline.cmake_args == portable.cmake_args else [portable, baseline]
    return [as_asked, *fallbacks]


def _arguments(flags: frozenset[str]) -> list[str]:
    switches = (f"-D{name}={'ON' if flags.issuperset(needs) else 'OFF'}" for name, needs in _OPTIONS.items())
    return ["-DGGML_NATIVE=OFF", *switches]
