"""`meshnode doctor`: what is wrong on this device, one line per check, with remedies. A node may run or not."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import PASSPHRASE, folder_of, settings
from meshnode.core.sizes import counted

if TYPE_CHECKING:
    from meshnode.doctor.finding import Finding

JSON_VERSION: Final = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="the same findings as JSON (fields may be added)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when nothing is wrong, else 1."""
    from meshnode.doctor.finding import exit_code
    from meshnode.doctor.sequence import examine

    found = []
    for finding in examine(folder_of(arguments), lambda: settings(arguments), os.environ.get(PASSPHRASE)):
        found.append(finding)
        if not arguments.json:
            print(line(finding), flush=True)
    if arguments.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print(f"\n{summary(found)}")
    return exit_code(found)


def line(finding: Finding) -> str:
    """One line for people."""
    return f"{finding.level.value:<8} {finding.check}: {finding.text} {finding.remedy}".rstrip()


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = Counter(finding.level.value for finding in findings)
    bad, odd = counts["wrong"], counts["warning"]
    warnings = counted(odd, "warning")
    if bad:
        return f"{counted(bad, 'thing is', 'things are')} wrong, {warnings}."
    return f"Nothing is wrong, {warnings}."


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`{version, wrong, warning, ok, checks: [{check, code, level, text, remedy}]}`."""
    counts = Counter(finding.level.value for finding in findings)
    checks = [
        {"check": f.check, "code": f.code, "level": f.level.value, "text": f.text, "remedy": f.remedy}
        for f in findings
    ]
    return {"version": JSON_VERSION, **{kind: counts[kind] for kind in ("wrong", "warning", "ok")}, "checks": checks}
