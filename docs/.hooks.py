"""What docstrings hold and markdown does not know: Sphinx roles, and examples without a fence."""

import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor


class _Examples(Preprocessor):
    """Puts ``>>>`` lines into a code block; markdown would quote them three times."""

    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        fenced = example = False
        for line in lines:
            if line.lstrip().startswith("```"):
                fenced = not fenced
            starts = line.startswith(">>> ") and not fenced
            if example and not line.strip():
                result.append("```")
                example = False
            elif starts and not example:
                result.append("```pycon")
                example = True
            result.append(line)
        return [*result, "```"] if example else result


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before fenced blocks are taken out of the text.
        md.preprocessors.register(_Examples(md), "examples", 40)


def on_config(config: Any) -> Any:
    """Adds the code block for examples."""
    config.markdown_extensions.append(_Extension())
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Leaves the name of ``:func:`name``` and its kin, and drops the role."""
    return re.sub(r":(?:func|class|meth|attr|data|mod):(?=<code)", "", html)
