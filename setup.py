"""Builds ``robust_moe_kernels._C``: C++17 always, CUDA where nvcc is found. No PyTorch is needed or linked.

Environment
    RMK_BUILD=auto  (default) C++, and CUDA when a working nvcc is on the PATH or under CUDA_HOME
              cpu   C++ only
              cuda  C++ and CUDA; fails when nvcc is missing
              none  no extension: the pure-Python package
    MAX_JOBS        compilers run at once (default: the number of processors)
    RMK_SANITIZE    GCC's sanitizers, "address,undefined" or "thread", for a build outside the source tree without CUDA:
                    `make sanitize` (tests/sanitize) makes one and runs the tests with it
    RMK_CUDA_ARCHS  compute capabilities, default "80;90;100"; PTX is added for the last

On Windows auto builds nothing: the flags for MSVC (2022; run where cl.exe is on the PATH) and what replaces other
compilers' extensions are here, but no extension has been built there yet. RMK_BUILD=cpu or cuda tries it.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
RUNS_ON_X86 = sys.platform == "linux" and platform.machine() == "x86_64"  # elsewhere one build may be for two machines


class Flags(NamedTuple):
    """What a system's C++ compiler and linker, and nvcc on top of them, are asked for."""

    compile: tuple[str, ...]  # of C++
    link: tuple[str, ...]
    nvcc: tuple[str, ...]
    cuda_libraries: tuple[str, ...]
    cudart: str  # file of the static CUDA runtime
    cudart_folders: tuple[str, ...]  # where it may be, below the toolkit's root


def flags_of(system: str) -> Flags:
    """The flags of a system by its name in ``sys.platform``.

    Everywhere a*b+c rounds twice, as PyTorch's separate kernels do: bit equality. So no contraction: on request of GCC
    and Clang, by default of MSVC since 2022. Nobody reads floating-point exceptions or errno here; without that promise
    GCC's comparisons stay scalar.
    """
    device = ("-std=c++17", "-O3", "-lineinfo", "--fmad=false")
    if system == "win32":
        language = ("/EHsc", "/utf-8", "/permissive-", "/DNOMINMAX")
        return Flags(
            compile=("/std:c++17", "/O2", "/fp:precise", *language),
            link=(),
            nvcc=(*device, f"-Xcompiler={','.join(('/MD', '/fp:precise', *language))}"),
            cuda_libraries=("cudart_static",),
            cudart="cudart_static.lib",
            cudart_folders=("lib/x64", "lib"),
        )
    exact = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
    return Flags(
        compile=("-std=c++17", "-O3", *exact, "-fvisibility=hidden", "-g0"),
        link=("-pthread",),
        nvcc=(*device, "-Xcompiler=-fPIC"),
        cuda_libraries=("cudart_static", "rt", "dl"),
        cudart="libcudart_static.a",
        cudart_folders=("lib64", "lib"),
    )


FLAGS = flags_of(sys.platform)
SANITIZERS = os.environ.get("RMK_SANITIZE")
SANITIZED = (  # the later of two flags counts; Python's own have -fwrapv, under which no overflow is a fault
    (f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-wrapv", "-fno-omit-frame-pointer", "-O1", "-g1")
    if SANITIZERS
    else ()
)


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) or shutil.which("nvcc")
    return Path(found) if found else None


class Toolkit:
    """A CUDA compiler that works, what it builds for, its static libraries; RuntimeError says why there is none."""

    def __init__(self) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("found no nvcc on the PATH or under CUDA_HOME")
        self.nvcc = str(nvcc)
        asked = (os.environ.get("RMK_CUDA_ARCHS") or "80;90;100").split(";")
        known = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        self.archs = [arch for arch in asked if f"compute_{arch}" in known]
        if not self.archs:
            raise RuntimeError(f"{self.nvcc} builds for none of {', '.join(asked)}")
        # Asked of nvcc itself, which may be a wrapper.
        log = subprocess.run([self.nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        homes = [line.split("TOP=", 1)[1].strip() for line in log.splitlines() if "TOP=" in line]
        folders = [Path(home, name) for home in homes for name in FLAGS.cudart_folders]
        self.library_dirs = [str(folder) for folder in folders if (folder / FLAGS.cudart).is_file()]
        if not self.library_dirs:
            raise RuntimeError(f"found no {FLAGS.cudart} beside {self.nvcc}")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
            self.compile(source, Path(folder, "probe.o"), [])

    def compile(self, source: Path, target: Path, include_dirs: list[str]) -> None:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        command = [self.nvcc, *FLAGS.nvcc, *codes]
        command += [f"-I{folder}" for folder in include_dirs]
        done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.nvcc} failed on {source.name}:\n{done.stderr}")


INSTRUCTION_SETS = {  # by the end of a file's name
    "_amx_bf16": ["-mamx-tile", "-mamx-bf16", "-mavx512f"],
    "_avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512bf16", "-mfma"],
    "_avx512": ["-mavx512f", "-mfma"],
    "_avx2": ["-mavx2", "-mfma"],
}
OPTIONAL = ("kernels_amx_bf16", "kernels_avx512_bf16")  # compile to an empty table without their instruction set


