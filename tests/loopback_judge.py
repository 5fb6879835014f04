"""An OpenAI-compatible server on this machine: a judge whose verdict depends on nothing but the request.

It prefers longer outputs and those about pebbles, with noise drawn from the texts, answers with the log-probabilities
of `m` and `M`, counts what it is asked, and fails where it is told to.
"""

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INSTRUCTION = re.compile(r'"instruction": """(.*?)""",\n', re.DOTALL)
OUTPUT = re.compile(r'"output": """(.*?)"""\n', re.DOTALL)
# Seconds; longer than any time-out in the tests.
NEVER = 20.0


class KillAt:
    """A `fault` that kills `process` with SIGKILL while it waits for the answer to one request, once."""

    def __init__(self, number: int):
        self.number, self.process, self.killed = number, None, threading.Event()

    def __call__(self, number, instruction):
        if number == self.number and not self.killed.is_set():
            time.sleep(0.2)  # the answers before this one are on their way or written down
            os.kill(self.process.pid, signal.SIGKILL)
            self.killed.set()


class LoopbackJudge:
    """A context manager. `url` is what `--endpoint` takes.

    Args:
        fault: Called with the number of the request, from 0, and the instruction it is about; returns the name of a
            fault (see `Handler.fail`), the body of an answer, or None.
        delay: Seconds to think about each request.
    """

    def __init__(self, fault=None, delay=0.0):
        self.fault = fault or (lambda number, instruction: None)
        self.delay = delay
        self.asked = Counter()  # by instruction
        self.answered = Counter()
        self.keys = set()
        self.bodies = []
        self.most_at_once = 0
        self._at_once = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def __enter__(self):
        judge = self

        class Bound(Handler):
            pass

        Bound.judge = judge
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def requests(self):
        return sum(self.asked.values())

    def enter(self, step):
        with self.lock:
            self._at_once += step
            self.most_at_once = max(self.most_at_once, self._at_once)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: LoopbackJudge

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.judge
        text = "\n".join(message["content"] for message in body["messages"]) if "messages" in body else body["prompt"]
        found = INSTRUCTION.search(text)
        instruction = found.group(1) if found else text
        judge.enter(1)
        try:
            with judge.lock:
                number = judge.requests
                judge.asked[instruction] += 1
                judge.keys.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
                judge.bodies.append(body)
            time.sleep(judge.delay)
            fault = judge.fault(number, instruction)
            if fault == "refuses_max_tokens" and "max_tokens" not in body:
                fault = None
            if fault is None or fault in ("no_logprobs", "chatter", "cut_off"):
                self.send(200, answer(body, text, fault))
                with judge.lock:
                    judge.answered[instruction] += fault is None
            else:
                self.fail(fault)
        finally:
            judge.enter(-1)

    def fail(self, fault):
        if isinstance(fault, dict | bytes):  # a body of one's own
            self.send(200, fault)
        elif fault == "timeout":
            self.judge.stopping.wait(NEVER)
            self.close_connection = True
        elif fault == "malformed":
            self.send(200, b'{"id": "x", "object": "chat.completion", "choices": [{"mess')
        elif fault == "hang_up":
            self.close_connection = True
        elif fault == "rejected_key":
            self.send(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif fault == "refuses_max_tokens":
            words = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            self.send(400, {"error": {"message": words, "type": "invalid_request_error"}})
        else:
            words = {
                "500": "internal error",
                "429": "Rate limit reached for requests",
                "400": "too long",
                "403": "no",
            }[fault]
            self.send(int(fault), {"error": {"message": words, "type": "error"}})

    def send(self, status, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        # Tells the client how long to wait before it tries again.
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def answer(body, text, fault):
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    head = {"id": "x", "created": 0, "model": body["model"], "usage": usage}
    if "messages" not in body:  # for `generate --endpoint` with a prompt of its own
        choice = {"index": 0, "text": echo(text), "finish_reason": "stop", "logprobs": None}
        return {**head, "object": "text_completion", "choices": [choice]}
    outputs = OUTPUT.findall(text)
    logprobs, content = None, echo(text)
    if len(outputs) == 2:
        x = liking(outputs[0]) - liking(outputs[1])
        tokens = {"m": -math.log1p(math.exp(-x)), "M": -math.log1p(math.exp(x))}
        if fault == "chatter":
            tokens = {"I": -0.1, "The": -2.0}
        content = max(tokens, key=tokens.get)
        top = [{"token": token, "bytes": None, "logprob": value} for token, value in tokens.items()]
        logprobs = {"content": [{**max(top, key=lambda each: each["logprob"]), "top_logprobs": top}], "refusal": None}
    message = {"role": "assistant", "content": content, "refusal": None}
    if "tools" in body:
        first, second = sorted(("m", "M"), key=lambda name: name != content)
        models = [{"model": first, "rank": 1}, {"model": second, "rank": 2}]
        arguments = json.dumps({"ordered_models": models})[: -5 if fault == "cut_off" else None]
        function = {"name": body["tools"][0]["function"]["name"], "arguments": arguments}
        message["tool_calls"] = [{"id": "x", "type": "function", "function": function}]
    logprobs = None if fault == "no_logprobs" else logprobs
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
    return {**head, "object": "chat.completion", "choices": [choice]}


def echo(text):
    """What the server writes when it is not judging."""
    return f"An answer to: {text.strip().splitlines()[-1]}"


def liking(text):
    noise = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return len(text) / 100 + 2 * noise + 0.5 * text.lower().count("pebble")
