"""The native code under GCC's sanitizers: what `make sanitize` runs. Linux, with GCC and its sanitizers' libraries.

    python tests/sanitize [address] [thread] [--seconds S] [--seed N] [--all]

For each: the extension is built below build/sanitize, where it does not touch the installed one; the faults of
planted.py are found, or the run ends there; then the native tests and the fuzzer (tests/fuzz) run with it. ``address``
looks for accesses outside of what was allocated and for undefined behaviour, ``thread`` for races.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sanitize"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
LIBRARIES = {"address": ("asan", "ubsan"), "thread": ("tsan",)}
OPTIONS = {
    # Python keeps what it allocated until it ends. Fuzzed sizes are refused where they are beyond any use.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=8192",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:history_size=7",
}
PLANTED = {  # and what the report says
    "address": {"overflow": "heap-buffer-overflow", "division": "division by zero"},
    "thread": {"race": "data race"},
}
TESTS = {"address": "native and not triton", "thread": "thread and not triton"}
LEFT_OUT = {
    "address": (  # they limit or measure the memory that the sanitizer takes
        "test_an_error_in_a_kernel_passes_through_the_team",
        "test_an_attack_lets_the_process_keep_freed_memory",
        "test_scratch_memory_is_not_touched_page_by_page_again",
    ),
    "thread": (  # they need the threads of PyTorch's runtime
        "test_kernels_run_on_the_named_team",
        "test_a_forks_child_has_threads_of_its_own",
    ),
}
ISAS = {"address": ("avx512_bf16", "avx2", "baseline"), "thread": ("avx512_bf16",)}  # or what there is


def build(sanitizer: str) -> Path:
    """A copy of both packages with an instrumented extension."""
    library = FOLDER / sanitizer
    shutil.rmtree(library, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(library)]
    command += ["--build-temp", str(FOLDER / f"{sanitizer}-objects")]
    variables = {"RMK_SANITIZE": SANITIZERS[sanitizer], "CC": "gcc", "CXX": "g++"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nbuilding for {sanitizer}: status {done.returncode}")
    return library


def environment(sanitizer: str, library: Path) -> dict[str, str]:
    """In which Python finds the instrumented build before the source tree's, and its runtime is loaded first."""
    files = []
    for name in LIBRARIES[sanitizer]:
        asked = ["gcc", f"-print-file-name=lib{name}.so"]
        files.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        if not Path(files[-1]).is_file():
            raise SystemExit(f"expected GCC's lib{name}.so, got {files[-1]}")
    return (
        os.environ
        | OPTIONS
        | {
            "LD_PRELOAD": ":".join(files),
            "PYTHONPATH": ":".join(map(str, (library, ROOT, ROOT / "tests" / "helpers"))),
            "PYTHONSAFEPATH": "1",  # not the current folder before those
            "RMK_TEST_SANITIZED": str(library),
            "OMP_NUM_THREADS": "1",
        }
    )


def run(arguments: list[str], variables: dict[str, str], **options: object) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, at the addresses that a thread sanitizer of GCC 12 can map."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    return subprocess.run([*fixed, sys.executable, *arguments], cwd=ROOT, env=variables, text=True, **options)


def prove(sanitizer: str, variables: dict[str, str]) -> None:
    for fault, report in PLANTED[sanitizer].items():
        done = run(["tests/sanitize/planted.py", fault], variables, capture_output=True)
        if done.returncode == 0 or report not in done.stderr:
            raise SystemExit(f"the planted {fault} was not found: status {done.returncode}\n{done.stdout}{done.stderr}")
        print(f"{sanitizer}: the planted {fault} was found", flush=True)


def check(sanitizer: str, asked: argparse.Namespace) -> list[str]:
    """What failed."""
    print(f"{sanitizer}: building", flush=True)
    library = build(sanitizer)
    variables = environment(sanitizer, library)
    prove(sanitizer, variables)
    folder, words = ("", "not triton") if asked.all else ("ops", TESTS[sanitizer])
    words += "".join(f" and not {name}" for name in LEFT_OUT[sanitizer])
    tests = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-o",
        f"pythonpath={library} . tests/helpers",
        "-k",
        words,
    ]
    failed = [] if run([*tests, f"tests/robust_moe_kernels/{folder}"], variables).returncode == 0 else ["tests"]
    kinds = ["valid", "invalid"] if sanitizer == "address" else ["valid"]
    for number, isa in enumerate(ISAS[sanitizer]):
        fuzz = ["--seconds", str(asked.seconds / len(ISAS[sanitizer])), "--seed", str(asked.seed + number)]
        done = run(["tests/fuzz", *fuzz, "--kind", *kinds], variables | {"RMK_CPU_ISA": isa})
        failed += [] if done.returncode == 0 else [f"fuzzing {isa}"]
    return [f"{sanitizer}: {name}" for name in failed]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("sanitizers", nargs="*", metavar="address|thread", help="default: both, one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="to fuzz for, with each")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer")
    parser.add_argument("--all", action="store_true", help="all tests of the kernels' package, not those of its ops")
    asked = parser.parse_args()
    unknown = set(asked.sanitizers) - set(SANITIZERS)
    if unknown:
        parser.error(f"expected address or thread, got {', '.join(sorted(unknown))}")
    failed = [name for sanitizer in asked.sanitizers or SANITIZERS for name in check(sanitizer, asked)]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
