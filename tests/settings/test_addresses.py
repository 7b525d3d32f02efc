"""Addresses of servers: how they are parted, and that no password of one is ever shown."""

import pickle
import traceback
from pathlib import Path

import pytest

from tests.support.config import make
from treepo_trl.servers.connection import ServerConnection
from treepo_trl.settings import server_urls


def test_no_setting_holds_a_password(tmp_path: Path) -> None:
    """Loggers, callbacks and checkpoints read settings in many ways; connections of this process have it."""
    address = "http://me:se%2Ccret@a:8000, https://me:se%40cret@b:8001/x/,http://c:8002/"
    config = make(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=address)
    assert config.vllm_server_base_url == "http://a:8000,https://b:8001/x,http://c:8002"
    again = make(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=config.vllm_server_base_url)
    again.vllm_server_base_url = again.vllm_server_base_url.replace("http://a", "http://me:secret@a")
    seen = [repr(again), str(again), again.to_json_string(), str(again.to_sanitized_dict()), str(vars(again))]
    assert all("a:8000" in text and "cret" not in text for text in seen)
    assert b"cret" not in pickle.dumps(again)  # as in `training_args.bin`
    urls = server_urls(again.vllm_server_base_url, "", 0)
    assert urls == ["http://me:secret@a:8000", "https://me:se%40cret@b:8001/x", "http://c:8002"]
    assert ServerConnection(urls[0]).url == "http://a:8000"


def test_a_host_holds_no_password(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`vllm_server_host` must be a name or an address alone") as error:
        make(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_host="me:secret@host")
    assert "secret" not in str(error.value)


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
    told = []
    for read in (
        lambda: make(tmp_path, vllm_server_base_url=address),
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
