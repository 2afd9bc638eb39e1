"""The HTTP side of the stand-in for OSS."""

from __future__ import annotations

import base64
import contextlib
import secrets
import socket
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from ckptstore.testing.oss_bucket import Answer
from ckptstore.testing.oss_signature import Refused, Request

if TYPE_CHECKING:
    from ckptstore.testing.oss_server import OSSServer


class HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close the connections that clients keep open."""
        for connection in [*self._open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


def handler_for(server: OSSServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *_: object) -> None:
            pass

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            target = urlsplit(self.path)
            path = unquote(target.path)
            request_id = secrets.token_hex(12).upper()
            try:
                if "transfer-encoding" in headers:
                    raise Refused(501, "NotImplemented", "A header you provided implies functionality not served here.")
                bucket, key = server.bucket_and_key(target.netloc or headers.get("host", ""), path)
                query = dict(parse_qsl(target.query, keep_blank_values=True))
                with server.lock:
                    server.seen.append((self.command, self.path))
                    answer = server.answer(Request(self.command, bucket, key, query, headers, body))
            except Refused as refused:
                xml = (
                    f"<Error><Code>{refused.code}</Code><Message>{escape(refused.message)}</Message>"
                    f"<RequestId>{request_id}</RequestId></Error>"
                ).encode()
                told = {"x-oss-err": base64.b64encode(xml).decode()} if self.command == "HEAD" else {}
                answer = Answer(refused.status, xml, {"Content-Type": "application/xml", **told})
            self._send(answer, request_id)

        def _send(self, answer: Answer, request_id: str) -> None:
            self.send_response_only(answer.status)
            headers = {
                "Server": "AliyunOSS",
                "Date": format_datetime(server.clock.now(), usegmt=True),
                "x-oss-request-id": request_id,
                "Content-Length": str(len(answer.body)),
                **answer.headers,
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            self.wfile.flush()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815 - the names that http.server looks for

    return Handler
