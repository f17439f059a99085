"""What launch/grpo.sh asks about machines.

nodes.py address HOST N             prints the address of the head of N nodes, and `here` or `elsewhere`
nodes.py wait HOST:PORT N SECONDS   returns once N nodes are in the Ray cluster
nodes.py member HOST:PORT           succeeds where this machine is a node of that Ray cluster
nodes.py end SESSION                kills what is left of a session of processes

Exit status: 0, or 2 with a message; 1 from `member`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time

import psutil


def _own_addresses() -> set[str]:
    return {a.address for device in psutil.net_if_addrs().values() for a in device if a.family == socket.AF_INET}


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _outward() -> str:
    """This machine's address on its default route. Nothing is sent: connecting a datagram socket only looks it up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))  # an address that RFC 5737 gives to nobody
        return probe.getsockname()[0]


def address(host: str, nodes: int) -> str:
    """The IPv4 address by which all nodes reach `host`, and whether it is this machine's."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
    except OSError as error:
        sys.exit(_refuse(f"the head's address {host!r} is not known here ({error}); give its IP address"))
    assert isinstance(found, str)
    if _is_loopback(found):
        # Debian's /etc/hosts gives a machine's own name a loopback address, which no other machine can use.
        if _is_loopback(host) or host.partition(".")[0] == "localhost":
            if nodes == 1:
                return f"{found} here"
            sys.exit(
                _refuse(f"--head-address {host} is loopback; give the address by which other nodes reach the head")
            )
        try:
            found = _outward()
        except OSError:
            sys.exit(_refuse(f"{host!r} is {found} on this machine, which has no other address; give its IP address"))
    return f"{found} {'here' if found in _own_addresses() else 'elsewhere'}"


def wait(cluster: str, nodes: int, seconds: float) -> int:
    """Print each node as it joins."""
    import ray

    try:
        ray.init(cluster, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        return _refuse(f"Ray at {cluster} does not let this node in: {str(error).strip().splitlines()[-1]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # Ray's own handler prints its stack
    until = time.monotonic() + seconds
    seen: dict[str, str] = {}
    while True:
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for number in alive.keys() - seen.keys():
            node = alive[number]
            seen[number] = node["NodeManagerAddress"]
            has = ", ".join(f"{node['Resources'].get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
            print(f"grpo: node {len(seen)} of {nodes}: {seen[number]}, {has}", file=sys.stderr, flush=True)
        if len(alive) >= nodes:
            return 0
        if time.monotonic() > until:
            here = ", ".join(seen[number] for number in alive)
            return _refuse(
                f"{len(alive)} of {nodes} nodes came within {seconds:g} s ({here}); run this command on the others "
                f"too, see whether they reach {cluster}, or give --timeout more seconds"
            )
        time.sleep(0.5)


def member(cluster: str) -> bool:
    raylets = (p.info["cmdline"] or () for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "raylet")
    return any(f"--gcs-address={cluster}" in words for words in raylets)


def end(session: int) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # it ended
            if os.getsid(process.pid) == session:
                process.kill()


def _refuse(message: str) -> int:
    print(f"grpo: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["address", host, nodes]:
            print(address(host, int(nodes)))
        case ["wait", cluster, nodes, seconds]:
            sys.exit(wait(cluster, int(nodes), float(seconds)))
        case ["member", cluster]:
            sys.exit(not member(cluster))
        case ["end", session]:
            end(int(session))
        case _:
            sys.exit(__doc__)
