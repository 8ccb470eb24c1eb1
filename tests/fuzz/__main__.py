"""`python -m fuzz`: fuzz everything, and print how many inputs each entry was given."""

import argparse
import sys
import time
import traceback
from fnmatch import fnmatchcase

import hypothesis
import torch
from hypothesis import strategies as st

from peft_kernels.core.library import native_library

from .entries import ENTRIES, Run


def fuzz(run: Run, inputs: int, seed: int, shrink: bool = True) -> int:
    """Give `run` that many inputs; the number it was given."""
    given = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        phases=[p for p in hypothesis.Phase if shrink or p.name not in ("shrink", "explain")],
    )
    @hypothesis.given(st.data())
    def case(data: st.DataObject) -> None:
        nonlocal given
        given += 1
        run(data.draw)

    case()
    return given


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all, shared by the entries")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the first entry; today's time by default"
    )
    parser.add_argument("--entry", default="*", help="glob: only these")
    parser.add_argument("--no-shrink", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in ENTRIES if fnmatchcase(name, arguments.entry)]
    print(f"native library: {native_library().path}, {native_library().capability}")
    failed, total, start = [], 0, time.perf_counter()
    for name in names:
        begin = time.perf_counter()
        try:
            given = fuzz(
                ENTRIES[name], max(1, arguments.inputs // len(names)), arguments.seed, not arguments.no_shrink
            )
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(name)
            print(f"FAILED: {name} --seed {arguments.seed}")
            traceback.print_exc(limit=-4)
            continue
        seconds = time.perf_counter() - begin
        total += given
        print(f"{name:50} {given:8,} inputs {given / seconds:8,.0f}/s", flush=True)
    seconds = time.perf_counter() - start
    print(f"{total:,} inputs in {seconds:.0f} s, seed {arguments.seed}, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
