"""Check that this machine can run megatron_spdf: packages, GPUs, network, disk, memory, Slurm.

python tools/doctor.py [--json]

Exit code 0, or 1 if a line says FAIL.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from doctor_checks import FAIL, examine

from megatron_spdf.command_line import end_quietly, make_parser


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit code is 1 if something fails."""
    parser = make_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON list")
    options = parser.parse_args(arguments)
    findings = []
    for finding in examine():
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return int(any(finding.status == FAIL for finding in findings))


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
