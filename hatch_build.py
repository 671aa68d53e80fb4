"""Writes what a package index shows: the README with links that lead to the repository.

Where that is comes from the environment, as for the site: ``REPO_URL=https://host/owner/name``, and
``SITE_URL`` for the documentation. Without ``REPO_URL`` links stay relative, as for a clone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def with_absolute_links(text: str, repository: str) -> str:
    """Returns Markdown whose relative links and pictures lead to the main branch."""

    def absolute(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{label}]({repository}/{kind}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    """Hatchling's hook for the fields that pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the description and the addresses of the project."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("REPO_URL", "").rstrip("/")
        site = os.environ.get("SITE_URL", "").rstrip("/")
        urls = {"Paper": "https://arxiv.org/abs/2502.20516"}
        if repository:
            text = with_absolute_links(text, repository)
            urls |= {
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            }
        if site or repository:
            urls["Documentation"] = site or f"{repository}/blob/main/docs/index.md"
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
