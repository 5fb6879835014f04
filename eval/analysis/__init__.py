"""`trl-steer analyze`: the command line, the files and the pictures of the measures in `trl_steer.analysis`.

A measure is a module here, and a line in `MEASURES` (`cli.py`). It imports PyTorch only inside `run`, and has

- `add_arguments(parser)`: adds its arguments, the shared ones by the functions of `arguments.py`;
- `run(args, console) -> Report`: loads what it needs by the functions of `inputs.py`, shows its progress with
  `tracked`, and returns the results, a summary and a picture, which `report.py` writes.
"""
