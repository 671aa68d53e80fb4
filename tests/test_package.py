"""The package: what an index shows of it, read from a wheel that was built as for a release."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/owner/name"


def built(folder: Path, addresses: dict[str, str]) -> Message:
    """The metadata of the wheel."""
    surroundings = {k: v for k, v in os.environ.items() if k not in ("REPO_URL", "SITE_URL")}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        env=surroundings | addresses,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(files.read(name).decode("utf-8"))


def targets(text: str) -> list[tuple[str, str]]:
    """("a" or "img", address) of every link and picture, as CommonMark reads them."""
    found = []

    def walk(tokens: list[Token]) -> None:
        for token in tokens:
            if token.type == "link_open":
                found.append(("a", str(token.attrGet("href"))))
            if token.type == "image":
                found.append(("img", str(token.attrGet("src"))))
            walk(token.children or [])

    walk(MarkdownIt("commonmark").enable("table").parse(text))
    return found


def test_every_link_of_the_description_leads_to_a_file_of_the_repository(tmp_path: Path) -> None:
    metadata = built(tmp_path, {"REPO_URL": REPOSITORY + "/"})
    assert metadata["Description-Content-Type"] == "text/markdown"
    found = targets(str(metadata.get_payload()))
    assert len([kind for kind, _ in found if kind == "img"]) == 3 and len(found) > 15
    for kind, address in found:
        assert address.startswith("https://"), address
        if address.startswith(REPOSITORY):
            ours = re.fullmatch(rf"{REPOSITORY}/(blob|raw)/main/([^#]+)(#.*)?", address)
            assert ours and (ROOT / ours[2]).is_file(), address
            assert ours[1] == ("raw" if kind == "img" else "blob")
    addresses = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert addresses["Repository"] == REPOSITORY
    assert addresses.keys() == {"Paper", "Repository", "Issues", "Changelog", "Documentation"}


def test_without_an_address_the_description_is_the_readme(tmp_path: Path) -> None:
    metadata = built(tmp_path, {})
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text("utf-8").strip()
    assert [line.split(", ")[0] for line in metadata.get_all("Project-URL")] == ["Paper"]
