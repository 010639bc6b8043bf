"""Check that this machine can run megatron_spdf: packages, GPUs, network, disk, memory, Slurm.

Of what is optional it says what it is for and how to install it.

python tools/doctor.py [--json]

Exit code 0, or 1 if a line says FAIL.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict

# Nothing else: it tells what is missing, this package too.
from doctor_checks import FAIL, examine


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit code is 1 if something fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for number in (signal.SIGINT, signal.SIGPIPE):  # `doctor.py | head` ends quietly
        signal.signal(number, signal.SIG_DFL)
    sys.exit(main())
