"""Frozen settings: written and committed before a confirmation, and never changed after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inmerge_wrap.files import write_json
from studies.common.methods import Method
from studies.common.records import environment


def described(arms: Mapping[str, tuple[Method, ...]]) -> dict[str, Any]:
    """Returns each arm with all its settings, as the file records it."""
    settings = {arm: {m.name: m.to_dict() for m in methods} for arm, methods in arms.items()}
    return json.loads(json.dumps(settings))  # as it will be read


def freeze(content: Mapping[str, Any], path: Path) -> None:
    """Writes what the confirmation will train, by kind and name.

    Raises:
        SystemExit: If the file exists.
    """
    if path.exists():
        raise SystemExit(f"{path} exists: frozen arms cannot be changed")
    write_json(path, {**content, "environment": environment()})


def check_frozen(content: Mapping[str, Any], path: Path) -> None:
    """Compares what this code would train with the file.

    Raises:
        SystemExit: If anything differs.
    """
    frozen, now = read_frozen(path), json.loads(json.dumps(content))
    for kind in content:
        names = {**frozen[kind], **now[kind]}
        changed = [name for name in names if frozen[kind].get(name) != now[kind].get(name)]
        if changed:
            raise SystemExit(f"{path}: the {kind} {changed} are not what this code would train")


def read_frozen(path: Path) -> dict[str, Any]:
    """Reads the file.

    Raises:
        SystemExit: If it is missing.
    """
    if not path.exists():
        raise SystemExit(f"{path} is missing: write it with freeze, and commit it")
    return json.loads(path.read_text())
