"""Lists the dead links of a built site: python docs/tools/links.py [FOLDER].

It checks pages, anchors, pictures, styles and scripts. People read the site
from the disk. So a link to a folder is dead, and so is a script, style or
picture that a browser would fetch from the network.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SOURCES = ("src", "srcset", "data")  # attributes that name a file to load


class Page(HTMLParser):
    """A page's anchors, its links, and the files loaded with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.files: list[str] = []
        self.feed(text)

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors.update(values[n] for n in ("id", "name") if n in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and "stylesheet" in values.get("rel", ""):
            self.files.append(values.get("href", ""))
        elif tag in ("img", "script", "source", "iframe", "object"):
            self.files.extend(values[n] for n in SOURCES if n in values)


def dead_links(folder: Path) -> list[str]:
    """A line for each dead link: its page and its target."""
    root = folder.resolve()
    pages = {path: Page(path.read_text()) for path in root.rglob("*.html")}
    # only a server shows 404.html, and its links begin at the server's root
    pages = {path: p for path, p in pages.items() if path.name != "404.html"}
    found = []
    for path, page in sorted(pages.items()):
        dead = [x for x in page.links if not _leads_somewhere(x, path, pages)]
        for file in page.files:
            remote = urlsplit(file).netloc
            if remote or not _leads_somewhere(file, path, pages):
                dead.append(file)
        found += [f"{path.relative_to(root)}: {link}" for link in dead]
    return found


def _leads_somewhere(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True  # another site, which is not asked
    target = path
    if parts.path:
        target = (path.parent / unquote(parts.path)).resolve()
    if not target.is_file():
        return False
    anchor = unquote(parts.fragment)
    if not anchor or target not in pages:
        return True
    return anchor in pages[target].anchors


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    if not (folder / "index.html").is_file():
        sys.exit(f"{folder}: no index.html; build the site first")
    found = dead_links(folder)
    if found:
        sys.exit("\n".join(["dead links:", *found]))


if __name__ == "__main__":
    main()
