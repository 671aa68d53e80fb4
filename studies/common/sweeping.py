"""Sweeps of many runs: each writes one JSON file and is never done twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from inmerge_wrap.files import write_json
from studies.common.records import name_of
from studies.common.training import Run


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
    done: Collection[str] = (),
) -> None:
    """Runs what is neither in the folder nor in ``done``, in order, and prints a line for each.

    ``done`` are names as ``name_of`` makes them. The processes of one launch do one run together;
    other launches that share the folder do other runs at the same time.
    """
    for number, run in enumerate(runs, start=1):
        name = name_of(run.to_dict())
        path = folder / f"{name}.json"
        free = accelerator.is_main_process and name not in done
        lock = claim(path) if free else None
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
            f"[{number}/{len(runs)}] {run.dataset}, {run.augmentation}, {run.arm}, "
            f"seed {run.seed}: accuracy {clean['accuracy']:.3f}, "
            f"balanced error {clean['balanced_error']:.3f} ({result['seconds']:.0f} s)",
            flush=True,
        )
