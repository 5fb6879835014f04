"""Commands of the shell that start at once: each runs in a fork of a process that has imported what they need.

`WarmCommands` makes a folder of programs for `PATH`. Each hands its arguments, folder, environment and streams over to
the process that waits, and ends with the exit status that it is told.
"""

import gc
import importlib
import json
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

NAMES = ("trl-steer", "lm_eval", "accelerate", "pip", "git", "make")
# A variable: nothing is added to command lines where it is set.
AS_WRITTEN = "AS_WRITTEN"
PRELOADED = (
    *("trl.trainer.sft_trainer", "trl_steer.trainers", "trl_steer.eval.scoring", "trl_steer.eval.training"),
    *("trl_steer.integrations.trl.launching", "lm_eval.__main__", "lm_eval.models.huggingface", "lm_eval.tasks"),
)


class WarmCommands:
    """A context manager.

    Args:
        options (`list[tuple[str, str]]`): Regular expressions, and the arguments that are added to a command line that
            one of them matches.
        checkout (`Path`): The checkout, whose files the commands are checked against.
    """

    def __init__(self, options: list[tuple[str, str]], checkout: Path):
        self.options, self.checkout = options, checkout

    def __enter__(self):
        # A path of a socket is short.
        self.folder = Path(tempfile.mkdtemp(prefix="warm"))
        self.environment = {**os.environ, "PATH": f"{self.folder}{os.pathsep}/usr/bin{os.pathsep}/bin"}
        self.environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.environment["HF_DATASETS_CACHE"] = str(self.folder / "datasets")
        for name in NAMES:
            program = self.folder / name
            words = [sys.executable, "-IS", __file__, "ask", str(self.folder / "socket"), name]
            program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            program.chmod(0o755)
        serve = [sys.executable, __file__, "serve", str(self.folder / "socket"), str(self.checkout)]
        self._process = subprocess.Popen(
            [*serve, json.dumps(self.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exc_info):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        shutil.rmtree(self.folder)

    def run(self, code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
        """Runs code of bash, which ends at the first command that fails."""
        return subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", code],
            cwd=folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3600 if AS_WRITTEN in variables else 300,
        )


def ask(path: str, name: str, *arguments: str) -> int:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        request = json.dumps([name, arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(asking, [b"."], [0, 1, 2])
        asking.sendall(request)
        asking.shutdown(socket.SHUT_WR)
        return int(asking.makefile().read())


def serve(path: str, checkout: str, options: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    import stand_ins

    stand_ins.replace_the_hub()
    stand_ins.find_few_tasks()
    gc.freeze()  # no command looks for garbage among what they share
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", file=answers, flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:  # which closes when we are done
            asking, _ = listening.accept()
            if os.fork() == 0:
                os._exit(_answer(asking, checkout, json.loads(options)))
            asking.close()
            with suppress(ChildProcessError):  # when there are none left
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def _answer(asking: socket.socket, checkout: str, options: list[list[str]]) -> int:
    """In a process of its own, since commands call others: lm-eval asks git where it is."""
    _, streams, _, _ = socket.recv_fds(asking, 1, 3)
    request = json.loads(asking.makefile().read())
    child = os.fork()
    if child == 0:
        os._exit(_run(request, streams, checkout, options))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    asking.sendall(str(status % 256).encode())
    return 0


def _run(request: list, streams: list[int], checkout: str, options: list[list[str]]) -> int:
    """The exit status of a command, in a process of its own."""
    import traceback

    import stand_ins

    name, arguments, folder, environment = request
    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    line = shlex.join([name, *arguments])
    for pattern, added in [] if AS_WRITTEN in environment else options:
        if (found := re.search(pattern, line)) is not None:
            arguments = [*arguments, *shlex.split(os.path.expandvars(found.expand(added)))]
    status: object = 1
    try:
        status = getattr(stand_ins, name.replace("-", "_"))(arguments, Path(checkout))
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(*sys.argv[2:]))
    serve(*sys.argv[2:])
