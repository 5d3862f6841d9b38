"""Random calls of the native ops, beside the reference: valid ones give its numbers, invalid ones are refused.

    python tests/fuzz [--seed N] [--seconds S] [--kind valid|invalid] [--first N] [--calls N]

Call N of a seed is always the same call. Calls run in a process of their own, so that one that ends it is found,
printed with the line that makes it again, and passed over. Ends with status 1 if a call was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

PATIENCE = 60  # seconds of the processor after which a call ends its process
KINDS = ("valid", "invalid")


def work(seed: int, first: int, calls: int, kinds: list[str]) -> None:
    """Calls ``first`` and on, with a line of JSON before each, at the native code's answer and at the verdict."""
    import torch
    from calls import CALLS
    from draws import Draw
    from faults import spoil
    from verdicts import answered, described, fault_of

    torch.set_num_threads(1)  # the native code's own threads are drawn below
    limit_memory()
    for number in range(first, first + calls):
        kind = kinds[number % len(kinds)]
        d = Draw(f"{seed}/{number}/{kind}")
        call, threads, note = d.choice(CALLS)(d), d.choice((1, 2, 3, 7)), ""
        if kind == "invalid":
            call.arguments, note = spoil(d, call.arguments)
        say({"number": number, "kind": kind, "call": described(call), "note": note})
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)  # whose signal ends the process
        answer = answered(call, threads)
        say({"refused": isinstance(answer, Exception)})
        say({"fault": fault_of(call, kind == "valid", answer)})


def limit_memory() -> None:
    """A call that asks for too much memory is refused it; address sanitizers have their own limit and much space."""
    if "lib" not in os.environ.get("LD_PRELOAD", ""):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        if pages:
            most = pages * resource.getpagesize() + 8 * 2**30
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def say(line: dict[str, object]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())


class Run:
    """What has been found so far."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seed, self.seconds = seed, seconds
        self.until = float("inf")  # time counts from the first call
        self.done: Counter[str] = Counter()  # calls of each kind, and refused ones
        self.faults: Counter[str] = Counter()  # by function, changed argument and outcome

    def fault(self, call: dict[str, str], text: str) -> None:
        """Counts it, and prints the first of its sort."""
        name = f"{call['call'].partition('(')[0]} {call['note']} -> {text.partition(':')[0]}"
        self.faults[name] += 1
        if self.faults[name] == 1:
            replay = f"--seed {self.seed} --kind {call['kind']} --first {call['number']} --calls 1"
            print(f"FAULT {call['kind']} {call['note']}\n  {call['call']}\n  {text}", flush=True)
            print(f"  again: python tests/fuzz {replay}", flush=True)

    def follow(self, kinds: list[str], first: int, calls: int) -> int:
        """Reads what one process says, until it ends or time is up; returns the number of the call to go on with."""
        command = [sys.executable, str(Path(__file__).parent), "--work", "--seed", str(self.seed), "--kind", *kinds]
        process = subprocess.Popen(
            [*command, "--first", str(first), "--calls", str(calls)], stdout=subprocess.PIPE, text=True
        )
        call: dict[str, str] = {}
        running = judged = False  # the native code; the reference
        for line in process.stdout or ():
            self.until = min(self.until, time.monotonic() + self.seconds)
            said = json.loads(line)
            if "call" in said:
                call, first, running = said, said["number"] + 1, True
            elif "refused" in said:
                self.done[call["kind"]] += 1
                self.done["refused"] += said["refused"] and call["kind"] == "invalid"
                running, judged = False, True
            else:
                judged = False
                if said["fault"]:
                    self.fault(call, said["fault"])
            if time.monotonic() >= self.until:
                process.kill()
                process.wait()
                return first
        status = process.wait()
        if running:
            self.fault(call, f"the process ended: status {status}")
        elif status and not (judged and call["kind"] == "invalid"):  # which may be too much for the reference
            raise SystemExit(f"python tests/fuzz: a call could not be made, status {status}, after {call}")
        return first


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all calls")
    parser.add_argument("--seconds", type=float, default=60.0, help="to go on for, from the first call on")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="of calls; both: in turn")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=10**9, help="most calls to make")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.seed, asked.first, asked.calls, asked.kind)
        return 0
    run, number, last = Run(asked.seed, asked.seconds), asked.first, asked.first + asked.calls
    print(f"seed {asked.seed}, {asked.seconds:g} s, calls from {asked.first}", flush=True)
    while number < last and time.monotonic() < run.until:
        number = run.follow(asked.kind, number, last - number)
    for name, count in run.faults.most_common():
        print(f"{count:6} {name}")
    counts = f"{run.done['valid']} valid calls, {run.done['invalid']} invalid ones ({run.done['refused']} refused)"
    print(f"{counts}, {sum(run.faults.values())} faults of {len(run.faults)} kinds")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
