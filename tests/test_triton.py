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
    """What the interpreter takes, the compiler may refuse; it needs no GPU to say so.

    Where rows are aligned, a thread reads and writes several entries at a time.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from inmerge_wrap.engines import triton_kernels, triton_launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def assert_compiles(kernel: Any, types: dict[str, str], stored: Any, **constants: Any) -> None:
        arguments = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        fixed = {"block": triton_launches._BLOCK, "stored": stored, **constants}
        source = ASTSource(kernel, arguments, fixed)
        options = {"num_warps": triton_launches._WARPS}
        code = triton.compile(source, GPUTarget("cuda", capability, 32), options).asm
        assert code["cubin"]
        words = 4 if stored == tl.float32 else 2  # of 32 bits
        assert f"ld.global.v{words}.b32" in code["ptx"]
        writes = kernel is not triton_kernels.compare
        assert (f"st.global.v{words}.b32" in code["ptx"]) == writes

    for index in ("*i16", "*i32"):
        names = ["place", "targets", "sources", "read", "late", "signs"]
        shared = {**dict.fromkeys(names, index), "table": "*i64", "cosines": "*fp32"}
        buffers = dict.fromkeys(["buffer", "blended", "kept"], "*u8")
        shared |= {**buffers, "changed": "*i1", "merged": "*i1", "skip": "*fp32"}
        shared["merge_weight"] = "fp32"
        for stored in (tl.float32, tl.float16, tl.uint16):
            assert_compiles(triton_kernels.compare, shared, stored)
            assert_compiles(triton_kernels.merge, shared, stored, decided=False)
    # A launch does without what it is not given.
    absent = dict.fromkeys(["signs", "kept", "skip"])
    some = {name: kind for name, kind in shared.items() if name not in absent}
    for decided in (False, True):
        assert_compiles(triton_kernels.merge, some, stored, decided=decided, **absent)
    for absent in ({"read": None}, {"late": None}, {"read": None, "late": None}):
        some = {name: kind for name, kind in shared.items() if name not in absent}
        for stored in (tl.float32, tl.float16, tl.uint16):
            assert_compiles(triton_kernels.copy, some, stored, **absent)


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
