"""A mock judge for the benchmark: prints its port, and answers requests with log-probabilities of `m` and `M`."""

from __future__ import annotations

import json
import math
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers with a preference that only depends on the request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        x = zlib.crc32(json.dumps(json.loads(body)["messages"]).encode()) % 4001 / 1000 - 2
        tokens = {"m": -math.log1p(math.exp(-x)), "M": -math.log1p(math.exp(x))}
        top = [{"token": token, "bytes": None, "logprob": value} for token, value in tokens.items()]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "m"},
            "finish_reason": "length",
            "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
        }
        usage = {"prompt_tokens": 1000, "completion_tokens": 1, "total_tokens": 1001}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "mock"}
        content = json.dumps({**head, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
