"""The Triton engine: its tests in the interpreter, machine code for GPUs, and doing without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
        source = ASTSource(kernel, arguments, {"block": 1024, **constants})
        return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

    shared = {"table": "*i64", "layers": "i32", "targets": "*i64", "sources": "*i64"}
    shared |= {"changed": "*i1", "cosines": "*fp32"}
    for stored in (tl.float32, tl.float16, tl.uint16):
        assert machine_code(triton_kernels.compare, shared, stored=stored)
        mixing = {**shared, "later": "*i1", "merge_weight": "fp32"}
        assert machine_code(triton_kernels.blend, mixing, stored=stored)
        for to_buffer in (False, True):
            assert machine_code(triton_kernels.copy, shared, stored=stored, to_buffer=to_buffer)
        every = {**shared, "changed": "constexpr"}
        options = {"stored": stored, "to_buffer": True, "changed": None}
        assert machine_code(triton_kernels.copy, every, **options)
    counts = {"merged": "*i64", "undefined": "*i64", "cosine_sum": "*fp64", "cosine_max": "*fp32"}
    for thresholds in ("*fp32", "*fp64"):
        deciding = {**shared, **counts, "thresholds": thresholds, "skip": "*fp32"}
        assert machine_code(triton_kernels.decide, deciding, inclusive=True, block=256)
    nothing = dict.fromkeys(["skip", *counts])
    deciding = {**shared, "thresholds": "*fp32"}
    assert machine_code(triton_kernels.decide, deciding, inclusive=False, block=256, **nothing)


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
