"""All cases: those of the families, and suites that ask a question of their own.

To add a family: write `cases_<family>.py` with a `FAMILY` and name it here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from . import (
    cases_adapter,
    cases_dora,
    cases_dropout,
    cases_ia3,
    cases_int8,
    cases_linear,
    cases_model,
    cases_nf4,
    suites,
)
from .case import BASELINES, GPU_BASELINES, OWN_VARIANTS, TUNED_SUFFIX, Case, Family, Prepared

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        cases_nf4.FAMILY,
        cases_linear.FAMILY,
        cases_int8.FAMILY,
        cases_dora.FAMILY,
        cases_ia3.FAMILY,
        cases_adapter.FAMILY,
        cases_dropout.FAMILY,
        cases_model.FAMILY,
    )
}
SUITES = ("smoke", "quick", "full", "sweep", *suites.ROWS, "gpu")
CASES = (*(case for family in FAMILIES.values() for case in family.cases), *suites.CASES)


def select(suite: str, families: Collection[str] = tuple(FAMILIES), pattern: str = "*") -> list[Case]:
    """Cases of a suite, in registry order, whose name matches the glob `pattern`.

    Raises:
        ValueError: a family or the suite is not known.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite}")
    return matching([case for case in CASES if suite in case.suites], families, pattern)


def matching(cases: Iterable[Case], families: Collection[str], pattern: str) -> list[Case]:
    """Those of some families whose name matches the glob `pattern`."""
    return [case for case in cases if case.family in families and fnmatchcase(case.name, pattern)]


def default_baselines(suite: str) -> list[str]:
    """What a suite measures against unless told otherwise.

    All baselines; torch.compile and tuned allocators, which take seconds a case, and variants of ours only in
    the full suite. A sweep compares ours with itself at other M; `limits` and `methods` name what ours is to
    be compared with, and so does `gpu`, case by case.
    """
    everywhere = tuple(name for name in BASELINES if name not in GPU_BASELINES)
    usual = tuple(
        name
        for name in everywhere
        if name not in ("compile", *OWN_VARIANTS) and not name.endswith(TUNED_SUFFIX)
    )
    if suite in suites.ROWS:
        return list(suites.figures_against(suite))
    return list({"full": everywhere, "sweep": ("dense",), "gpu": suites.GPU_AGAINST}.get(suite, usual))


def baselines(case: Case) -> tuple[str, ...]:
    """Names of the baselines that apply to a case, of those that its suite asks for."""
    names = FAMILIES[case.family].baselines(case)
    return tuple(name for name in names if not case.against or name in case.against)


def prepare(case: Case) -> Prepared:
    """Make the tensors, contestants and oracle of a case."""
    return FAMILIES[case.family].prepare(case)
