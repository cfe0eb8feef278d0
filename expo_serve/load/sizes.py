"""Every size by which a load cuts its work, with the reason for it. Measurements: docs/performance.md#sizes.

A copy into a parameter is cut three times: into blocks that are handed to threads, into pieces that are combined while
they are in the processor's cache, and, below that, into whatever a compiled loop keeps in registers.

==========================  =========  ================================================================================
size                        value      reason
==========================  =========  ================================================================================
``BLOCK_BYTES``             8 MiB      Handed to a thread at a time: handing over costs nothing beside it, and the
                                       threads go through both files side by side and finish together.
``JOINED_BYTES``            4 MiB      Smaller blocks are handed over together, until they have this size: a thread
                                       takes the GIL once for all of them.
``PENDING_BYTES``           256 MiB    Handed over and not done. Costs no memory; keeps an error near its cause.
``PIECE_BYTES``             2 MiB      Of each operand, combined at a time by torch: operands and result stay in the
                                       cache, and Python's share stays small. Also the smallest read buffer.
``STREAM_PIECE_BYTES``      L2 / 4     Of each operand, read and combined at a time by the compiled loop: both and the
                                       results stay in the L2 cache.
``MAPPED_PIECE_BYTES``      256 KiB    Of each operand, mapped at a time: a call costs nothing beside it, and the pages
                                       are there just before they are read.
``LOW_RANK_PIECE_BYTES``    256 KiB    Of base, read before a low-rank product is added: stays in the L2 cache.
``FETCH_PIECE_BYTES``       256 KiB    Of a packed delta's base, read before it is added to the checksum: the same.
``MEASURED_PIECE_BYTES``    256 KiB    Of each side, read and counted at a time by ``inspect --measure``: the same.
``REQUEST_BYTES``           1 MiB      Asked of the kernel by one read call.
``READ_AHEAD_BYTES``        1 MiB      The same for the threads that bring cold files into the page cache.
``STAGE_BYTES``             16 MiB     Of all operands in each turn of device staging: copying it takes the link far
                                       longer than starting the copy.
``STAGE_TURNS``             6          Two for what was not expected, of which one is read while the other is copied
                                       and combined; the others hold what is read ahead.
``ANNOUNCED_TENSORS``       128        Tensors that exist before the model asks for them: what it will take of them
                                       can be read ahead, with experts of 0.4 MB for all turns.
``MAX_DEVICE_SHARE``        1/64       Of a device's memory for all staging buffers together.
``PACKED_SPAN_BYTES``       8 MiB      Decoded at a time where elements are scattered over the blocks of a packed delta.
``LOW_RANK_BOX_VALUES``     2 Mi       Of a low-rank product, computed at a time where elements are scattered.
``MAX_SPREAD``              3          Bytes read for each byte wanted, at most, where single elements are scattered.
==========================  =========  ================================================================================

Read these as attributes of the module (``sizes.BLOCK_BYTES``), so that a test can set one.
"""

from __future__ import annotations

import os

_USUAL_L2_BYTES = 1 << 20


def _l2_share(parts: int) -> int:
    """Return a part of a core's L2 cache in bytes, a power of two from 128 KiB to 1 MiB."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (OSError, ValueError):  # not Linux, or not a C library that tells
        size = 0
    share = (size if size > 0 else _USUAL_L2_BYTES) // parts
    return min(max(1 << (share.bit_length() - 1), 128 << 10), 1 << 20)


BLOCK_BYTES = 8 << 20
JOINED_BYTES = 4 << 20
PENDING_BYTES = 256 << 20
PIECE_BYTES = 2 << 20
STREAM_PIECE_BYTES = _l2_share(4)
MAPPED_PIECE_BYTES = 256 << 10
LOW_RANK_PIECE_BYTES = 256 << 10
FETCH_PIECE_BYTES = 256 << 10
MEASURED_PIECE_BYTES = 256 << 10
REQUEST_BYTES = 1 << 20
READ_AHEAD_BYTES = 1 << 20
STAGE_BYTES = 16 << 20
STAGE_TURNS = 6
ANNOUNCED_TENSORS = 128
MAX_DEVICE_SHARE = 64
PACKED_SPAN_BYTES = 8 << 20
LOW_RANK_BOX_VALUES = 2 << 20
MAX_SPREAD = 3
