"""Which convolution kernels are chosen, by what processor, system and environment say: all of them made up."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None or not CSRC.is_dir(), reason="needs a C++ compiler and the sources"),
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="elsewhere there is nothing to choose from"
    ),
]

# Arguments: features that the compiler's run-time library finds, cpuid's leaf 1 ecx and leaf 7 edx, XCR0, what the
# system answers; prints both choices and how often the system was asked.
PROGRAM = """
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

static std::string features;
static unsigned leaf_1, leaf_7;
static uint64_t states;
static long answer;
static int asked = 0;

static bool found(const char* feature) { return features.find(std::string(",") + feature + ",") != std::string::npos; }
static long system_call(long call, long code, long state) {
  if (call == SYS_arch_prctl && code == 0x1023 && state == 18) ++asked;
  return answer;
}

#undef _xgetbv
#define __builtin_cpu_supports found
#define __get_cpuid(leaf, a, b, c, d) (*(c) = leaf_1, (leaf) == 1)
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(d) = leaf_7, (leaf) == 7 && (subleaf) == 0)
#define _xgetbv(number) states
#define syscall system_call
#include "expert_conv/kernels_choice.cpp"

namespace rmk {
namespace amx_bf16 {
static const Bf16Products kProducts{"amx_bf16", 32, nullptr, nullptr, nullptr};
const Bf16Products* const products = KNOWN ? &kProducts : nullptr;
}
namespace avx512_bf16 {
static const Bf16Kernels kTable{{"avx512_bf16", 6, nullptr, nullptr, nullptr}};
const Bf16Kernels* const kernels = &kTable;
}
namespace avx512 {
const Kernels kernels{"avx512"};
}
namespace avx2 {
const Kernels kernels{"avx2"};
}
namespace baseline {
const Kernels kernels{"baseline"};
}
}  // namespace rmk

int main(int, char** given) {
  features = "," + std::string(given[1]) + ",";
  leaf_1 = std::strtoul(given[2], nullptr, 16), leaf_7 = std::strtoul(given[3], nullptr, 16);
  states = std::strtoul(given[4], nullptr, 16), answer = std::strtol(given[5], nullptr, 10);
  for (int time = 0; time < 3; ++time) rmk::bf16_kernels();
  const rmk::Bf16Kernels* bf16 = rmk::bf16_kernels();
  std::printf("%s %s %d\\n", rmk::kernels().name, bf16 == nullptr ? "none" : bf16->name, asked);
}
"""
FEATURES = "avx2,fma,avx512f,avx512bw,avx512bf16"
ALL = (FEATURES, "8000000", "1400000", "600e7", "0")  # OSXSAVE; AMX-TILE, AMX-BF16; both states of tiles; permitted


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[bool, Path]:
    """By whether the compiler of kernels_amx_bf16.cpp knew AMX."""
    folder = tmp_path_factory.mktemp("choice")
    (folder / "program.cpp").write_text(PROGRAM, encoding="utf-8")
    for known in (False, True):
        command = [COMPILER, "-std=c++17", "-O0", "-w", "-DRMK_X86", f"-DKNOWN={int(known)}", f"-I{CSRC}"]
        command += [str(folder / "program.cpp"), "-o", str(folder / str(known))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return {known: folder / str(known) for known in (False, True)}


def chosen(program: Path, arguments: tuple[str, ...], isa: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RMK_CPU_ISA"}
    environment |= {} if isa is None else {"RMK_CPU_ISA": isa}
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CASES = (
    (ALL, "avx512 amx_bf16 1", "the system is asked once, whatever is asked of us"),
    ((*ALL[:4], "-1"), "avx512 avx512_bf16 1", "it refuses"),
    ((*ALL[:3], "200e7", "0"), "avx512 avx512_bf16 0", "it saves no tiles' data"),
    ((*ALL[:3], "400e7", "0"), "avx512 avx512_bf16 0", "it saves no configuration of tiles"),
    ((FEATURES, "0", *ALL[2:]), "avx512 avx512_bf16 0", "what it saves cannot be asked"),
    ((*ALL[:2], "1000000", *ALL[3:]), "avx512 avx512_bf16 0", "tiles without bfloat16"),
    ((*ALL[:2], "400000", *ALL[3:]), "avx512 avx512_bf16 0", "bfloat16 without tiles"),
    (("avx2,fma,avx512f,avx512bw", *ALL[1:]), "avx512 none 0", "what is no product needs AVX512-BF16"),
    (("avx2,fma", *ALL[1:]), "avx2 none 0", "no AVX-512"),
    (("avx2", *ALL[1:]), "baseline none 0", "AVX2 without FMA"),
)


@pytest.mark.parametrize(("arguments", "expected", "reason"), CASES, ids=[case[2] for case in CASES])
def test_by_processor_and_system(programs, arguments, expected, reason):
    assert chosen(programs[True], arguments) == expected


def test_by_environment(programs):
    """Nothing above what it allows; the permission is not asked for in vain."""
    expected = {
        "amx_bf16": "avx512 amx_bf16 1",
        "avx512_bf16": "avx512 avx512_bf16 0",
        "avx512": "avx512 none 0",
        "avx2": "avx2 none 0",
        "baseline": "baseline none 0",
    }
    assert {isa: chosen(programs[True], ALL, isa) for isa in expected} == expected


def test_by_compiler(programs):
    assert chosen(programs[False], ALL) == "avx512 avx512_bf16 0"
