"""The sentences of the report: what it comes to, what it was measured on and with, what its words mean."""

from __future__ import annotations

from ..case import EXACT, GATE_BASELINES, OWN_VARIANTS
from ..report import size_text
from ..results import Report
from ..roofline import Roofline
from ..standing import Outcome

DEFINITIONS = (
    ("ms, ±", "Median time of a call, and half the 95 % noise band of that median."),
    (
        "ratio, band",
        "Time of a baseline over ours, paired round by round: the median, and its 95 % noise band from order "
        "statistics.",
    ),
    (
        "▲ faster, ▼ slower, = level",
        "The whole band of the ratio is above 1, below 1, or holds 1. A case counts as faster only if ours "
        "beats every stock baseline, as slower if any of them beats ours.",
    ),
    (
        "? not judged",
        "No ratio: too few undisturbed rounds, or something that cannot run here. A section of its own has "
        "the reasons.",
    ),
    (
        "* stock baselines",
        f"{', '.join(GATE_BASELINES)} at stock settings: what a user has today. They alone decide "
        "--fail-below.",
    ),
    ("mean ratio", "Geometric mean over all cases of a baseline; worst: the lowest of them."),
    ("-tuned", "The same library in a process whose allocator keeps freed memory."),
    (
        "dense, compile",
        "F.linear on the dequantised weight: what an unquantised layer costs. torch.compile of eager.",
    ),
    (
        ", ".join((*OWN_VARIANTS, EXACT)),
        "Ours on another problem: what a part of it costs or brings. Neither won nor lost.",
    ),
    (
        "roofline, % roof",
        "The shortest time that the measured bandwidth and peak allow: max(bytes read / read bandwidth + "
        "bytes written / write bandwidth, FLOPs / peak). Bytes are those that the problem needs, not those "
        "that a contestant moves. Above 100 % where data are in cache, or where arithmetic is less precise.",
    ),
    ("scratch", "Peak memory of a call beyond its results; of whole models, the peak of the call."),
    ("saved", "Bytes that one forward keeps alive for backward, weights and parameters left out."),
    (
        "error, tolerance",
        "Largest error over the largest value of the float64 result. The tolerance is derived from dtype, "
        "length of the sums and magnitudes; a case of ours that exceeds it has no speed.",
    ),
    ("rounds", "Undisturbed rounds that the numbers are from (−dropped ones)."),
)


def headline(counts: dict[Outcome, int], whom: str, what: str) -> str:
    """Wins and losses in one sentence."""
    total, unjudged = sum(counts.values()), counts["unjudged"]
    if not total:
        return "Nothing was measured"
    if unjudged == total:
        return f"None of {total} {what} could be judged"
    rest = f", {unjudged} not judged" if unjudged else ""
    return (
        f"Faster {whom} in {counts['faster']} of {total} {what}, slower in {counts['slower'] or 'none'}{rest}"
    )


def warnings(report: Report, wrong: int) -> list[str]:
    """What a reader has to know before believing a number."""
    found = []
    if wrong:
        found.append(f"✕ Wrong results in {wrong} of {len(report.cases)} cases: they were not timed.")
    if report.interrupted:
        found.append(f"Interrupted: this is what was done by then, {len(report.cases)} cases.")
    if report.settings.suite == "smoke":
        found.append("The suite smoke has tiny shapes and tests the machinery: its speeds mean nothing.")
    if report.machine.native_capability is None and report.machine.gpu is None:
        found.append(f"No native kernels, the reference was measured: {report.machine.native_reason}")
    return found


def device(report: Report) -> str:
    """What was measured."""
    return report.machine.gpu or f"{report.machine.cpu}, {report.machine.processors} processors"


def facts(report: Report) -> list[tuple[str, str]]:
    """Machine, versions, limits and settings, a term and its words."""
    machine, settings = report.machine, report.settings
    versions = ", ".join(f"{name} {version or '–'}" for name, version in machine.versions.items())
    found = [
        ("GPU", machine.gpu or ""),
        ("processor", f"{machine.cpu}, {machine.processors} usable"),
        ("caches", ", ".join(f"{level} {size_text(size)}" for level, size in machine.caches.items())),
        ("system", machine.system),
        ("versions", versions),
        (
            "instructions",
            f"torch {machine.torch_capability}, native kernels {machine.native_capability or '–'}",
        ),
        *((f"limits, {report.measured_on(roof.threads)}", limits(roof)) for roof in report.rooflines),
        ("measured", report.created),
        ("baselines", ", ".join(settings.baselines)),
        ("models", ", ".join(settings.presets)),
        ("time a case", f"at most {settings.max_seconds:g} s; passes: {settings.passes}"),
    ]
    return [(term, words) for term, words in found if words]


def limits(roof: Roofline) -> str:
    """Bandwidths and peaks."""
    peaks = (f"{dtype} {peak:.0f} GFLOP/s" for dtype, peak in sorted(roof.gflop_s.items()))
    return ", ".join((f"read {roof.read_gb_s:.1f} GB/s", f"write {roof.write_gb_s:.1f} GB/s", *peaks))
