"""Asks whether the external links of the pages and of README are alive. Not part of the tests: it needs the network.

python docs/links.py
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"https?://[^\s)>\]\"'`]+")


def links() -> Iterator[tuple[str, str]]:
    """Pairs of a link and the file that has it, each link once."""
    seen = set()
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        for link in LINK.findall(page.read_text()):
            link = link.partition("#")[0].rstrip(".,;")
            if link not in seen:
                seen.add(link)
                yield link, str(page.relative_to(ROOT))


def problem(link: str) -> str:
    """What is wrong with it; empty if nothing is."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return ""
    except (urllib.error.URLError, TimeoutError) as error:
        return str(error)


def main() -> int:
    """Prints the links that are dead; returns the process's exit status."""
    found = list(links())
    dead = [(link, page, why) for link, page in found if (why := problem(link))]
    for link, page, why in dead:
        print(f"{page}: {link}: {why}")
    print(f"{len(found)} links, {len(dead)} of them dead")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
