"""MkDocs hook: files of the repository that pages link to become part of the site.

A page links to ``../benchmarks/results/README.md`` as it stands in the repository. The site gets a
copy under ``repository/``, and the link leads there; so do the links of that copy.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
COPIES = "repository/"
# Pages of the navigation that are not written in docs/.
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)]*)?(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def in_repository(page: str) -> str:
    """The path in the repository of a file of the site."""
    return page.removeprefix(COPIES) if page.startswith(COPIES) else DOCS + page


def in_site(path: str) -> str:
    """The path in the site of a file of the repository."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else COPIES + path


def target(link: str, source: str) -> str | None:
    """The file of the repository that a link of the file `source` leads to, if it is one."""
    if ":" in link:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def links(source: str) -> list[str]:
    text = (ROOT / source).read_text()
    found = [target(match[2], source) for match in LINK.finditer(text)]
    return [path for path in found if path is not None]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    waiting = [*ALWAYS, *(DOCS + file.src_uri for file in files.documentation_pages())]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith(DOCS):
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += links(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = in_repository(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        path = target(match[2], source)
        if path is None:
            return match[0]
        link = os.path.relpath(in_site(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(rewritten, part) for i, part in enumerate(parts))


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings end a line before code with two colons, as in reStructuredText."""
    return html.replace("::</p>", ":</p>")
