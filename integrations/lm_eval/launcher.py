"""lm-eval's own command line; importing `trl_steer` first is all that is added."""

import sys
from collections.abc import Sequence

import trl_steer  # noqa: F401  (registers our PEFT types)


def main(argv: Sequence[str] | None = None, prog: str = "lm-eval") -> int:
    """Hands `argv` (default: that of the process) to lm-eval's command line unchanged.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ModuleNotFoundError("lm-eval is not installed: pip install 'trl-steer[eval]'", name="lm_eval") from None
    before = sys.argv
    # lm-eval's parser reads `sys.argv` itself.
    sys.argv = [prog, *(before[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
