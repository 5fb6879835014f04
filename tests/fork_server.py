"""Runs pieces of code, each in its own fork of a process that has imported what PEFT needs, but neither PEFT nor us.

Importing PEFT takes seconds, nearly all of it torch and transformers, and tests of import order need it many times.
Reads one JSON string of code a line, answers with one JSON object a line.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback


class ForkServer:
    """The client. Use as a context manager."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exc_info):
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(self, code: str) -> str:
        """Returns what the code prints, on both streams. Fails if the code does."""
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["status"] == 0, answer["output"]
        return answer["output"]


def _preload() -> None:
    import transformers.models.bloom.modeling_bloom  # noqa: F401

    # A fork says what else PEFT needs.
    code = "import sys, peft; print(*(name for name in sys.modules if name.partition('.')[0] != 'peft'))"
    os.environ["TRL_STEER_NO_AUTOLOAD"] = "1"
    needed = _run_in_fork(code)["output"].split()
    del os.environ["TRL_STEER_NO_AUTOLOAD"]
    for name in needed:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not {"peft", "trl_steer"} & set(sys.modules)


def _run_in_fork(code: str) -> dict:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                exec(compile(code, "<scenario>", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return {"status": status, "output": output.read().decode()}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _preload()
    for line in sys.stdin:
        print(json.dumps(_run_in_fork(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
