"""Network file systems are told by their mounts."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from expo_serve.checkpoint.source import is_on_network


def test_a_folder_here_is_not_on_a_network(tmp_path: Path) -> None:
    assert not is_on_network(tmp_path)


@pytest.mark.parametrize(
    ("kind", "found"), [("nfs4", True), ("fuse.bucket", True), ("ext4", False), ("fuseblk", False)]
)
def test_the_nearest_mount_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, found: bool) -> None:
    part = psutil.disk_partitions(all=True)[0]
    here = part._replace(mountpoint=str(tmp_path.resolve()), fstype=kind)
    mounts = [part._replace(mountpoint="/", fstype="ext4"), here]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert is_on_network(tmp_path / "link") is found
    assert not is_on_network(tmp_path.parent)


def test_of_two_mounts_at_one_place_the_last_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = psutil.disk_partitions(all=True)[0]._replace(mountpoint=str(tmp_path.resolve()))
    mounts = [part._replace(fstype="autofs"), part._replace(fstype="nfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert is_on_network(tmp_path)
