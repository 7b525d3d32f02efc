"""What MkDocs calls while it builds the site: docstrings are in the form that TRL's have, which it shows otherwise."""

import re
from typing import Any


_LINK = re.compile(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]")
_TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")
_NAME = re.compile(r"\[?`~?(?:[a-z_]\w*\.)*([^`]+)`\]?")
_FLAG = re.compile(r' *<span class="c1"># doctest: \+\w+</span>')


def on_page_content(html: str, **_: Any) -> str:
    """
    Show names as names: "[`~module.Name`]" as "Name", and types without their marks. Doctest's flags go.

    >>> on_page_content("<code>[`~a.b.Name`] or `int`, *optional*</code> of [<code>~c.Other</code>]")
    '<code>Name or int, optional</code> of <code>Other</code>'
    """
    html = _FLAG.sub("", _LINK.sub(r"<code>\1</code>", html))
    return _TYPE.sub(lambda match: "<code>" + _NAME.sub(r"\1", match[1]).replace("*", "") + "</code>", html)
