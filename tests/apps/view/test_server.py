"""Who gets something from the server of `treepo-trl view`."""

import gzip
import http.client
import threading
from collections.abc import Iterator

import pytest

from treepo_trl.apps.view import Index, TreeServer, make_server


TREES = [b"first", b"second tree"]


@pytest.fixture
def server() -> Iterator[TreeServer]:
    index: Index = {"sources": [], "is_text": True, "trees": []}
    server = make_server(0, (gzip.compress(tree) for tree in TREES), index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def answer(server: TreeServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and head of an answer; `{secret}` in a path is the server's."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path.replace("{secret}", server.secret), headers=names)
    response = connection.getresponse()
    result = response.status, response.read(), dict(response.getheaders())
    connection.close()
    return result


def test_it_listens_on_this_machine_alone(server: TreeServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_it_hands_out_the_page_and_a_tree_at_a_time(server: TreeServer) -> None:
    status, page, head = answer(server, "/{secret}/")
    assert status == 200
    assert b'id="index"' in page
    assert b'id="tree-0"' not in page
    assert head["Content-Security-Policy"].startswith("default-src 'none'")
    for number, tree in enumerate(TREES):
        assert gzip.decompress(answer(server, f"/{{secret}}/tree/{number}")[1]) == tree


@pytest.mark.parametrize(
    "path",
    ["/", "/tree/0", "/x{secret}/", "/{secret}", "/{secret}/tree/2", "/{secret}/tree/-1", "/{secret}/tree/",
     "/{secret}/tree/x", "/{secret}/tree/%C2%B2", "/{secret}/../../etc/passwd"],
)  # fmt: skip
def test_nothing_else_is_there(server: TreeServer, path: str) -> None:
    assert answer(server, path)[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "cors"},
    ],
)
def test_another_origin_gets_nothing(server: TreeServer, headers: dict[str, str]) -> None:
    status, body, _ = answer(server, "/{secret}/tree/0", **headers)
    assert status == 403
    assert gzip.compress(TREES[0])[:10] not in body


def test_a_link_on_another_page_opens_the_page(server: TreeServer) -> None:
    assert answer(server, "/{secret}/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


def test_it_takes_nothing(server: TreeServer) -> None:
    assert answer(server, "/{secret}/", method="POST")[0] == 501


def test_a_port_that_is_taken_is_named(server: TreeServer) -> None:
    index: Index = {"sources": [], "is_text": True, "trees": []}
    with pytest.raises(OSError, match=f"`--port {server.server_port}` cannot be had: Address already in use"):
        make_server(server.server_port, iter([]), index)
