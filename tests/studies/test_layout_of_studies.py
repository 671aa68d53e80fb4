"""The studies keep to the proportions of the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_layout import long_functions

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize(
    "path", sorted(STUDIES.rglob("*.py")), ids=lambda path: str(path.relative_to(STUDIES))
)
def test_no_file_and_no_function_outgrows_its_reader(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert long_functions(path) == []
