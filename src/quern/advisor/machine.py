"""The machine that figures come from, and how it differs from the one that asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quern.core.results import MeasuredOn, Results
from quern.core.text.language import gettext, ngettext


def measured_on(results: Results) -> MeasuredOn:
    """Processor, cores, kernels and date of results."""
    processor, cores, kernels = (results.hardware.get(key) for key in ("cpu_model", "usable_cores", "kernels_in_use"))
    return MeasuredOn(
        processor=processor if isinstance(processor, str) and processor else None,
        cores=cores if isinstance(cores, int) else None,
        kernels=kernels if isinstance(kernels, str) and kernels else None,
        created=results.created,
    )


def measured_on_text(found: MeasuredOn) -> str:
    """One sentence."""
    parts = [found.processor or gettext("a processor that the results do not name")]
    if found.cores is not None:
        parts.append(ngettext("{cores} core", "{cores} cores", found.cores, cores=found.cores))
    if found.kernels is not None:
        parts.append(gettext("{kernels} kernels", kernels=found.kernels))
    machine = gettext(", ").join(parts)
    return gettext("Measured on {machine}, {date}.", machine=machine, date=found.created[:10])


def warnings_here(found: MeasuredOn, here: Mapping[str, Any]) -> list[str]:
    """Why speeds may be others on this machine; ``here`` is what ``hardware.this_processor`` returns.

    What the results do not say, or this machine does not know of itself, is not compared.
    """
    pairs = (
        (gettext("processor"), found.processor, here.get("cpu_model")),
        (gettext("usable cores"), found.cores, here.get("usable_cores")),
        (gettext("kernels"), found.kernels, here.get("kernels_in_use")),
    )
    differing = [
        gettext("{what} {there} there, {here} here", what=name, there=there, here=own)
        for name, there, own in pairs
        if there is not None and own is not None and there != own
    ]
    if not differing:
        return []
    return [
        gettext(
            "The figures come from another machine ({differences}): sizes and losses hold here too, speeds, and with them "
            "the order of the rows, may not.",
            differences=gettext("; ").join(differing),
        )
    ]
