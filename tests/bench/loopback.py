"""What a bench of the fetcher needs around it: one nginx worker on loopback, a command measured with its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36

_CONFIG = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit; {user}
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_timeout 60; keepalive_requests 1000000;
  types {{ image/jpeg jpg; text/plain txt; }}
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {root}; }}
}}
"""


@contextlib.contextmanager
def nginx(root: Path) -> Iterator[str]:
    """Serve `root`; gives `http://127.0.0.1:<port>`. One worker, no log, sendfile, keep-alive."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        user = "user root;" if os.getuid() == 0 else ""
        config = Path(folder, "nginx.conf")
        config.write_text(_CONFIG.format(folder=folder, port=port, root=root.resolve(), user=user), encoding="utf-8")
        server = subprocess.Popen([program, "-p", folder, "-c", str(config), "-e", f"{folder}/error.log"])
        try:
            _wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGQUIT)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(port: int) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/robots.txt", timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nginx does not answer on port {port}")


@dataclass
class Measured:
    """One command: wall seconds; CPU seconds (user and system) of it and all its children; peak memory in MB.

    `largest_mb` is the peak resident memory (VmHWM) of its largest process, `processes_mb` that of each by pid.
    `output` is what it printed, both streams.
    """

    seconds: float
    cpu_s: float
    exit_code: int
    output: str
    processes_mb: dict[int, float] = field(default_factory=dict)

    @property
    def largest_mb(self) -> float:
        return max(self.processes_mb.values(), default=0.0)


def measured(command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 3600) -> Measured:
    """Run it to its end. Children that it leaves behind are waited for too, or their CPU time would be lost."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        stop, peaks = threading.Event(), dict[int, float]()
        watcher = threading.Thread(target=_watch, args=(process.pid, stop, peaks))
        watcher.start()
        try:
            code = process.wait(timeout_s)
        finally:
            if process.poll() is None:
                process.kill()
            seconds = time.perf_counter() - started
            stop.set()
            watcher.join()
        _reap(set(peaks))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        sink.seek(0)
        output = sink.read()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu_s, code, output, peaks)


def _watch(root: int, stop: threading.Event, peaks: dict[int, float]) -> None:
    while not stop.wait(0.2):
        for pid in descendants(root):
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                peaks[pid] = max(peaks.get(pid, 0.0), int(line.split()[1]) * 1024 / 1e6)


def descendants(root: int) -> list[int]:
    """Pids of a process and of all below it."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
                children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def _reap(pids: set[int]) -> None:
    """Wait for what the command left behind, 20 s at most."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ours = [pid for pid in pids & set(descendants(os.getpid())) if pid != os.getpid()]
        if not ours:
            return
        for pid in ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)
