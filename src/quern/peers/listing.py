"""Every known tool, with all that its adapter declares."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from quern.peers.base import PEERS
from quern.peers.environment import Environment


def known_tools(environments: Path | None = None) -> list[dict[str, Any]]:
    """Every known tool with all that its adapter declares: ``name``, ``tool``, ``package``, ``also``, ``modules``,
    ``installed`` (version or None), ``written_for``, ``install`` (what makes its environment), ``requirements``,
    ``sources``, ``environment``, ``licence``, ``homepage``, ``runtime``, ``targets``, ``devices``, ``folder`` and
    ``variants`` (``name``, ``bits``, ``settings``, ``calibrated``, ``default``).
    """
    found = []
    for name in PEERS.names():
        environment = Environment.of(name, environments)
        peer, installed = environment.peer, environment.installed()
        found.append(
            {
                "name": name,
                "tool": peer.tool,
                "package": peer.package,
                "also": list(peer.also),
                "modules": list(peer.modules),
                "installed": None if installed is None else installed.version,
                "written_for": peer.versions,
                "install": f"quern peers install {name}",
                "requirements": list(peer.requirements),
                "sources": list(peer.sources),
                "environment": dict(peer.environment),
                "licence": peer.licence,
                "runtime": peer.runtime,
                "targets": list(peer.targets),
                "devices": list(peer.devices),
                "homepage": peer.homepage,
                "folder": str(environment.folder),
                "variants": [asdict(variant) for variant in peer.variants],
            }
        )
    return found
