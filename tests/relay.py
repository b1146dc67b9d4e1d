"""Moves frames between two TAP devices after a delay: the delay of a link where the kernel has no netem.

    python relay.py TAP_A TAP_B DELAY_MS

Frames keep their order. TCP hands over segments of up to 64 KiB whole, as to a network card that cuts them itself, and
so they pass: a frame of 1,500 bytes at a time would cost this process half a core at 400 Mbit/s. It says "ready" when
it holds both devices, and runs until it is killed.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

# linux/if_tun.h. With VNET_HDR every frame is led by a header that says how it is to be cut and summed.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_CHECKSUM, _TCP_SEGMENTS = 0x01, 0x02
_FRAME_BYTES = 2 * 65_536  # more than the longest segment with its headers


def open_tap(name: str) -> int:
    """A descriptor that reads and writes whole frames of the device, which is made if it is not there."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _CHECKSUM | _TCP_SEGMENTS)
    return descriptor


def relay(ends: tuple[int, int], delay_s: float) -> None:
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: deque[tuple[float, int, bytes]] = deque()  # one delay for all, so the first in is the first out
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select(ends, (), (), left_s)  # poll would round up to whole milliseconds
        for end in readable:
            while True:
                try:
                    frame = os.read(end, _FRAME_BYTES)
                except BlockingIOError:
                    break
                waiting.append((time.monotonic() + delay_s, other[end], frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, end, frame = waiting.popleft()
            os.write(end, frame)


if __name__ == "__main__":
    taps = (open_tap(sys.argv[1]), open_tap(sys.argv[2]))
    print("ready", flush=True)
    relay(taps, float(sys.argv[3]) / 1000)
