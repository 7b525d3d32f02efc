"""
Ask for every address that the README and the pages link to, and print those that do not answer.

    python docs/check_links.py

Links between the pages need no network: `make site` checks those.
"""

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)
_ADDRESS = re.compile(r"\]\((https?://[^)\s]+)\)")


def addresses() -> dict[str, list[str]]:
    """The linked addresses without their anchors, and the pages that link to each."""
    found: dict[str, list[str]] = {}
    for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]:
        for address in _ADDRESS.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            found.setdefault(address.partition("#")[0], []).append(page.relative_to(ROOT).as_posix())
    return found


def answer(address: str) -> str:
    """What went wrong when an address was asked for; empty if it answered."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return ""
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        return str(error)


def main() -> int:
    """Print the addresses that do not answer; 1 if there are any."""
    linked = addresses()
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(linked, pool.map(answer, linked), strict=True))
    broken = {address: problem for address, problem in answers.items() if problem}
    for address, problem in broken.items():
        print(f"{address}: {problem} ({', '.join(sorted(set(linked[address])))})")
    print(f"{len(linked) - len(broken)} of {len(linked)} addresses answer.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
