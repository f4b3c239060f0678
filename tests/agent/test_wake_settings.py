"""Whom a node lets wake it: networks, and what its settings may say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError
from instar.core.networks import PRIVATE, WakeSettings, is_in, network
from instar.core.settings import read_settings
from instar.host.config import has_settings
from instar.host.layout import Layout


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
        ("172.16.0.0/12", "172.31.255.255", "172.32.0.0"),
        ("192.168.1.5", "192.168.1.5", "192.168.1.4"),
        ("0.0.0.0/0", "8.8.8.8", "::2"),
        ("::/0", "2001:db8::1", "8.8.8.8"),
        ("fe80::/10", "fe80::1%eth0", "fec0::1"),
        ("fc00::/7", "fdff:1:2:3:4:5:6:7", "fe00::"),
        ("127.0.0.0/8", "::ffff:127.0.0.9", "::127.0.0.9"),
        ("2001:db8:0:0:1::/80", "2001:db8::1:2:3:4", "2001:db8::2:2:3:4"),
    ],
)
def test_networks(text: str, inside: str, outside: str) -> None:
    assert is_in(inside, [network(text)])
    assert not is_in(outside, [network(text)])


def test_addresses_are_read_as_the_standard_library_reads_them() -> None:
    import ipaddress

    chance = random.Random(7)
    for _ in range(3000):
        six = ipaddress.IPv6Address(
            chance.getrandbits(128) & chance.getrandbits(128) & chance.getrandbits(128)
        )
        bits = chance.randrange(129)
        wide = ipaddress.IPv6Network((six, bits), strict=False)
        other = ipaddress.IPv6Address(int(six) ^ (1 << chance.randrange(128)))
        for form in (str(six), six.exploded):
            assert is_in(form, [network(str(wide))])
        if other.ipv4_mapped is None:
            assert is_in(str(other), [network(str(wide))]) == (other in wide)


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/8/8", "10.0.0.1/8", "10.0.0", "256.0.0.0/8",
        "010.0.0.0/8", "1.2.3.4.5", "::1/129", ":::", "1::2::3", "12345::", "fe80::1%eth0", "::1.2.3", "1:2:3:4:5:6:7",
        "1:2:3:4:5:6:7:8:9", ":1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8::", "localhost", "10.0.0.0/٣", "1.2.3.4::",
        "fd00::/٨", "10.0.0.0/0000000000000000008",
    ],
)  # fmt: skip
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(InputError) as caught:
        network(text)
    assert caught.value.code == "bad-network"


def test_settings() -> None:
    assert read_settings({}).wake == WakeSettings(7611, PRIVATE, 1.0)
    wake = read_settings({"wake": {"port": 0, "trusted": ["10.1.0.0/16", "::1"], "every_s": 5}}).wake
    assert wake == WakeSettings(0, ("10.1.0.0/16", "::1"), 5.0)
    assert read_settings({"wake": {"trusted": []}}).wake.trusted == ()


@pytest.mark.parametrize(
    ("wake", "named"),
    [
        ({"port": -1}, "wake.port"),
        ({"port": 70000}, "wake.port"),
        ({"port": "7611"}, "wake.port"),
        ({"every_s": 0}, "wake.every_s"),
        ({"trusted": "10.0.0.0/8"}, "a list of texts"),
        ({"trusted": [1]}, "a list of texts"),
        ({"trusted": ["10.0.0.1/8"]}, "wake.trusted"),
        ({"trusted": ["::1"] * 1000}, "at most 256"),
        ({"who": 1}, "[wake]"),
    ],
)
def test_settings_that_cannot_be(wake: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        read_settings({"wake": wake})
    assert named in caught.value.text


def test_config_as_installed_needs_no_parser(tmp_path: Path) -> None:
    from instar.cli.install import CONFIG

    layout = Layout(tmp_path)
    layout.config.write_text(CONFIG)
    assert "[wake]" in CONFIG
    assert not has_settings(layout)
    layout.config.write_text(CONFIG.replace("# port", "port"))
    assert has_settings(layout)
