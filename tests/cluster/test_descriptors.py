"""Without file descriptors a front or a proxy does without new sockets, and lives: libzmq ends a process that has none for its threads."""

import subprocess
import sys

SCRIPT = """
import asyncio, os, resource, tempfile
from types import SimpleNamespace
import zmq
from cluster.bypass import Receiver, Sender, SocketUnavailable
from cluster.channel import Address, shared_context
from cluster.transport import ZmqTransport

record = SimpleNamespace(address=Address(node="here", ipc="ipc:///tmp/nobody"), guest_keys=None)


async def main():
    ends = {"receiver": Receiver, "sender": lambda: Sender("ipc:///tmp/nobody"), "wire": lambda: ZmqTransport(record, node="here")}
    tempfile.tempdir = "/tmp"
    shared_context()
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    for name, make in ends.items():
        for left in range(14):
            held = []
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                while len(held) and left:
                    os.close(held.pop())
                    left -= 1
            try:
                end = make()
            except (SocketUnavailable, zmq.ZMQError):
                made = False
            else:
                made = True
                closed = end.close()
                if closed is not None:
                    await closed
            for each in held:
                os.close(each)
            await asyncio.sleep(0.01)
        print(name, made)


asyncio.run(main())
"""


def test_whatever_number_of_descriptors_is_left_no_end_of_a_socket_takes_the_process_with_it() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["receiver", "True", "sender", "True", "wire", "True"]
