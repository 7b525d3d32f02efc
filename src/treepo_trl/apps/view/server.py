"""A server of the page for this machine alone: it hands out a tree at a time."""

import os
import secrets
import tempfile
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .page import Page
from .trees import Index


_HOST = "127.0.0.1"


class TreeServer(ThreadingHTTPServer):
    """A server of one page. Its trees are in a temporary file that goes with it."""

    daemon_threads = True

    def __init__(self, port: int, trees: Iterable[bytes], index: Index) -> None:
        try:  # first: a port that is taken is said before the trees are read
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"`--port {port}` cannot be had: {reason}. Name another, or none for a free one.") from error
        self.secret = secrets.token_urlsafe(12)  # other users of this machine reach the port too
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it is closed with the server
            self._ends = [0]
            for tree in trees:
                self._file.write(tree)
                self._ends.append(self._ends[-1] + len(tree))
            self._file.flush()
            page = Page(is_served=True)
            self.policy = page.policy + "; frame-ancestors 'none'"
            self.page = "".join(page.parts([], index)).encode()
        except BaseException:
            self.server_close()
            raise

    def server_close(self) -> None:
        """Close the port, and remove the trees."""
        super().server_close()
        if hasattr(self, "_file"):
            self._file.close()

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"http://{_HOST}:{self.server_port}"

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"{self.origin}/{self.secret}/"

    def content(self, path: str) -> tuple[str, bytes] | None:
        """Type and bytes of what lies at a path; `None` if nothing does."""
        root = f"/{self.secret}/"
        if path == root:
            return "text/html; charset=utf-8", self.page
        number = path.removeprefix(f"{root}tree/")
        if path.startswith(f"{root}tree/") and number.isascii() and number.isdecimal() and len(number) < 10:
            which = int(number)
            if which < len(self._ends) - 1:
                start, end = self._ends[which : which + 2]
                return "application/octet-stream", os.pread(self._file.fileno(), end - start, start)
        return None


def make_server(port: int, trees: Iterable[bytes], index: Index) -> TreeServer:
    """
    A server on the loopback interface; `serve_forever` runs it.

    Args:
        port (`int`):
            0 for a free one.
        trees (iterable of `bytes`), index ([`Index`]):
            As `packed_trees` gives and fills them.

    Raises:
        OSError: if the port is taken.
    """
    return TreeServer(port, trees, index)


class _Handler(BaseHTTPRequestHandler):
    server: TreeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """Answer with the page or a tree. Pages of other origins and other host names get nothing."""
        if refusal := self._refusal():
            self.send_error(HTTPStatus.FORBIDDEN, refusal)
            return
        content = self.server.content(self.path)
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, body = content
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _refusal(self) -> str | None:
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in (_HOST, "localhost"):  # a name of another site that leads to this machine
            return "Open the address that the command has printed."
        origin = self.headers.get("Origin")
        is_link = self.headers.get("Sec-Fetch-Mode", "navigate") == "navigate"  # in a notebook, for example
        is_own = self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        if (origin is not None and origin.partition("://")[2] != self.headers.get("Host")) or not (is_own or is_link):
            return "Another page asks for the trees."
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""
