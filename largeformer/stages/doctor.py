"""`largeformer doctor`: print what the checks of `planning.doctor` found, for people or for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from largeformer.config.deepspeed import load_deepspeed
from largeformer.config.schema import Recipe
from largeformer.launching.hostfile import read_hostfile
from largeformer.planning.doctor import diagnose
from largeformer.planning.findings import Finding, Needs

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def run(recipe: Recipe | None, as_json: bool = False, hostfile: Path | None = None) -> int:
    """Check this machine, for `recipe` where one is given. Returns the exit code: 1 where a run would fail, else 0. Raises BadInputError
    where `hostfile` is wrong."""
    hosts = read_hostfile(hostfile) if hostfile is not None else {}
    needs = Needs.of(recipe, load_deepspeed(recipe)) if recipe is not None else None
    findings = diagnose(needs, os.environ)
    if hosts:
        findings.append(Finding("hostfile", "ok", f"{len(hosts)} hosts, {sum(hosts.values())} ranks"))
    counts = {level: sum(finding.level == level for finding in findings) for level in _STYLES}
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "counts": counts}, indent=2))
    else:
        _print(findings, counts)
    return 1 if counts["error"] else 0


def _print(findings: Sequence[Finding], counts: dict[str, int]) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        message = Text(finding.message)
        if finding.remedy:
            message.append(f"\n-> {finding.remedy}")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.check, message)
    console.print(table)
    console.print(f"errors: {counts['error']}, warnings: {counts['warning']}", style=_STYLES["error" if counts["error"] else "ok"])
