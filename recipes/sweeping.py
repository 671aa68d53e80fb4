"""Sweeps of many runs: each writes one JSON file and is never done twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from records import write_json
from training import Run


def claim(path: Path) -> FileLock | None:
    """Acquires the lock of a run that is neither done nor in progress; None for any other.

    The system releases it when the process ends; the file that remains is not a lock.
    """
    folder = path.parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{path.stem}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    # Only now: another process may have finished the run a moment ago.
    if path.exists():
        lock.release()
        return None
    return lock


def sweep(
    runs: Sequence[Run],
    folder: Path,
    accelerator: Accelerator,
    carry_out: Callable[[Run], dict[str, Any]],
) -> None:
    """Runs what is not in the folder yet, in order, and prints a line for each run.

    The processes of one launch do one run together; other launches that share the folder do other
    runs at the same time.
    """
    for number, run in enumerate(runs, start=1):
        path = folder / run.file_name
        lock = claim(path) if accelerator.is_main_process else None
        mine = [lock is not None]
        if not broadcast_object_list(mine)[0]:
            continue
        try:
            result = carry_out(run)
            if accelerator.is_main_process:
                write_json(path, result)
        finally:
            if lock is not None:
                lock.release()
        clean = result["test"]["clean"]
        accelerator.print(
            f"[{number}/{len(runs)}] {run.arm}, seed {run.seed}: accuracy {clean['accuracy']:.3f}, "
            f"balanced error {clean['balanced_error']:.3f} ({result['seconds']:.0f} s)",
            flush=True,
        )
