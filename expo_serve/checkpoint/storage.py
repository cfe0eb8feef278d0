"""What kind of storage a checkpoint lies on."""

from __future__ import annotations

from pathlib import Path

import psutil

_NETWORK_TYPES = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"}
    | {"smb3", "smbfs", "virtiofs", "wekafs"}
)


def is_on_network(path: Path) -> bool:
    """Whether reads of ``path`` travel: a network file system, or one in user space (of a bucket, most often).

    Args:
        path: a file or folder; links are followed.
    """
    real = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    # Of several mounts at one place the last one is seen.
    kind = max(enumerate(mounts), key=lambda item: (len(item[1].mountpoint), item[0]), default=(0, None))[1]
    return kind is not None and (kind.fstype in _NETWORK_TYPES or kind.fstype.startswith("fuse."))
