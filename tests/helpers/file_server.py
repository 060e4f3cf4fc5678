"""A server on this machine that sends files, wrong files, or nothing at all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.processes import PATIENCE

Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test says for this name, or else sends the right file."""

    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        answer = self.server.answers.get(name, send)
        answer(self, self.server.content.get(name, b""))

    def head(self, status: int = 200, **fields: object) -> None:
        self.send_response(status)
        for field, value in fields.items():
            self.send_header(field.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/"

    def handle_error(self, *_: object) -> None:
        """A client may leave whenever it likes."""


def send(handler: Handler, content: bytes) -> None:
    handler.head(Content_Length=len(content))
    handler.wfile.write(content)


def cut(handler: Handler, content: bytes) -> None:
    handler.head(Content_Length=len(content))
    handler.wfile.write(content[:-9])


def cut_without_length(handler: Handler, content: bytes) -> None:
    handler.head()
    handler.wfile.write(content[:-9])


def endless(handler: Handler, content: bytes) -> None:
    handler.head()
    while True:
        handler.wfile.write(bytes(1 << 16))


def change(handler: Handler, content: bytes) -> None:
    send(handler, content[:-1] + b"?")


def missing(handler: Handler, content: bytes) -> None:
    handler.send_error(404)


def empty_answer(handler: Handler, content: bytes) -> None:
    handler.close_connection = True


def no_http(handler: Handler, content: bytes) -> None:
    handler.wfile.write(b"SSH-2.0-server\r\n")


def redirect(handler: Handler, content: bytes) -> None:
    if "/moved/" in handler.path:
        send(handler, content)
    else:
        handler.head(302, Location=f"/moved{handler.path}")


def redirect_for_ever(handler: Handler, content: bytes) -> None:
    handler.head(302, Location=handler.path)


def redirect_to_a_file(handler: Handler, content: bytes) -> None:
    handler.head(302, Location="file:///etc/passwd")


def stall(handler: Handler, content: bytes) -> None:
    """Send half of the file, and the rest when the test says so."""
    handler.head(Content_Length=len(content))
    handler.wfile.write(content[: len(content) // 2])
    handler.server.released.wait(PATIENCE)
    handler.wfile.write(content[len(content) // 2 :])


def silent(handler: Handler, content: bytes) -> None:
    handler.server.released.wait(PATIENCE)


def drip(handler: Handler, content: bytes) -> None:
    handler.head(Content_Length=len(content))
    for byte in content:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


@contextlib.contextmanager
def serve(content: dict[str, bytes]) -> Iterator[Server]:
    """Sends files, by their names, until the block ends."""
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()
