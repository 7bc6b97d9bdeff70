"""Run wordcount.py on this machine: a CA, a relay with one route, and N workers with certificates of their own.

    python start.py --workers 4 FILE...

It needs the ``frelay`` command on the PATH or beside this Python. Everything that it makes is in a temporary directory.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent

# One route for the whole group: any rank may be either of the two parties. The relay decides by key who meets whom.
ROUTE = """
[relay]
name = "relay-1"

[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "certs/ca.pem"

[[group]]
name = "ranks"
parties = ["dns:*.wordcount"]

[[route]]
name = "wordcount"
listen = "127.0.0.1:{port}"
func1 = "group:ranks"
func2 = "group:ranks"
"""


def frelay_command() -> str:
    """The ``frelay`` command of this Python, or the one on the PATH."""
    beside = Path(sys.executable).with_name("frelay")
    found = str(beside) if beside.exists() else shutil.which("frelay")
    if found is None:
        sys.exit("start.py: there is no frelay command: pip install frelay")
    return found


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def prepare(directory: Path, frelay: str, workers: int, port: int) -> None:
    """Write a CA, a certificate for the relay and for each rank, and the route file."""
    certs = directory / "certs"
    certs.mkdir()
    commands = [["init", certs], ["relay", "relay", "--dns", "localhost", "--ca", certs]]
    for rank in range(workers):
        commands.append(["party", f"rank{rank}", "--dns", f"rank{rank}.wordcount", "--ca", certs])
    for command in commands:
        done = subprocess.run([frelay, "ca", *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"start.py: {done.stderr}")
    (directory / "relay.toml").write_text(ROUTE.format(port=port))


def wait_for(relay: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the relay listens."""
    while relay.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit(f"start.py: the relay did not start:\n{log.read_text()}")


def a_number(text: str) -> int:
    """A number of workers."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers: write 1 or more")
    return int(text)


def a_file(text: str) -> Path:
    """A file that exists."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def main() -> int:
    """Run the job; gives the exit code of the first worker that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=a_number, default=4, help="how many processes (4)")
    parser.add_argument("files", nargs="+", type=a_file)
    options = parser.parse_args()
    frelay, port = frelay_command(), free_port()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory, frelay, options.workers, port)
        log = directory / "relay.log"
        with log.open("wb") as output:
            relay = subprocess.Popen([frelay, "run", "-c", directory / "relay.toml"], stdout=output, stderr=output)
        try:
            wait_for(relay, port, log)
            workers = [
                subprocess.Popen(
                    [
                        *(sys.executable, HERE / "wordcount.py", f"localhost:{port}", str(rank), str(options.workers)),
                        *(directory / "certs", *options.files),
                    ]
                )
                for rank in range(options.workers)
            ]
            codes = [worker.wait() for worker in workers]
        finally:
            relay.send_signal(signal.SIGTERM)
            relay.wait()
        return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
