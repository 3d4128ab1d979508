"""A proxy in front of the tests' S3 server that fails as real stores and networks do, by rule.

    proxy.drop_reply("PUT", "/lease")                        # the store has it, the client sees a closed connection
    proxy.drop_reply("PUT", "/lease", status=502)            # the same, and a gateway in between says so
    proxy.answer(403, "AccessDenied", "POST", "?uploads")    # no multipart upload begins
    proxy.answer(503, "SlowDown", "GET", "manifest", times=2)
    proxy.conditions = "ceph"                                # how the store treats If-Match and If-None-Match

A rule meets requests of its method whose path and query, unquoted, contain its text; the first rule that meets one decides.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

Conditions = Literal["kept", "ceph", "ignored", "no-if-match", "unimplemented"]
"""kept: as the server behind has them. ceph: If-Match is compared with its quotes, so that `"x"` never holds and `x` does
(RADOS gateway 16.2). ignored: both conditions are dropped without a word. no-if-match: only If-Match is dropped.
unimplemented: a put with If-Match is answered with 501."""

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "host"}


@dataclass
class Rule:
    """What to do with the requests it meets: answer with status and code (None: close the connection), forwarded before or not.

    skip: so many requests pass first. times: so many are met; None: all that follow.
    """

    method: str
    text: str
    status: int | None = None
    code: str = ""
    skip: int = 0
    times: int | None = None
    forwards: bool = False
    hits: int = 0
    _seen: int = field(default=0, repr=False)

    def meets(self, method: str, target: str) -> bool:
        """Whether this request is one of the rule's; counts it."""
        if method != self.method or self.text not in unquote(target):
            return False
        self._seen += 1
        if self._seen <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


class S3Proxy:
    """The proxy, running on a port of this machine only until `stop`. requests: (method, path and query, unquoted) so far."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []
        self.conditions: Conditions = "kept"
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client: None  # type: ignore[method-assign]  # clients that hang up, too
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def drop_reply(self, method: str, text: str, *, skip: int = 0, times: int | None = 1, status: int | None = None) -> Rule:
        """Forward the request, then close the connection, or answer with `status`, instead of passing the reply on."""
        return self._add(Rule(method, text, status, "BadGateway", skip, times, forwards=True))

    def answer(self, status: int | None, code: str, method: str, text: str, *, skip: int = 0, times: int | None = None) -> Rule:
        """Reply with an S3 error of this status and code (None: hang up); the server behind never hears of the request."""
        return self._add(Rule(method, text, status, code, skip, times))

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self.rules.clear()

    def count(self, method: str, text: str) -> int:
        """How many requests of this method had this text in their path and query."""
        return sum(seen == method and text in target for seen, target in list(self.requests))

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self.rules.append(rule)
        return rule

    def rule_for(self, method: str, target: str) -> Rule | None:
        """The rule that decides on this request."""
        with self._lock:
            self.requests.append((method, unquote(target)))
            return next((rule for rule in self.rules if rule.meets(method, target)), None)


class _Handler(BaseHTTPRequestHandler):
    proxy: S3Proxy
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self._body()
        rule = self.proxy.rule_for(self.command, self.path)
        if rule is not None and not rule.forwards:
            self._act(rule)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        headers["Host"] = self.headers["Host"]
        refused = self._judge_conditions(headers)
        if refused is not None:
            self._refuse(*refused)
            return
        status, answer_headers, answer = self._forward(body, headers)
        if rule is not None:
            self._act(rule)
            return
        self._reply(status, answer_headers, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _act(self, rule: Rule) -> None:
        if rule.status is None:
            self._hang_up()
        else:
            self._refuse(rule.status, rule.code)

    def _judge_conditions(self, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and code where this kind of store refuses the put; takes away the conditions that it does not see."""
        conditions = {name.lower(): name for name in headers if name.lower() in ("if-match", "if-none-match")}
        if self.command != "PUT" or not conditions or self.proxy.conditions == "kept":
            return None
        tag = headers.get(conditions.get("if-match", ""), "")
        if self.proxy.conditions == "ceph":
            return (412, "PreconditionFailed") if tag.startswith('"') else None
        if self.proxy.conditions == "unimplemented":
            return (501, "NotImplemented") if tag else None
        for name in conditions:
            if self.proxy.conditions == "ignored" or name == "if-match":
                del headers[conditions[name]]
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def _forward(self, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test says</Message></Error>"
        self._reply(status, [("Content-Type", "application/xml")], text.encode())

    def _hang_up(self) -> None:
        """A reset, as a broken network gives: the client cannot know what became of its request."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        """Nothing is left to flush into a connection that was hung up."""
        if not self.wfile.closed and self.connection.fileno() != -1:
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""
