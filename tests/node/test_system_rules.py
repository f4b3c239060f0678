"""What is wanted of a system and how it is set: read with care, and never in the way of a program's update."""

from __future__ import annotations

from typing import Any

import pytest

from instar.core.errors import InputError
from instar.core.settings import OsSettings, read_settings
from instar.core.system import ColdBoot, check_mode
from instar.core.wish import read_wanted
from instar.updater.http.system import Asked, read_bundle

DIGEST = "0123456789ab" * 8
OS = {
    "version": "1.1.0",
    "digest": DIGEST,
    "target": "os/lab-1.1.0.bundle",
    "generation": 3,
    "mode": "reboot",
}


def wanted(**system: Any) -> dict[str, Any]:
    agent = {"version": "1.1.0", "digest": DIGEST, "target": "node/x.tar.gz", "generation": 3}
    return {"lines": {"agent": agent, "os": {**OS, **system}}}


def test_wish_for_a_system_is_read() -> None:
    wish = read_wanted(wanted(source="https://h:1/x/lab-1.1.0.bundle", override=True)).system
    assert wish is not None
    assert (wish.release.version, wish.generation, wish.mode, wish.override) == ("1.1.0", 3, "reboot", True)
    assert wish.source == "https://h:1/x/lab-1.1.0.bundle"
    assert read_wanted({"lines": {}}).system is None


@pytest.mark.parametrize(
    "system",
    [
        {"mode": "later"}, {"mode": None}, {"digest": "x"}, {"version": "1"}, {"generation": "many"},
        {"source": "http://h/x"}, {"source": "https://user@h/x"}, {"source": 7}, {"override": "yes"},
    ],
)  # fmt: skip
def test_wish_that_cannot_be_read_keeps_no_program_waiting(system: dict[str, Any]) -> None:
    found = read_wanted(wanted(**system))
    assert [wish.line for wish in found.wishes] == ["agent"]
    assert found.system is None
    assert "cannot" in found.fault


@pytest.mark.parametrize("system", [None, [], "x", {}])
def test_strange_system_spoils_nothing(system: Any) -> None:
    found = read_wanted({"lines": {**wanted()["lines"], "os": system}})
    assert [wish.line for wish in found.wishes] == ["agent"]
    assert bool(found.fault) is (system is not None)


def test_cold_boot_is_read() -> None:
    assert read_wanted({"lines": {}, "cold_boot": {"generation": 4, "at": 7}}).cold_boot == ColdBoot(4, 7.0)


@pytest.mark.parametrize(
    "said",
    [{}, {"generation": 4}, {"generation": 4, "at": "soon"}, {"generation": 4, "at": float("nan")}, []],
)
def test_cold_boot_that_cannot_be_read_spoils_nothing(said: Any) -> None:
    found = read_wanted({"lines": {}, "cold_boot": said})
    assert (found.cold_boot, bool(found.fault)) == (None, True)


def test_activation_must_be_named() -> None:
    assert check_mode("kexec") == "kexec"
    for bad in (None, "", "REBOOT", 1):
        with pytest.raises(InputError) as error:
            check_mode(bad)
        assert error.value.code == "invalid-argument"


@pytest.mark.parametrize(
    ("said", "target", "source"),
    [
        ({"bundle": "lab-1.1.0"}, "os/lab-1.1.0.bundle", ""),
        ({"bundle": "lab-x-1.1.0-rc1"}, "os/lab-x-1.1.0-rc1.bundle", ""),
        ({"bundle": "os/lab-1.1.0.bundle"}, "os/lab-1.1.0.bundle", ""),
        ({"target": "os/lab-1.1.0.bundle"}, "os/lab-1.1.0.bundle", ""),
        (
            {"bundle": "https://h/d/lab-1.1.0.bundle?t=1"},
            "os/lab-1.1.0.bundle",
            "https://h/d/lab-1.1.0.bundle?t=1",
        ),
    ],
)
def test_bundle_has_three_names(said: dict[str, Any], target: str, source: str) -> None:
    assert read_bundle(said) == Asked(target, source)


@pytest.mark.parametrize(
    "name",
    [
        "", "lab", "1.1.0", "lab-1.1", "a/b-1.1.0", "os/../lab-1.1.0.bundle", "os/x/lab-1.1.0.bundle", "os/lab-1.1.0",
        "lab-1.1.0\n", "lab 1-1.1.0", "https://h/lab.bundle", "https://h/lab-1.1.0", "https:///lab-1.1.0.bundle",
        "https://h/..%2Flab-1.1.0.bundle", "https://h/%00lab-1.1.0.bundle", "ftp://h/lab-1.1.0.bundle",
        "https://[x/lab-1.1.0.bundle", "-1.1.0",
    ],
)  # fmt: skip
def test_other_names_are_no_bundles(name: str) -> None:
    with pytest.raises(InputError) as error:
        read_bundle({"bundle": name})
    assert error.value.code == "invalid-argument"


def test_settings_of_the_slots() -> None:
    assert read_settings({}).os == OsSettings()
    said = {
        "disk": "/dev/vda",
        "slots": ["x", "y"],
        "esp": "/boot/efi",
        "answer_s": 3,
        "min_bundle_version": "1.0.0",
    }
    found = read_settings({"os": said}).os
    assert (found.disk, found.slots, found.answer_s) == ("/dev/vda", ("x", "y"), 3.0)
    assert read_settings({"os": {"disk": ""}}).os.disk == ""


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"disk": "vda"}, "os.disk"),
        ({"esp": "efi"}, "os.esp"),
        ({"esp": ""}, "os.esp"),
        ({"slots": ["a"]}, "os.slots"),
        ({"slots": ["a", "a"]}, "os.slots"),
        ({"slots": ["a", ""]}, "os.slots"),
        ({"slots": ["a", 1]}, "os.slots"),
        ({"slots": "ab"}, "os.slots"),
        ({"slots": ["a", "b" * 37]}, "os.slots"),
        ({"min_bundle_version": "new"}, "os.min_bundle_version"),
        ({"answer_s": -1}, "os.answer_s"),
        ({"disc": "/dev/vda"}, "'disc'"),
    ],
)
def test_bad_setting_of_the_slots_is_named(said: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        read_settings({"os": said})
    assert named in error.value.text
