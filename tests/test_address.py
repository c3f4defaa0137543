"""Where a page is shown: what is refused before anything is loaded."""

import argparse
import socket

import pytest
from helpers import refused

from parts import address
from parts.address import Address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "my-machine", ""])
def test_others_are_let_in_with_a_password_only(host):
    message = f"--host {host} 让别的机器也能提问；请同时用 --auth 用户名:密码 设一个密码。"
    refused(message, address.check, Address(host, 7860, None))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_that_is_taken_is_refused(host):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(f"{host} 的端口 {port} 用不了（~）；请用 --port 换一个端口。", address.check, Address(host, port, None))
    address.check(Address(host, port, None))
    address.check(Address("0.0.0.0", port, ("医生", "a:b")))


def test_an_address_that_cannot_be_is_refused():
    refused(
        "127.0.0.1 的端口 70000 用不了（~）；请用 --port 换一个端口。", address.check, Address("127.0.0.1", 70000, None)
    )
    # Of a block that stands for nothing but examples: RFC 5737.
    refused("192.0.2.1 的端口 7860 用不了（~", address.check, Address("192.0.2.1", 7860, ("a", "b")))


def test_user_and_password():
    assert address.user_and_password("医生:a:b") == ("医生", "a:b")
    for text in ("医生", "医生:", ":a", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="^要写成 用户名:密码$"):
            address.user_and_password(text)
