"""Settings of a flat script: the block of `key = default  # comment` lines that opens it, then files and flags.

    python train.py config/shapes.py --batch_size=32 --ch_mult=1,2,2

Config files come first, in order, then flags. A config file is Python and is executed: run only those that you would
run as a script. Names in it that begin with _ are not settings.
"""

import ast
import contextlib
import difflib
import os
import re
import runpy
import signal
import sys

from ddpm import UserError, check

HERE = os.path.dirname(os.path.abspath(__file__))
# Numbers are at least 0 (-2**32 where the default is None) and below 2**32. Those of these keys must be above 0:
POSITIVE = set("batch_size grad_accum max_iters log_interval eval_interval eval_images lr shard_size per_class".split())
POSITIVE |= set("seeds rounds z_dim".split())
# Those of these keys must be below 1, and those of the next, which take memory, below 2**20:
SHARES = set("val_fraction dropout ema_decay label_smoothing beta1".split())
SIZES = set("batch_size shard_size per_class num_samples hidden image_size z_dim".split())


def settings_in(script):
    """{key: (default, comment)} of the block between the first two rules of a script."""
    with open(script, encoding="utf-8") as f:
        block = re.split(r"^# -{100,}\n", f.read(), flags=re.M)[1]
    found = re.findall(r"^(\w+) = (.+?)(?:  # (.*))?$", block, re.M)
    return {key: (ast.literal_eval(default), comment) for key, default, comment in found}


def convert(value, kind):
    """The value, or its text, as a bool, int, float, str or tuple. 1 is a float too, 1e5 an int, [1, 2] a tuple."""
    if kind is str:
        value = os.path.expanduser(str(value) if type(value) is bool else value)  # a config file's use_compile = True
    elif type(value) is str:
        value = ast.literal_eval(value.capitalize() if kind is bool else value or "()")
    if kind is tuple and type(value) in (int, float):
        value = (value,)
    whole = kind is int and type(value) is float and value % 1 == 0
    if whole or (kind, type(value)) in ((float, int), (tuple, list)):
        value = kind(value)
    if type(value) is not kind or (kind is str and "\0" in value):
        raise TypeError
    return value


def run_config(path, keys=()):
    """Executes a config file: its settings as a dict. They are what it assigns, and values of the keys that it imports.

    Raises UserError.
    """
    found = [p for p in (os.path.expanduser(path), os.path.join(HERE, path)) if os.path.isfile(p)]
    check(found, f"no config file {path!r} (settings are written as --key=value)")
    try:
        with open(found[0], "rb") as f:
            statements = [n for n in ast.walk(ast.parse(f.read())) if isinstance(n, (ast.Assign, ast.AnnAssign))]
        names = [n for statement in statements for n in ast.walk(statement) if isinstance(n, ast.Name)]
        assigned = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        values = runpy.run_path(found[0])
        assigned |= {k for k, v in values.items() if k in keys and isinstance(v, (int, float, str, tuple, list))}
        return {k: v for k, v in values.items() if k in assigned and not k.startswith("_")}
    except (Exception, SystemExit) as e:
        raise UserError(f"config file {path}: {type(e).__name__}: {e}") from None


def checked(where, key, value, default):
    """A setting's value, or its text, as the type of its default. Raises UserError for another type or out of range."""
    kind = float if default is None else type(default)
    try:
        value = None if default is None and value in (None, "None") else convert(value, kind)
    except Exception:  # whatever literal_eval or int() raises
        raise UserError(f"{where}: {key} is not of type {kind.__name__} (default {default!r})") from None
    low, high = -(2**32) if default is None else 0, 1 if key in SHARES else 2**20 if key in SIZES else 2**32
    for number in value if kind is tuple else [value] * (type(value) in (int, float)):
        inside = type(number) in (int, float) and low <= number < high  # NaN is not
        inside = inside and (number > 0 or key not in POSITIVE)
        check(inside, f"{where}: {key} must be {'above' if key in POSITIVE else 'at least'} {low} and below {high}")
    return value


def configure(namespace, also=None):
    """Overrides the settings in a script's globals from sys.argv. Returns (all settings, those given) as two dicts.

    A setting has the type of its default; None stands for a float that may be left out. also: a script whose settings
    are taken as well. Raises UserError for an unknown key (with the nearest match), a wrong type, a missing file or a
    value out of range.
    """
    sys.excepthook = print_user_error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: what is half made is removed
    with contextlib.suppress(AttributeError):  # stdout is closed
        sys.stdout.reconfigure(errors="replace")  # names that its encoding lacks
    block, given = settings_in(namespace["__file__"]), {}
    block = (settings_in(os.path.join(HERE, also)) if also else {}) | block
    if {"--help", "-h"} & set(sys.argv[1:]):
        keys = "\n".join(f"  {f'{key}={default!r}':36s} {comment}" for key, (default, comment) in block.items())
        print(f"{namespace['__doc__']}\nkeys (--key=value):\n{keys}")
        raise SystemExit(0)
    for arg in sys.argv[1:]:
        key, equals, text = arg.lstrip("-").partition("=")
        check(not arg.startswith("-") or (arg.startswith("--") and equals), f"{arg!r}: write it as --{key}=value")
        found = {key.replace("-", "_"): text} if arg.startswith("-") else run_config(arg, block)
        for key, value in found.items():
            near = difflib.get_close_matches(key, block, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
            check(key in block, f"{arg}: unknown key {key!r}: {hint}")
            given[key] = checked(arg, key, value, block[key][0])
    config = {key: default for key, (default, _) in block.items()} | given
    namespace.update(config)
    return config, given


def print_user_error(kind, error, trace):
    """The excepthook of the scripts: one line and exit status 2 for an error that the user can fix."""
    if issubclass(kind, MemoryError) or kind.__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        error = "out of memory: lower batch_size (in training, raise grad_accum to keep the batch)"
    elif kind is KeyboardInterrupt:
        error = "interrupted"
    elif not issubclass(kind, (UserError, OSError)):
        return sys.__excepthook__(kind, error, trace)
    line = f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).splitlines())}\n"
    print(line, end="", file=sys.stderr)  # in one write: other ranks may print as well
    raise SystemExit(2)
