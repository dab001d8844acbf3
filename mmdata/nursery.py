"""A process that has mmdata loaded and makes worker processes by forking: loaded once, in a fraction of a second each.

In: one end of a socket for each worker that is wanted. Out: a process that reads it (`process_worker.main`), and, when
it has ended, how. The nursery is a fresh Python: it shares no thread, no lock and no module of the driver's script, so
that a script needs no `if __name__ == "__main__"` and a notebook works. It has one thread, which makes forking safe.

No orphans: the nursery ends when its driver has (end of the socket, or another parent), its workers when it has (the
kernel's signal on a parent's death), or already when their own socket ends. Nursery and workers stand in a process
group of their own and ignore SIGINT and SIGTERM: Ctrl-C and a polite kill are the driver's, and it tells them.

`prestart` at the head of a command lets it load while the command reads its recipe.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable

__all__ = ["Nursery", "main", "prestart", "take"]

_ENDED = struct.Struct("<ii")  # pid, exit status as subprocess gives it: -n = killed by signal n
_LOOK_S = 1.0
_PR_SET_PDEATHSIG = 1
# Read by libraries when they are loaded; the other limits of a worker are in `worker_limits`.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}


class Nursery:
    """The driver's side. Not for several threads at once, but for `fate`."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            # Its own sys.path is what this process has, so that both find the same mmdata and the same plugins.
            start = "import sys; sys.path[:] = sys.argv[2:]; from mmdata.nursery import main; main(int(sys.argv[1]))"
            command = [sys.executable, "-c", start, str(theirs.fileno()), *sys.path]
            self._process = subprocess.Popen(
                command,
                env={**_ENVIRONMENT, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a command answers is the driver's alone
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        self._socket = mine
        self._fates: dict[int, int] = {}
        self._read = b""

    @property
    def is_alive(self) -> bool:
        """Whether workers can be had of it."""
        return self._process.poll() is None

    def fork(self, end: socket.socket) -> None:
        """Start a worker on this end of a socket, which is closed here; where none comes up, the socket just ends."""
        with end, contextlib.suppress(OSError):
            socket.send_fds(self._socket, [b"f"], [end.fileno()])

    def fate(self, pid: int, within_s: float = 1.0) -> str:
        """How this worker ended, in words, as soon as it is known."""
        until = time.monotonic() + within_s
        while pid not in self._fates and (left := until - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                break
            if not (data := self._socket.recv(4096)):
                break
            self._read += data
            whole = len(self._read) // _ENDED.size * _ENDED.size
            self._fates.update(_ENDED.iter_unpack(self._read[:whole]))
            self._read = self._read[whole:]
        return _words(self._fates.pop(pid, None))

    def close(self) -> None:
        """End it, and with it every worker that is left."""
        self._socket.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _words(status: int | None) -> str:
    if status is None:
        return "its end was not seen"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


_waiting: list[Nursery] = []


def prestart() -> None:
    """Start a nursery that the next `take` returns."""
    if not _waiting:
        _waiting.append(Nursery())
        atexit.register(_close_waiting)


def take() -> Nursery:
    """The one that was started in advance, else a new one."""
    return _waiting.pop() if _waiting else Nursery()


def _close_waiting() -> None:
    while _waiting:
        _waiting.pop().close()


# The other side


def main(descriptor: int) -> None:
    """The nursery itself, until its driver has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    driver = os.getppid()
    control = socket.socket(fileno=descriptor)
    # An ended child makes select return at once.
    wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    from mmdata import process_worker, worker_limits

    worker_limits.limit_worker()
    later = [process_worker.load_opencv, process_worker.load_pandas]
    gc.freeze()  # so that workers share these pages, whatever their collectors look at
    with contextlib.suppress(ConnectionError):  # the driver ended with something unread
        _serve(control, (wake, woken), driver, later)
    os._exit(0)  # the interpreter's own end would take apart what workers share


def _serve(control: socket.socket, pipe: tuple[int, int], driver: int, later: list[Callable[[], None]]) -> None:
    wake, _ = pipe
    while os.getppid() == driver:
        ready = select.select([control.fileno(), wake], [], [], 0 if later else _LOOK_S)[0]
        if wake in ready:
            os.read(wake, 512)
            _report_ended(control)
        if control.fileno() in ready:
            _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not descriptors:
                break
            _fork(control, [control.fileno(), *pipe], descriptors[0])
        elif later and not ready:
            later.pop()()  # nobody asks for a worker yet: load what workers will soon need
            gc.freeze()


def _report_ended(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with contextlib.suppress(OSError):
            control.sendall(_ENDED.pack(pid, os.waitstatus_to_exitcode(status)))


def _fork(control: socket.socket, others: list[int], descriptor: int) -> None:
    nursery = os.getpid()
    if os.fork():
        os.close(descriptor)
        return
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nursery:  # else it died before the kernel was asked to watch it
            control.detach()
            for other in others:
                os.close(other)
            from mmdata import process_worker

            process_worker.main(descriptor)
            code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        # Not through the interpreter's end: threads that hang in foreign code must not keep the process.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)
