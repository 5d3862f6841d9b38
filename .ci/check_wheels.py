"""Fails unless each wheel holds what its build mode promises and no native library that needs torch."""

import subprocess
import sys
import zipfile
from pathlib import Path

root, *modes = sys.argv[1:]
for mode in modes:
    (wheel,) = Path(root, mode).glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if name.endswith(".so")]
    presets = [name for name in names if name.startswith("robust_moe/presets/") and name.endswith(".yaml")]
    if len(libraries) != (mode != "none"):
        sys.exit(f"{wheel.name}: expected {int(mode != 'none')} extension with RMK_BUILD={mode}, got {libraries}")
    strangers = [name for name in names if not name.startswith(("robust_moe/", "robust_moe_kernels"))]
    if not presets or strangers:
        sys.exit(f"{wheel.name}: expected the two packages and their presets, got {strangers or 'no presets'}")
    for name in libraries:
        path = zipfile.ZipFile(wheel).extract(name, Path(root, mode))
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        linked = [line for line in needed.splitlines() if "NEEDED" in line]
        if any(word in line for line in linked for word in ("torch", "c10", "cudart")):
            sys.exit(f"{name}: expected no library of torch or CUDA among those needed, got {linked}")
    print(f"RMK_BUILD={mode}: {wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB, {len(names)} files")
