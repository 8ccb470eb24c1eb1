"""Benchmarks with a slow-down planted in one of our functions, to see whether the comparison notices.

    python tests/bench/planted.py nf4_linear 0.2 -- --suite quick --compare OLD.json --fail-regression 10%

makes every call of `peft_kernels.functional.nf4_linear` take 20 % more time; what follows `--` goes to
`python -m peft_kernels.bench`, whose exit status this has.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from peft_kernels import functional


@contextmanager
def slower(function: str, share: float) -> Iterator[None]:
    """Inside, a call of `functional.<function>` takes `1 + share` times as long."""
    stock = getattr(functional, function)

    def slowed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = stock(*args, **options)
        end = time.perf_counter()
        while time.perf_counter() < end + share * (end - start):
            pass
        return result

    with patch.object(functional, function, slowed):
        yield


if __name__ == "__main__":
    from peft_kernels.bench.__main__ import main

    name, share, separator, *arguments = sys.argv[1:]
    if separator != "--":
        sys.exit(__doc__)
    with slower(name, float(share)):
        sys.exit(main(arguments))
