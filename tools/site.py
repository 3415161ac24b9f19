"""What mkdocs is told beside mkdocs.yml: files outside docs/ that its pages link to belong to the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(?:\.\./)+(?=[\w.])([^)#]+)")


def on_files(files: Files, config) -> Files:
    """Add what pages link to outside of docs/, and what those pages link to."""
    waiting = [(page, ROOT / "docs") for page in sorted((ROOT / "docs").glob("*.md"))]
    seen: set[Path] = set()
    while waiting:
        page, folder = waiting.pop()
        for target in re.findall(r"\]\(([\w./-]+)", page.read_text(encoding="utf-8")):
            path = (folder / target).resolve()
            inside = path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT)
            if inside or path in seen or not path.is_file():
                continue
            seen.add(path)
            name = path.relative_to(ROOT).as_posix()
            file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
            if path.suffix == ".md":
                waiting.append((path, path.parent))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links out of docs/ lead to the same file inside the site; folders have no page."""
    if (ROOT / "docs" / page.file.src_uri).is_file():
        markdown = _LINK.sub(r"\1", markdown)
    else:
        # A page from outside of docs/: where it names one of docs/, that is one of the site's.
        depth = page.file.src_uri.count("/")
        markdown = markdown.replace(f"]({'../' * depth}docs/", f"]({'../' * depth}")
    folder = ROOT / "docs" / page.file.src_uri
    folder = (folder if folder.is_file() else ROOT / page.file.src_uri).parent

    def linked(found: re.Match[str]) -> str:
        """The words alone where the link leads to a folder."""
        return found[1] if any((base / found[2]).is_dir() for base in (folder, ROOT)) else found[0]

    return re.sub(r"\[([^\]]+)\]\(([\w./-]+)\)", linked, markdown)
