"""All families of cases. To add one: write `cases_<family>.py` with a `FAMILY` and name it here."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from . import cases_dropout, cases_int8, cases_linear, cases_nf4
from .case import BASELINES, Case, Family, Prepared

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (cases_nf4.FAMILY, cases_linear.FAMILY, cases_int8.FAMILY, cases_dropout.FAMILY)
}
SUITES = ("smoke", "quick", "full")


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
    return [
        case
        for family in FAMILIES.values()
        if family.name in families
        for case in family.cases
        if suite in case.suites and fnmatchcase(case.name, pattern)
    ]


def default_baselines(suite: str) -> list[str]:
    """All baselines; torch.compile, which takes seconds a case, only in the full suite."""
    return [name for name in BASELINES if name != "compile" or suite == "full"]


def baselines(case: Case) -> tuple[str, ...]:
    """Names of the baselines that apply to a case."""
    return FAMILIES[case.family].baselines(case)


def prepare(case: Case) -> Prepared:
    """Make the tensors, contestants and oracle of a case."""
    return FAMILIES[case.family].prepare(case)
