"""Only its owner may read a private key; or root owns it and a group of the relay may read it, as with fsGroup."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import pytest

from frelay.pki.key_mode import objection_to_mode, own_groups

ROOT, SOMEBODY = 0, 1000770
OURS, THEIRS = 5000, 6000
KEY: Final = Path("/etc/frelay/relay.key")


def facts(mode: int, uid: int, gid: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
@pytest.mark.parametrize("uid", [ROOT, SOMEBODY])
def test_what_its_owner_alone_can_read_is_accepted(mode: int, uid: int) -> None:
    assert objection_to_mode(facts(mode, uid, THEIRS), KEY, {OURS}) is None


@pytest.mark.parametrize("mode", [0o440, 0o640, 0o040])
def test_roots_key_may_be_read_by_one_group_of_ours(mode: int) -> None:
    assert objection_to_mode(facts(mode, ROOT, OURS), KEY, {1, OURS}) is None


@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_a_group_of_others_is_refused_with_its_number(mode: int) -> None:
    said = objection_to_mode(facts(mode, ROOT, THEIRS), KEY, {OURS})
    assert said is not None
    assert f"has mode {mode:04o}, others can read it; chmod 600 {KEY}" in said
    assert f"group {THEIRS}" in said


@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_the_key_of_another_user_is_its_owners_alone(mode: int) -> None:
    """The owner of a file can give it to any of its own groups, and may be a user who must not have the relay's key."""
    assert objection_to_mode(facts(mode, SOMEBODY, OURS), KEY, {OURS}) is not None


@pytest.mark.parametrize("mode", [0o660, 0o620, 0o644, 0o444, 0o641, 0o650, 0o750, 0o604, 0o777])
def test_anything_wider_is_refused(mode: int) -> None:
    said = objection_to_mode(facts(mode, ROOT, OURS), KEY, {OURS})
    assert said is not None
    assert f"chmod 600 {KEY}" in said


def test_without_a_word_the_groups_are_those_of_this_process() -> None:
    assert {os.getegid(), *os.getgroups()} == own_groups()
    assert objection_to_mode(facts(0o640, ROOT, os.getegid()), KEY) is None
    assert objection_to_mode(facts(0o640, ROOT, max(own_groups()) + 1), KEY) is not None
