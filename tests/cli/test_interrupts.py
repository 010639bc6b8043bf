"""Ctrl-C at any moment of a command: no traceback, and the signal's status, which is 130 for a
shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in (ROOT / "pretrain.py", ROOT / "finetune.py",
                             *sorted((ROOT / "tools").glob("*.py")))
           if '__name__ == "__main__"' in path.read_text()]
INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('goes on')\n"
HEARING = ("import os, signal\nfrom megatron_spdf.command_line import hear_interrupts\n"
           "hear_interrupts()\n")


def start(words: list[str], handler=signal.SIG_DFL, path: Path = ROOT) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                                signal.SIGINT, handler),
                            env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}",
                                 "PYTHONWARNINGS": "ignore"})


def test_while_libraries_are_imported(tmp_path):
    for library in ("numpy", "pydantic", "torch", "yaml", "tqdm", "matplotlib"):
        (tmp_path / f"{library}.py").write_text(INTERRUPT)
    assert len(SCRIPTS) >= 17
    # these import no library before their main part
    runs = {path.name: start([str(path), "--help"], path=tmp_path) for path in SCRIPTS
            if path.name not in ("doctor.py", "sample.py")}
    for name, run in runs.items():
        assert (name, *run.communicate(timeout=100), run.returncode) == (
            name, "", "", -signal.SIGINT)


@pytest.mark.parametrize(("program", "handler", "said", "code"), [
    ("try:\n    os.kill(os.getpid(), signal.SIGINT)\nfinally:\n    print('in order')",
     signal.SIG_DFL, ("in order\n", ""), -signal.SIGINT),
    ("os.kill(os.getpid(), signal.SIGINT)\nprint('goes on')", signal.SIG_IGN, ("goes on\n", ""), 0),
    ("1 / 0", signal.SIG_DFL, ("", "ZeroDivisionError: division by zero"), 1),
])
def test_in_the_main_part(program, handler, said, code):
    run = start(["-c", HEARING + program], handler)
    out, err = run.communicate(timeout=100)
    assert (out, err.strip().rpartition("\n")[2], run.returncode) == (*said, code)
