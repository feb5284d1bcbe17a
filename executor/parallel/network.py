"""Nodes on one machine: network namespaces joined by a pair of virtual links whose rate is limited, fast inside and slow between.

Modelled: each node is a namespace without a name, held by a process that ends with this one; ranks enter it. What goes to another
node passes the pair of links, each end of which sends at most the rate; what stays in a node passes its loopback interface. All of it
vanishes with the processes. Two nodes; needs the rights to make namespaces (root, or CAP_SYS_ADMIN and CAP_NET_ADMIN) and the programs
unshare, nsenter, ip and tc. Ignored: latency of a real switch, loss.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...base.errors import InputError

_PROGRAMS = ("unshare", "nsenter", "ip", "tc")
_LINK = "moeplan0"
_WAIT_S = 5.0
# A token bucket sends what it holds at once, whatever the rate: it must be small beside what is exchanged, or small exchanges meet no limit
# at all. It cannot be smaller than a packet, and virtual links make packets of 64 KiB unless told otherwise.
_PACKET_BYTES = 8 * 1024
_BURST_BYTES = 2 * _PACKET_BYTES


class Unavailable(Exception):
    """This machine gives no namespaces; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Two nodes that are up."""

    holders: tuple[int, ...]
    """The process that holds each node's namespace."""
    interface: str
    bytes_per_s: float
    """Between the nodes, one direction."""

    def enter(self, node: int) -> list[str]:
        """Return the words before a command that runs it in a node."""
        return ["nsenter", "--target", str(self.holders[node]), "--net", "--"]

    def cut(self, node: int) -> None:
        """Take a node's link down."""
        _call([*self.enter(node), "ip", "link", "set", _LINK, "down"])


@contextlib.contextmanager
def two_nodes(bytes_per_s: float) -> Iterator[Nodes]:
    """Return a context in which two nodes exist; raises Unavailable, with the reason, where the system permits none."""
    if not bytes_per_s > 0:
        raise InputError("bytes_per_s", bytes_per_s, "not a rate", "give one above zero")
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"{missing[0]} is not installed")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(2):
            holder = subprocess.Popen(
                ["unshare", "--net", "cat"],  # noqa: S607 - found on the path, as a shell would
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            holders.append(holder)
        for holder in holders:
            _await_namespace(holder)
        nodes = Nodes(holders=tuple(holder.pid for holder in holders), interface=_LINK, bytes_per_s=bytes_per_s)
        _join(nodes)
        yield nodes
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            for stream in (holder.stdin, holder.stderr):
                if stream is not None:
                    stream.close()


@functools.cache
def why_unavailable() -> str | None:
    """Return why this machine gives no two nodes, None where it does."""
    try:
        with two_nodes(1e6):
            return None
    except Unavailable as reason:
        return str(reason)


def _await_namespace(holder: subprocess.Popen[bytes]) -> None:
    """Return once a holder has a namespace of its own; raises Unavailable where it gets none."""
    mine = os.readlink("/proc/self/ns/net")
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        if holder.poll() is not None:
            said = b"" if holder.stderr is None else holder.stderr.read()
            raise Unavailable(said.decode(errors="replace").strip() or "unshare ended")
        with contextlib.suppress(OSError):
            if (
                os.readlink(f"/proc/{holder.pid}/ns/net") != mine
                and "cat" in Path(f"/proc/{holder.pid}/comm").read_text()
            ):
                return
        time.sleep(0.01)
    raise Unavailable("no namespace came up")


def _join(nodes: Nodes) -> None:
    """Join the two namespaces and limit the rate of both ends."""
    first, second = nodes.holders
    _call(
        ["ip", "link", "add", _LINK, "netns", str(first), "type", "veth", "peer", "name", _LINK, "netns", str(second)]
    )
    for node in range(2):
        enter = nodes.enter(node)
        _call([*enter, "ip", "link", "set", "lo", "up"])
        _call([*enter, "ip", "address", "add", f"10.231.77.{node + 1}/24", "dev", _LINK])
        _call(
            [*enter, "ip", "link", "set", _LINK, "gso_max_size", str(_PACKET_BYTES), "gro_max_size", str(_PACKET_BYTES)]
        )
        _call([*enter, "ip", "link", "set", _LINK, "up"])
        rate = f"{round(nodes.bytes_per_s * 8)}bit"
        _call([*enter, "tc", "qdisc", "add", "dev", _LINK, "root", "tbf", "rate", rate, "burst", str(_BURST_BYTES), "limit",
               str(64 * 1024 * 1024)])  # fmt: skip


def _call(command: Sequence[str]) -> None:
    """Run a command; raises Unavailable with its last line where it fails."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=_WAIT_S)  # noqa: S603
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"{' '.join(command[-4:])}: {lines[-1] if lines else 'failed'}")
