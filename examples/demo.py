"""Fine-tune a real 4-bit encoder twice: stock PEFT + bitsandbytes, then the same after `pk.replace_layers`.

    python examples/demo.py [--steps N | --quick] [--batch-size N] [--output FOLDER]

Exit status 0 if the losses of both agree at every step, our step is faster, and a stock model that loads our
adapter gives equal outputs; otherwise 1, with a sentence saying what failed. The comparison itself is in
`word_polarity/comparison.py`; `docs/demo.md` says what is shown and how it is measured.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from word_polarity.quiet import keep_libraries_quiet


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """`steps`, `batch_size` and `output` from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=500, help="training steps (default: %(default)s)")
    length.add_argument("--quick", dest="steps", action="store_const", const=50, help="only 50 steps")
    parser.add_argument("--batch-size", type=int, default=16, help="words per step (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for name, value in (("--steps", options.steps), ("--batch-size", options.batch_size)):
        if value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = parse_options(arguments)
    keep_libraries_quiet()
    from word_polarity.comparison import compare
    from word_polarity.results import failures, notes, save_plot, table

    console = Console(highlight=False)
    options.output.mkdir(parents=True, exist_ok=True)
    plot = options.output / "loss.png"
    outcome = compare(options.steps, options.batch_size, options.output / "adapter", console)
    save_plot(outcome, plot)
    console.print()
    console.print(table(outcome))
    for note in notes(outcome):
        console.print(note, style="dim")
    console.print(f"Loss curves: {plot.resolve()}", soft_wrap=True)
    sentences = failures(outcome)
    for sentence in sentences:
        console.print(f"[bold red]FAILED[/] {sentence}")
    if not sentences:
        console.print("[bold green]PASSED[/] Same losses, faster, and PEFT loads the adapter.")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
