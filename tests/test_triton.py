"""The Triton engine: its tests in the interpreter, machine code for GPUs, and doing without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

NEEDS_TRITON = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux only")
ON_DEVICE = [
    Path(__file__).with_name(name) for name in ("triton_on_device.py", "triton_engine_on_device.py")
]


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@NEEDS_TRITON
@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param("1", id="interpreted"),
        pytest.param(
            "0",
            id="on a GPU",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_launches_equal_the_plain_functions(interpret: str) -> None:
    """Every test of those files, none skipped."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *map(str, ON_DEVICE)]
    done = run_python(*arguments, TRITON_INTERPRET=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = re.search(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    assert tests and int(tests[1]) > 40, done.stdout


@NEEDS_TRITON
@pytest.mark.parametrize("capability", [75, 80, 89, 90], ids=["T4", "A100", "L4", "H100"])
def test_every_launch_compiles_to_machine_code(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the interpreter takes, the compiler may refuse; it needs no GPU to say so."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from inmerge_wrap.engines import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def machine_code(kernel: Any, types: dict[str, str], **constants: Any) -> bytes:
        arguments = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, arguments, {"block": 512, **constants})
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": 8}).asm["cubin"]

    for index in ("*i16", "*i32"):
        rows = dict.fromkeys(["place", "targets", "sources", "read", "signs"], index)
        shared = {**rows, "table": "*i64", "dtype": "i32", "cosines": "*fp32"}
        buffers = dict.fromkeys(["buffer", "blended", "kept"], "*u8")
        shared |= {**buffers, "changed": "*i1", "merged": "*i1", "skip": "*fp32"}
        shared["merge_weight"] = "fp32"
        for stored, vector in product((tl.float32, tl.float16, tl.uint16), (1, 16)):
            row = {"stored": stored, "vector": vector}
            assert machine_code(triton_kernels.compare, shared, **row)
            assert machine_code(triton_kernels.copy, shared, **row)
            assert machine_code(triton_kernels.merge, shared, decided=False, **row)
    # A launch does without what it is not given.
    absent = dict.fromkeys(["signs", "kept", "skip"], "constexpr")
    nothing = dict.fromkeys(absent)
    for decided in (False, True):
        row["decided"] = decided
        assert machine_code(triton_kernels.merge, {**shared, **absent}, **nothing, **row)
    del row["decided"]
    assert machine_code(triton_kernels.copy, {**shared, "read": "constexpr"}, read=None, **row)


def test_nobody_waits_for_a_triton_that_is_not_used() -> None:
    code = "import sys, torch; from inmerge_wrap.engines import triton_launches as engine\n"
    code += "print(engine.takes(torch.ones(2, 1, 1, 1)))\n"
    code += "print(engine.unavailable_reason(torch.device('cpu')))\n"
    code += "print([name for name in sys.modules if 'triton_kernels' in name])"
    done = run_python("-c", code, TRITON_INTERPRET="")
    expected = ["False", "Triton runs on a GPU, not on cpu", "[]"]
    assert done.stdout.splitlines() == expected, done.stderr


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("sys.modules['triton.language'] = None", "Triton cannot be imported: "),
        # Too late: what belongs to Triton itself is compiled, and there is nothing to run it.
        ("import triton; os.environ['TRITON_INTERPRET'] = '1'", "Triton does not work on cpu: "),
    ],
    ids=["missing", "failing"],
)
def test_a_triton_that_does_not_work_is_a_reason_and_no_error(broken: str, reason: str) -> None:
    code = f"import os, sys, torch, inmerge_wrap; {broken}\n"
    code += "from inmerge_wrap.engines import triton_launches as engine\n"
    code += "device = torch.device('cpu')\n"
    code += "print(engine.available(device), engine.unavailable_reason(device))"
    done = run_python("-c", code, TRITON_INTERPRET="1" if "modules" in broken else "")
    assert done.stdout.startswith(f"False {reason}"), done.stdout + done.stderr
