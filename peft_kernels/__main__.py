"""What runs where on this machine, whether every operation computes correctly, and what would make it faster.

Exit status: 0 if all is well, whatever the advice; 1 if an operation is wrong or none can run; 2 for bad
options.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console

from peft_kernels import diagnostics
from peft_kernels.bench.results import finite
from peft_kernels.core.library import native_library
from peft_kernels.diagnostics import SelfTestResult, text


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit status."""
    summary, _, statuses = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m peft_kernels", description=summary, epilog=statuses)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON (docs/diagnostics.md)")
    output.add_argument("--issue", action="store_true", help="print it as Markdown, to paste into an issue")
    parser.add_argument(
        "--no-self-test", action="store_true", help="leave out the self-test, which takes seconds"
    )
    options = parser.parse_args(arguments)

    sections = diagnostics.inventory()
    console = None if options.json or options.issue else Console()
    if console:
        console.print(text.inventory_view(sections))  # at once: the self-test may crash
    results = None if options.no_self_test else diagnostics.self_test()
    advice = diagnostics.advise(diagnostics.this_machine())  # after it: libraries that it loads count
    if options.json:
        tests = None if results is None else [_as_json(result) for result in results]
        report = {**sections, "advice": [asdict(each) for each in advice], "self-test": tests}
        print(json.dumps(report, indent=2, allow_nan=False))
    elif options.issue:
        print(text.issue(sections, advice, results))
    elif console:
        console.print(text.advice_view(advice))
        if results is not None:
            console.print(text.self_test_view(results))
    usable = not native_library().loaded or native_library().capability is not None
    return 0 if usable and all(result.passed for result in results or ()) else 1


def _as_json(result: SelfTestResult) -> dict[str, Any]:
    return {**asdict(result), "error": finite(result.error), "tolerance_used": finite(result.tolerance_used)}


if __name__ == "__main__":
    sys.exit(main())
