"""Settings of a flat script, overridden from config files and flags, strictly checked. Standard library only.

    python train.py config/shapes.py --batch_size=32 --ch_mult=1,2,2

A script opens with a block of plain `key = default  # comment` lines and then calls `configure(globals())`.
Config files come first, in order, then the flags. A config file is Python and is executed: run only those that you
would run as a script.
"""

import ast
import difflib
import os
import sys
import time
import types

HERE = os.path.dirname(os.path.abspath(__file__))
PLAIN = (bool, int, float, str, tuple)
CALL = "config, given = configure("  # the line that ends a script's settings


class ConfigError(ValueError):
    """A setting that cannot be used. Printed as one line, exit status 2."""

    one_line = True


def report(kind, error, trace):
    """The exception hook of every script: errors that a user can mend are one line with exit status 2."""
    if kind.__name__ == "OutOfMemoryError":
        error, kind = "out of memory: lower batch_size, ch or image_size, or raise grad_accum", ConfigError
    if kind is KeyboardInterrupt:
        error, kind = "interrupted", ConfigError
    if not getattr(kind, "one_line", False):
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(2)


def assignments(path):
    """[(key, line number, comment)] of the names that a Python file sets outside of functions, down to `configure(`."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines, found, todo = source.splitlines(), [], [ast.parse(source, path)]
    end = next((i for i, line in enumerate(lines) if CALL in line), len(lines))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.lineno <= end:
            found.append((node.id, node.lineno, lines[node.lineno - 1].partition("  # ")[2]))
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.GeneratorExp)):
            todo += ast.iter_child_nodes(node)
    return sorted(found, key=lambda entry: entry[1])


def settings_of(path):
    """{key: default} of a script's block of settings, without running it: those that are plain literals."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    settings = {}
    for node in ast.parse(source.partition(CALL)[0], path).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            settings[node.targets[0].id] = ast.literal_eval(node.value)
    return settings


def is_script(path):
    with open(path, encoding="utf-8") as f:
        return f"{CALL}globals()" in f.read()


def hint(key, known):
    """The nearest known key, or the script that has this one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]!r}?"
    scripts = [
        name for name in sorted(os.listdir(HERE)) if name.endswith(".py") and is_script(os.path.join(HERE, name))
    ]
    homes = [name for name in scripts if key in [k for k, _, _ in assignments(os.path.join(HERE, name)) if k.islower()]]
    if homes:
        return f"it is a key of {', '.join(homes)}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "--help lists the keys"


def convert(value, wanted):
    """The value as the wanted type (int for float, 1e5 for int, a list for a tuple), or raises TypeError."""
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is int and type(value) is float and value.is_integer():
        return int(value)
    if wanted is tuple and type(value) in (list, tuple, int, float):
        return tuple(value) if type(value) in (list, tuple) else (value,)
    if type(value) is not wanted:
        raise TypeError
    return value


def parse(text, wanted):
    """A flag's text as the wanted type, or raises TypeError."""
    if wanted is str:
        return text
    if wanted is tuple and text == "":
        return ()
    try:
        value = ast.literal_eval(text.capitalize() if wanted is bool else text)
    except (ValueError, SyntaxError):
        raise TypeError from None
    return convert(value, wanted)


def print_help(doc, defaults, optional):
    comments = {key: comment for key, _, comment in assignments(sys.argv[0])}
    print((doc or "").strip() + "\n\nkeys (--key=value):")
    for key, value in defaults.items():
        kind = f" ({optional[key].__name__})" if key in optional else ""
        print(f"  {f'{key}={value!r}':36s}{kind} {comments.get(key, '')}".rstrip())


def configure(namespace, **optional):
    """Overrides the settings in a script's globals from sys.argv; returns (all settings, those given) as two dicts.

    A setting is a public global that is a bool, int, float, str or tuple at the time of the call, or one whose default
    is None and whose type is named in `optional` (e.g. w=float); for the latter `none` is a value too.
    Raises ConfigError for an unknown key (with where it stood and the nearest match), a wrong type or a missing file.
    """
    sys.excepthook = report
    public = {k: v for k, v in namespace.items() if not k.startswith("_")}
    defaults = {k: v for k, v in public.items() if k.islower() and isinstance(v, PLAIN) or k in optional}
    wanted = {k: optional.get(k, type(v)) for k, v in defaults.items()}
    given = {}

    def set_key(key, value, where, reader):
        if key not in defaults:
            raise ConfigError(f"{where}: unknown key {key!r}: {hint(key, list(defaults))}")
        if key in optional and value in (None, "none", "None"):
            given[key] = None
            return
        if defaults[key] in ("auto", "True", "False") and isinstance(value, bool):
            value = str(value)
        given.pop(key, None)  # so that `given` is in the order in which keys were set
        try:
            given[key] = reader(value, wanted[key])
        except TypeError:
            name = wanted[key].__name__
            raise ConfigError(f"{where}: {key}={value!r} is not of type {name} (default {defaults[key]!r})") from None

    for arg in sys.argv[1:]:
        if arg in ("--help", "-h"):
            print_help(namespace.get("__doc__"), defaults, optional)
            raise SystemExit(0)
        if arg.startswith("-"):
            key, equals, text = arg.lstrip("-").partition("=")
            if not arg.startswith("--") or not equals:
                raise ConfigError(f"{arg!r}: write it as --{key.replace('-', '_') or 'key'}=value")
            set_key(key.replace("-", "_"), text, "flag", parse)
            continue
        path = next((p for p in (arg, os.path.join(HERE, arg)) if os.path.isfile(p)), None)
        if path is None:
            raise ConfigError(f"no config file {arg!r} (settings are written as --key=value)")
        scope = {"__file__": path}
        try:
            with open(path, encoding="utf-8") as f:
                exec(compile(f.read(), path, "exec"), scope)
        except Exception as e:
            raise ConfigError(f"config file {arg}: {type(e).__name__}: {e}") from None
        line_of = {key: line for key, line, _ in assignments(path)}
        for key, value in scope.items():
            if not key.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType)):
                set_key(key, value, f"{arg}:{line_of.get(key, '?')}", convert)
    namespace.update(given)
    return defaults | given, given


def progress(what, share, start):
    """One line that is written over: how much is done (0..1) and the time left; silent where nobody watches."""
    if sys.stderr.isatty():
        left = (time.time() - start) * (1 - share) / max(share, 1e-9)
        end = "\n" if share >= 1 else ""
        print(f"\r{what}: {share:4.0%}, {left:5.0f} s left ", end=end, file=sys.stderr, flush=True)
