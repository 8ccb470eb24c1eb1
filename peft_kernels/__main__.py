"""`python -m peft_kernels [--json]`: what runs where here, and a self-test; exit status 1 if that fails."""

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console

from peft_kernels import diagnostics
from peft_kernels.bench.results import finite


def main() -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m peft_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    if parser.parse_args().json:
        results = diagnostics.self_test()
        tests = [
            {**asdict(result), "error": finite(result.error), "tolerance_used": finite(result.tolerance_used)}
            for result in results
        ]
        print(json.dumps({**diagnostics.inventory(), "self-test": tests}, indent=2, allow_nan=False))
    else:
        console = Console()
        console.print(diagnostics.inventory_view(diagnostics.inventory()))  # at once: the self-test may crash
        results = diagnostics.self_test()
        if results:
            console.print(diagnostics.self_test_view(results))
    return 0 if results and all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
