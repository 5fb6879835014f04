"""`trl-steer demo`."""

import argparse
import os
import sys
from collections.abc import Sequence

from trl_steer.extras import require

from .. import models, runs
from ..console import Console
from . import preset


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer demo") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [options]",
        description="Trains a steering adapter on generated ListOps expressions with TRL, scores the base model and "
        "the adapter with lm-eval, and compares them with what needs no model. Run again, it goes on where it was.",
    )
    preset.add_arguments(parser)
    args = parser.parse_args(argv)
    settings, folder = preset.from_arguments(args)
    # Before PyTorch is imported. OpenMP's threads wait by spinning, which on a machine that something else uses too
    # made training on two cores five times as slow as waiting idly, and gains a few percent on a quiet one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console()
    try:
        require("demo", "lm_eval", "scipy")
        models.check(settings.model)
        if args.fast:
            console.note("--fast shows that everything works. It is too short to learn much: no significant result.")
        console.note(f"{settings.method}, seed {settings.seed}, in {folder}")
        run = runs.make(settings, folder, score_base=True, overwrite=args.overwrite, report=console)
        console.close()

        from . import report

        report.show(run)
    except (runs.RunError, ImportError, OSError) as error:
        console.close()
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.close()
        again = "The same command without --overwrite" if args.overwrite else "The same command"
        print(f"Stopped. {folder} keeps {runs.Run(folder).kept()}. {again} goes on from there.", file=sys.stderr)
        return 130
    return 0
