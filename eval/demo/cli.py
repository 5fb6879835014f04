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
        description="Trains a steering adapter on generated ListOps expressions with TRL, evaluates the base model "
        "and the adapter with lm-eval, and compares them with baselines without a model. Run the command again to "
        "continue an interrupted run.",
    )
    preset.add_arguments(parser)
    args = parser.parse_args(argv)
    settings, folder = preset.from_arguments(args)
    # Before PyTorch is imported. OpenMP's threads wait actively by default, which makes training up to five times
    # slower if other processes use the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console()
    try:
        require("demo", "lm_eval", "scipy")
        models.check(settings.model)
        if args.fast:
            console.note("--fast only shows that everything works. It is too short for a significant result.")
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
        print(f"Stopped. {folder} has {runs.Run(folder).kept()}. {again} continues from there.", file=sys.stderr)
        return 130
    return 0