def instruction_set(source: Path) -> list[str]:
    """Flags of a file whose name ends in an instruction set; which of them runs is decided when it runs."""
    if not RUNS_ON_X86:
        return []
    for suffix, flags in INSTRUCTION_SETS.items():
        if source.stem.endswith(suffix):
            return [*flags, "-ffp-contract=fast"]
    return []


def build_mode() -> tuple[str, Toolkit | None]:
    """What to build, "none", "cpu" or "cuda", and for the last the toolkit."""
    asked = os.environ.get("RMK_BUILD") or "auto"
    if asked not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"RMK_BUILD: expected auto, cpu, cuda or none, got {asked!r}")
    if asked == "auto" and sys.platform == "win32":
        print(
            "RMK_BUILD=auto: on Windows the pure-Python package; no extension has been built there yet, and "
            "RMK_BUILD=cpu or RMK_BUILD=cuda tries it",
            file=sys.stderr,
        )
        return "none", None
    if (
        asked in ("cpu", "none")
        or SANITIZERS
        or not {
            "build",
            "build_ext",
            "bdist_wheel",
            "editable_wheel",
            "develop",
            "install",
        }
        & set(sys.argv)
    ):
        return ("none" if asked == "none" else "cpu"), None
    try:
        return "cuda", Toolkit()
    except RuntimeError as reason:
        if asked == "cuda":
            sys.exit(f"RMK_BUILD=cuda: expected a working CUDA compiler, {reason}")
        print(f"RMK_BUILD=auto: building without CUDA: {reason}", file=sys.stderr)
        return "cpu", None


class BuildNative(build_ext):
    """Compiles each translation unit in a thread of its own, then links once."""

    def build_extension(self, ext: Extension) -> None:
        if SANITIZERS and self.inplace:
            sys.exit("RMK_SANITIZE: expected a build into a folder of its own, got one into the source tree")
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        sources = [Path(source) for source in ext.sources]
        if not getattr(self.compiler, "initialized", True):  # MSVC looks for its files at first, and may do so once
            self.compiler.initialize()
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            objects = list(pool.map(lambda source: self._compile(ext, source), sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
        )

    def _compile(self, ext: Extension, source: Path) -> str:
        if source.suffix == ".cu":
            return self._compile_cuda(ext, source)
        try:
            return self._compile_cpp(ext, source, instruction_set(source))
        except CompileError:
            if source.stem not in OPTIONAL:
                raise
            print(f"{source}: this compiler does not know {instruction_set(source)}; without them", file=sys.stderr)
            return self._compile_cpp(ext, source, [])

    def _compile_cpp(self, ext: Extension, source: Path, flags: list[str]) -> str:
        objects = self.compiler.compile(
            [str(source)],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *flags],
            depends=ext.depends,
        )
        return objects[0]

    def _compile_cuda(self, ext: Extension, source: Path) -> str:
        target = Path(self.build_temp, source.with_suffix(f".cu{self.compiler.obj_extension}"))
        inputs = [source, *map(Path, ext.depends)]
        if target.exists() and all(target.stat().st_mtime >= path.stat().st_mtime for path in inputs):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        TOOLKIT.compile(source, target, ext.include_dirs)
        return str(target)


def extension() -> Extension:
    import pybind11

    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.suffix in (".h", ".inl", ".cuh"))
    macros: list[tuple[str, str | None]] = [("RMK_X86", "1")] if RUNS_ON_X86 else []
    if not RUNS_ON_X86:
        sources = [name for name in sources if not Path(name).stem.endswith(tuple(INSTRUCTION_SETS))]
    libraries: list[str] = []
    library_dirs: list[str] = []
    if TOOLKIT is not None:
        sources += sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cu"))
        macros.append(("RMK_CUDA", "1"))
        libraries += FLAGS.cuda_libraries
        library_dirs += TOOLKIT.library_dirs
    return Extension(
        "robust_moe_kernels._C",
        sources=sources,
        depends=headers,
        include_dirs=[str(CSRC), pybind11.get_include()],
        define_macros=macros,
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args=[*FLAGS.compile, *SANITIZED],
        extra_link_args=[*FLAGS.link, *SANITIZED[:1]],
        language="c++",
    )


MODE, TOOLKIT = build_mode()
setup(
    packages=[
        *find_packages(include=["robust_moe_kernels", "robust_moe_kernels.*"]),
        *find_packages("python", include=["robust_moe", "robust_moe.*"]),
    ],
    package_data={
        "robust_moe": ["presets/*.yaml", "py.typed"],
        "robust_moe_kernels": ["py.typed"],
        "robust_moe_kernels.ops.expert_conv": ["tiles.json"],
    },
    ext_modules=[] if MODE == "none" else [extension()],
    cmdclass={"build_ext": BuildNative},
)
