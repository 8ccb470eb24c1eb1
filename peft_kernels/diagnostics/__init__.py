"""What this installation is, whether it computes correctly, and what would make it faster.

The parts of `python -m peft_kernels`: `inventory()` describes it, `self_test()` checks every op against
float64, `advise(this_machine())` says what to change. All return plain data; `text` makes it readable.
"""

from peft_kernels.diagnostics.advice import Advice, advise
from peft_kernels.diagnostics.checks import SelfTestResult, self_test
from peft_kernels.diagnostics.environment import inventory
from peft_kernels.diagnostics.machine import Machine, this_machine

__all__ = ["Advice", "Machine", "SelfTestResult", "advise", "inventory", "self_test", "this_machine"]
