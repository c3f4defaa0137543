"""Addresses of machines: who reaches one, and where a page is shown. Knows sockets, not what is shown."""

import ipaddress
import os
import socket
from argparse import ArgumentTypeError
from typing import NamedTuple

from parts import terminal


class Address(NamedTuple):
    """Where the page is, and who may see it."""

    host: str
    port: int
    auth: tuple[str, str] | None  # user and password


def user_and_password(text: str) -> tuple[str, str]:
    """Of user:password, for argparse."""
    user, _, password = text.partition(":")
    if not user or not password:
        raise ArgumentTypeError("要写成 用户名:密码")
    return user, password


def is_this_machine(host: str) -> bool:
    """Whether only programs of this machine reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(address: Address) -> None:
    """Raises SystemExit without a password for an address that other machines reach, and where the address is taken or
    not of this machine."""
    host, port, auth = address
    if not auth and not is_this_machine(host):
        raise SystemExit(f"错误：--host {host} 让别的机器也能提问；请同时用 --auth 用户名:密码 设一个密码。")
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family) as trial:
            if os.name != "nt":  # there it would take an address that is taken
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except (OSError, OverflowError) as error:
        raise SystemExit(
            f"错误：{host} 的端口 {port} 用不了（{terminal.first_line(error)}）；请用 --port 换一个端口。"
        ) from None
