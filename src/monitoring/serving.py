"""A page that is renewed while somebody looks at it: the standard library's web server, read only.

Nothing is read or drawn unless a browser asks, at most once in EVERY seconds however many do.
"""

import base64
import hashlib
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

EVERY = 5  # seconds
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()


class PageServer(ThreadingHTTPServer):
    """Serves `/` from page() and `/scalars.csv` from write(file). page() returns the HTML, or None
    if nothing has changed since it was called last; both are called by one thread at a time."""

    daemon_threads = True

    def __init__(self, host: str, port: int, page: Callable[[], str | None], write: Callable):
        self.page, self.write = page, write
        self.lock, self.body, self.tag, self.looked = threading.Lock(), b"", "", -EVERY
        super().__init__((host, port), Handler)

    def current(self) -> tuple[bytes, str]:
        """Return the page and its entity tag."""
        with self.lock:
            if time.monotonic() - self.looked >= EVERY:
                if (page := self.page()) is not None:
                    self.body = page.encode("utf-8", "replace")
                    self.tag = f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'
                self.looked = time.monotonic()
            return self.body, self.tag

    def handle_error(self, request, client_address) -> None:
        """Say nothing of a browser that left."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = self.path.split("?")[0]
        if where == "/":
            body, tag = self.server.current()
            if self.headers.get("If-None-Match") == tag:
                return self.begin(304, "text/html", ETag=tag)
            self.begin(200, "text/html", ETag=tag, **{"Content-Length": str(len(body))})
            self.wfile.write(body)
        elif where == "/scalars.csv":
            self.begin(200, "text/csv")
            with self.server.lock:
                self.server.write(self.wfile)
        else:
            self.send_error(404)

    def begin(self, status: int, kind: str, **headers: str) -> None:
        self.send_response(status)
        headers |= {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args) -> None:
        """Keep the terminal for what matters."""
