"""Addresses of servers: how they are parted, and that no password of one is ever shown."""

import traceback
from pathlib import Path

import pytest

from tests.support.config import make
from treepo_trl.engines.server_connection import ServerConnection
from treepo_trl.fields import server_urls


def test_loggers_get_addresses_without_passwords(tmp_path: Path) -> None:
    address = "http://me:se,cret@a:8000, https://me:se@cret@b:8001/x,http://c:8002/"
    config = make(tmp_path, use_vllm=True, vllm_server_base_url=address)
    assert config.vllm_server_base_url == address
    for text in (config.to_json_string(), str(config.to_dict()), str(config.to_sanitized_dict())):
        assert "cret" not in text
    assert config.to_dict()["vllm_server_base_url"] == "http://a:8000,https://b:8001/x,http://c:8002/"


@pytest.mark.parametrize(
    "address",
    [
        "me:secret@host:8000",
        "http://a:8000,me:secret@b:8000",
        "http://me:se/cret@host",
        "http://me:8000/secret@host",
        "http:/me:secret@host:1",
        "http://me:1,secret@host:8000",
        "http://a:8000, https://b:8000,me:secret@c:8000",
    ],
)
def test_a_mistaken_address_is_an_error_that_shows_no_password(tmp_path: Path, address: str) -> None:
    """Of the setting, where it can be told that early, else of the connection."""
    told = [str(make(tmp_path, vllm_server_base_url=address).to_dict())]
    for read in (
        lambda: server_urls(address, "", 0),
        lambda: make(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=address),
        lambda: [ServerConnection(url) for url in server_urls(address, "", 0)],
    ):
        try:
            read()
        except ValueError as error:
            told += traceback.format_exception(error)
            message = str(error)
    assert "http://host:port" in message or "`%2C`" in message
    for secret in ("secret", "cret@", "me:"):
        assert secret not in "".join(told)


def test_addresses_are_parted_where_the_next_one_begins() -> None:
    addresses = ["http://me:s%2Ccret@a:1", "https://b:2/x", "HTTP://c"]
    for comma in (",", ", ", " ,\n"):
        assert server_urls(comma.join(addresses), "", 0) == addresses
