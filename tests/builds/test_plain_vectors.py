"""The convolution's inner loops for a compiler without vector types: the same bits as with them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None or not CSRC.is_dir(), reason="needs a C++ compiler and the sources")

PROGRAM = """
#include <cstdio>
#include <vector>

#include "expert_conv/kernels.h"

static std::vector<float> numbers(int count) {
  static unsigned state = 1;
  std::vector<float> found(count);
  for (float& value : found) value = static_cast<int>(state = state * 1664525u + 1013904223u) / 1.7e9f;
  return found;
}

static void print(const std::vector<float>& values) {
  for (float value : values) std::printf("%a\\n", value);
}

int main() {
  const rmk::Kernels& k = rmk::kernels();
  std::vector<float> a = numbers(4096), b = numbers(4096);
  const float* lines[16];
  for (int i = 0; i < 16; ++i) lines[i] = i == 5 ? nullptr : a.data() + 37 * i;
  const float* rows[rmk::kTileRows];
  std::vector<float> c = numbers(4096), d = numbers(4096), e(4096), f(4096), g(4096), h = numbers(4096);
  std::vector<float> i = numbers(4096), l(4096), m(4096), trace(rmk::kMaxLanes);
  float* targets[rmk::kTileRows];
  float* pixels[4] = {i.data(), nullptr, i.data() + 64, i.data() + 128};
  for (int r = 0; r < rmk::kTileRows; ++r) rows[r] = a.data() + 29 * r, targets[r] = c.data() + 64 * r;
  k.rows(rmk::kTileRows, rows, b.data(), 23, targets, k.panel, true);
  k.rows(5, rows, b.data(), 23, targets, k.panel - 3, false);
  k.packed(4, a.data(), 11, b.data(), 17, d.data(), 40, k.panel, true);
  k.transpose(a.data(), 19, 13, 18, e.data(), 14);
  k.tile(lines, 18, 20, f.data(), 64);
  k.gradient_tile(lines + 2, 18, 20, g.data(), 64);
  k.output(a.data(), 64, pixels, 18, trace.data());
  k.filter(a.data(), 200, 21, 5, 7, l.data(), 128);
  k.filter_back(a.data(), 200, 21, 7, 6, m.data(), 128);
  k.filter_gradient(a.data(), 64, h.data(), 40, 18, true, trace.data());
  for (const auto* values : {&c, &d, &e, &f, &g, &h, &i, &l, &m}) print(*values);
  std::printf("%s\\n", k.name);
}
"""


def output(folder: Path, *flags: str) -> list[str]:
    (folder / "program.cpp").write_text(PROGRAM, encoding="utf-8")
    # without RMK_X86, kernels() is the baseline's
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", f"-I{CSRC}", *flags]
    sources = [str(folder / "program.cpp")]
    sources += [str(CSRC / "expert_conv" / f"kernels_{name}.cpp") for name in ("baseline", "choice")]
    done = subprocess.run(
        [*command, *sources, "-o", str(folder / "program")], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(folder / "program")], capture_output=True, text=True, check=True).stdout.split()


def test_the_same_bits(tmp_path: Path):
    expected = output(tmp_path)
    assert expected[-1] == "baseline"
    assert len({value for value in expected if value not in ("0x0p+0", "-0x0p+0")}) > 1000
    assert output(tmp_path, "-DRMK_PLAIN_VECTORS") == expected
