"""A process that cannot import this library: it loads what was exported as anybody would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.modules["inmerge_wrap"] = None
import contextlib, io, json, os, traceback
import timm, torch, torchvision
torch.set_num_threads(1)
for line in sys.stdin:
    folder, code = json.loads(line)
    os.chdir(folder)
    said, error = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([said.getvalue(), error]), flush=True)
"""


class Stranger:
    """Runs code in one process for all tests, because its imports take longer than the code."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )

    def run(self, code: str, folder: Path) -> list[str]:
        """The lines that the code prints in a folder; an error in it is one here."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(folder), code]) + "\n")
        self.process.stdin.flush()
        said, error = json.loads(self.process.stdout.readline())
        assert not error, error
        return said.splitlines()

    def end(self) -> None:
        self.process.communicate()  # closes its input, at whose end it stops
        assert self.process.returncode == 0
