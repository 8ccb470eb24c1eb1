"""Fine-tune a 4-bit encoder in seven ways, from a frozen probe to DoRA: which one to pick?

    python examples/demo_methods.py [--steps N] [--seeds N] [--quick] [--batch-size N] [--output FOLDER]
    python examples/demo_methods.py --tune [METHOD ...]    # how the learning rates were chosen

Exit status 0 if every method beats the frozen probe, with every seed and by more than the choice of the test
words explains, if the probe beats guessing, and if every layer that `pk.replace_layers` fused ran fused;
otherwise 1, with a sentence saying what failed. The comparison itself is in `peft_methods/comparison.py`;
`docs/methods.md` says what is shown and how it is measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from word_polarity.quiet import keep_libraries_quiet


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """`steps`, `seeds`, `batch_size`, `output` and `tune` from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one repetition of 100 steps")
    parser.add_argument("--batch-size", type=int, default=16, help="words per step (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--tune",
        nargs="*",
        metavar="METHOD",
        help="find the learning rate of these methods, or of all, on the validation words, and stop",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.seeds = 100, 1
    for name in ("steps", "seeds", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = parse_options(arguments)
    keep_libraries_quiet()
    from peft_methods import results, tuning
    from peft_methods.comparison import compare
    from peft_methods.methods import METHODS
    from peft_methods.plot import save_plot

    console = Console(highlight=False)
    if options.tune is not None:
        names = [method.name for method in METHODS]
        unknown = [name for name in options.tune if name not in names]
        if unknown:
            raise SystemExit(f"--tune must be given methods of {', '.join(names)}, got {unknown[0]}")
        chosen = [method for method in METHODS if not options.tune or method.name in options.tune]
        console.print(tuning.table(tuning.sweep(chosen, options.steps, options.batch_size, console)))
        return 0

    outcome = compare(METHODS, options.steps, options.batch_size, range(options.seeds), console)
    options.output.mkdir(parents=True, exist_ok=True)
    plot, figures = options.output / "methods.png", options.output / "methods.json"
    save_plot(outcome, plot)
    figures.write_text(json.dumps(results.as_json(outcome), indent=1) + "\n")
    console.print()
    console.print(results.table(outcome))
    for note in results.stock_notes(outcome):
        console.print(f"* {note}", style="dim")
    for sentence in results.conclusions(outcome):
        console.print(sentence)
    console.print(f"Plot: {plot.resolve()}\nFigures: {figures.resolve()}", soft_wrap=True)
    sentences = results.failures(outcome)
    for sentence in sentences:
        console.print(f"[bold red]FAILED[/] {sentence}")
    if not sentences:
        console.print("[bold green]PASSED[/] Every method clearly beats the frozen probe.")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
