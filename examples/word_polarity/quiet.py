"""The screen belongs to the demo: what its libraries would write there, and how to keep them from it."""

import logging
import os
import warnings


def keep_libraries_quiet() -> None:
    """Leave the screen to the demo and the network alone; to be called before the libraries are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it reports that the head is new, as it should be
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces its starts and stops
    # bitsandbytes recommends another package where the processor has bf16 instructions
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # adapters remarks on every model whose adapter is not active yet
    logging.getLogger("adapters").setLevel(logging.ERROR)
    # peft 0.21 asks transformers 5 for a property by its former name
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
