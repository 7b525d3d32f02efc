"""The page: markup, style and script of this folder in one text, with a policy that lets nothing else in or out."""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .trees import Index, to_json


_FOLDER = Path(__file__).parent
_SCRIPTS = ("data.js", "colours.js", "tree.js", "path.js", "list.js", "main.js")
"""Parts of the one script, in this order."""
_TREES_MARK = "{{trees}}"


class Page:
    """
    The page of the viewer.

    Args:
        is_served (`bool`):
            Whether trees come from the server of the page; else they are in the page.

    Attributes:
        policy (`str`):
            Its content-security policy: this script, this style, and nothing from anywhere.
        before (`str`), after (`str`):
            Its text before and after the trees.
    """

    def __init__(self, is_served: bool) -> None:
        style = (_FOLDER / "style.css").read_text(encoding="utf-8")
        script = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS)
        connect = "'self'" if is_served else "'none'"
        self.policy = (
            f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
            f"connect-src {connect}; base-uri 'none'; form-action 'none'"
        )
        page = (_FOLDER / "page.html").read_text(encoding="utf-8")
        for name, text in {"policy": self.policy, "style": style, "script": script}.items():
            page = page.replace("{{" + name + "}}", text)
        self.before, _, self.after = page.partition(_TREES_MARK)

    def parts(self, trees: Iterable[bytes], index: Index) -> Iterator[str]:
        """
        The text of the page, piece by piece: it may be larger than the memory.

        Trees and index are base64. Nothing that a model has written can end their elements.
        """
        yield self.before
        for number, tree in enumerate(trees):
            yield _element(f"tree-{number}", tree)
        yield _element("index", to_json(index))
        yield self.after


def _element(name: str, data: bytes) -> str:
    return f'<script type="text/plain" id="{name}">{base64.b64encode(data).decode()}</script>\n'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
