"""HTTP around a `Studio`: the page's addresses, limits, and errors as one line. The standard library is enough.

Nothing is fetched from elsewhere, and the page may not fetch: its content security policy allows this server only.
Requests that other web pages make the browser send here are refused: by their Origin, and by a Host that is not ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from captioning.app.studio import Studio
from captioning.files import parse_json
from captioning.messages import first_line, one_line

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent
FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
QUESTION = 2**20  # bytes of a question in JSON, at most
DROPPED = 2**30  # bytes of what is too large that are read all the same
IDLE = 60  # seconds that a connection may say nothing


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that gets an error as its answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves the page of ``studio``.

    Args:
        studio: what the page can do.
        host: address to listen on.
        port: 0 takes any that is free.
        largest: bytes of a picture, at most.

    Raises:
        OSError: the address is in use, or not of this machine.
    """

    daemon_threads = True

    def __init__(self, studio: Studio, host: str = "127.0.0.1", port: int = 0, largest: int = 20 * 10**6) -> None:
        self.studio, self.largest = studio, largest
        super().__init__((host, port), Handler)
        self.host = host

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{self.host}:{self.server_port}/"

    def answers_to(self, host: str) -> bool:
        """Whether ``host`` of a request is this server; one that listens to others has names that it does not know."""
        name = urlsplit(f"//{host}").hostname
        return self.host not in LOOPBACK or name in LOOPBACK


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = IDLE

    def do_GET(self) -> None:
        """Send the page, its parts, what it offers, or a page of maps."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Take a picture or a question."""
        self._answer(self._post)

    def _answer(self, function: Callable[[str], tuple[bytes, str]]) -> None:
        try:
            if not self.server.answers_to(self.headers.get("Host", "")):
                raise Refused(403, "this address is not the page's; open it at 127.0.0.1")
            self._send(200, *function(urlsplit(self.path).path))
        except Refused as refusal:
            self._send_error(refusal.status, str(refusal))
        except (ValueError, OSError) as error:
            self._send_error(400, one_line(str(error), 500))
        except Exception as error:  # of any type: the page says it, and the log where it comes from
            log.exception("%s", self.path)
            self._send_error(500, f"{type(error).__name__}: {first_line(error)}")

    def _send_error(self, status: int, message: str) -> None:
        self.close_connection = True  # what was not read of the request must not be taken for the next one
        self._send(status, *as_json({"error": message}))

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        # A page of maps has a policy of its own in it, for its own script.
        policy = "frame-ancestors 'self'" if self.path.startswith("/maps/") else POLICY
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(content)

    # --- what is asked

    def _get(self, path: str) -> tuple[bytes, str]:
        if path in FILES:
            file = PAGE / FILES[path]
            return file.read_bytes(), TYPES[file.suffix]
        if path == "/offer":
            return as_json({**self.server.studio.describe(), "largest": self.server.largest})
        if path.startswith("/maps/"):
            return self.server.studio.page(path.removeprefix("/maps/")).encode(), "text/html"
        raise Refused(404, f"{path}: no such page")

    def _post(self, path: str) -> tuple[bytes, str]:
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise Refused(403, "asked by another web page")
        studio = self.server.studio
        if path == "/picture":
            name = parse_qs(urlsplit(self.path).query).get("name", ["picture"])[0]
            return as_json(studio.add_picture(name, self._body(self.server.largest, name)))
        questions: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
            "/draw": (studio.draw, ("split", "seed")),
            "/show": (studio.show, ("picture",)),
            "/caption": (studio.caption, ("picture", "adapter", "settings")),
            "/map": (studio.map, ("maps", "method", "layers", "heads")),
            "/compare": (studio.compare, ("picture", "first", "second", "settings")),
            "/compare-scenes": (studio.compare_scenes, ("set", "first", "second", "settings")),
        }
        if path not in questions:
            raise Refused(404, f"{path}: no such page")
        function, names = questions[path]
        asked = parse_json(self._body(QUESTION, "the question").decode("utf-8"))
        if not isinstance(asked, dict) or set(asked) != set(names) or not isinstance(asked.get("settings", {}), dict):
            raise ValueError(f"{path}: asks for an object of {', '.join(names)}")
        return as_json(function(*(asked[name] for name in names)))

    def _body(self, most: int, what: str) -> bytes:
        """Return what was sent; one that is too large is read and dropped, so that the browser hears the answer."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "the request does not say how long it is")
        size = int(length)
        if size <= most:
            return self.rfile.read(size)
        left = min(size, DROPPED)
        while left > 0 and (chunk := self.rfile.read(min(left, 2**20))):
            left -= len(chunk)
        raise Refused(413, f"{what}: {size / 1e6:.1f} MB, and {most / 1e6:.0f} MB are taken at most; scale it down")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Log requests with --verbose only."""
        log.debug(format, *args)


def as_json(value: Any) -> tuple[bytes, str]:
    """Return a value as the content of an answer, and its type."""
    return json.dumps(value, allow_nan=False).encode(), "application/json"
