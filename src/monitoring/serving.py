"""A page that is renewed while somebody looks at it: the standard library's web server, read only.

Nothing is read or drawn unless a browser asks, at most once in EVERY seconds however many do.
"""

import base64
import hashlib
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EVERY = 5  # seconds
# Ages are counted on in the browser. The page is fetched again while it is in sight, and replaced
# where it is: no jump, and what was unfolded stays so.
SCRIPT = """
const began = Date.now() / 1000 - Number(document.body.dataset.now);
let tag = null;
function words(s) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (s >= 2 * length) return (s / length).toFixed(s < 10 * length ? 1 : 0) + " " + unit;
  return Math.max(0, Math.round(s)) + " s";
}
function count() {
  for (const t of document.querySelectorAll("time"))
    t.textContent = words(Date.now() / 1000 - began - Number(t.dataset.at)) + " ago";
}
async function renew() {
  if (document.hidden) return;
  try {
    const reply = await fetch("/", {headers: tag ? {"If-None-Match": tag} : {}, cache: "no-store"});
    document.body.classList.remove("lost");
    if (reply.status != 200) return;
    tag = reply.headers.get("ETag");
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    const open = new Set([...document.querySelectorAll("details[open]")].map(d => d.id));
    for (const d of page.querySelectorAll("details")) d.open = open.has(d.id);
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.title = page.title;
    count();
  } catch { document.body.classList.add("lost"); }
}
setInterval(count, 1000);
setInterval(renew, SECONDS * 1000);
document.addEventListener("visibilitychange", renew);
count();
""".replace("SECONDS", str(EVERY))
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
