"""A congestion control that the kernel lacks, or that ordinary users may not use, is reported with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

import frelay.net.sockets
from frelay.net.sockets import objection_to_congestion_control


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that has three, and lets everybody use two of them."""
    (tmp_path / "available").write_text("reno cubic bbr\n")
    (tmp_path / "allowed").write_text("reno cubic\n")
    monkeypatch.setattr(frelay.net.sockets, "_AVAILABLE", tmp_path / "available")
    monkeypatch.setattr(frelay.net.sockets, "_ALLOWED", tmp_path / "allowed")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "objection"),
    [
        ("cubic", None),
        (
            "bbr",
            "may not be used by everybody; "
            'sysctl -w net.ipv4.tcp_allowed_congestion_control="reno cubic bbr" changes that',
        ),
        ("vegas", "is not known to this kernel, which has reno, cubic, bbr; modprobe tcp_vegas may help"),
    ],
)
def test_what_stands_against_it(kernel: Path, name: str, objection: str | None) -> None:
    assert objection_to_congestion_control(name) == objection


def test_a_kernel_that_does_not_say_is_no_consent(kernel: Path) -> None:
    (kernel / "allowed").unlink()
    with pytest.raises(FileNotFoundError):
        objection_to_congestion_control("cubic")
