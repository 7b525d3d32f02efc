"""Addresses of servers: parted, checked, and without users and passwords wherever they can be seen."""

import re
from base64 import b64encode
from urllib.parse import unquote, urlsplit, urlunsplit


_NEXT_ADDRESS = re.compile(r"\s*,\s*(?=https?://)", re.IGNORECASE)  # other commas may stand in a password
_WITH_CREDENTIALS: dict[str, str] = {}
"""Addresses with user and password, by the same without them: of this process alone, and the last ones given."""


def keep_credentials(base_url: str) -> str:
    """
    A setting's addresses without users and passwords; `server_urls` puts them back in this process.

    Loggers, checkpoints and callbacks read settings in many ways, and what they write may be published.

    Raises:
        ValueError: for a mistaken address that has a password.
    """
    if "@" not in base_url:
        return base_url
    places = []
    for url in server_urls(base_url, "", 0):
        place, _ = place_and_headers(url)
        _WITH_CREDENTIALS[place] = url
        places.append(place)
    return ",".join(places)


def server_urls(base_url: str | None, host: str, port: int) -> list[str]:
    """
    Addresses of the servers: those of `vllm_server_base_url`, parted by commas, else the one of host and port.

    Raises:
        ValueError: for an address that is given twice, or a comma that no address follows. It shows no password.
    """
    if base_url is None:
        return [f"http://{host}:{port}"]
    urls = [url.strip().rstrip("/") for url in _NEXT_ADDRESS.split(base_url)]
    if "" in urls or "," in "".join(urls) or len(set(urls)) < len(urls):
        raise ValueError(
            "`vllm_server_base_url` must be one address, or several different ones parted by commas, such as "
            "'http://localhost:8000,http://localhost:8001'. Each begins with http:// or https://, and a comma inside "
            "one is written `%2C`."
        )
    return [_WITH_CREDENTIALS.get(url, url) for url in urls]


def place_and_headers(url: str) -> tuple[str, dict[str, str]]:
    """
    An address without user, password and slash at its end; and the header that these two become.

    Raises:
        ValueError: for an address that is none. It shows no password.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError
        if "@" in parts.path:  # then host and path are a user, and a password with a slash
            raise ValueError
        _ = parts.port
    except ValueError:
        raise ValueError(
            f"The server address {_without_credentials(url)!r} is none: write it as `http://host:port`, or "
            "`https://...`. A `/` in a password is written `%2F`."
        ) from None
    place = parts.netloc.rpartition("@")[2]
    headers = {}
    if "@" in parts.netloc:
        user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
    return urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", "")), headers


def _without_credentials(url: str) -> str:
    """An address without user and password, however mistaken it is."""
    place = url.rpartition("@")[2]
    scheme = re.match(r"\s*https?://", url, re.IGNORECASE)
    return scheme[0] + place if scheme and place != url else place
