"""Settings of a flat script, overridden by config files and flags, and helpers that the scripts share.

    python train.py config/shapes.py --batch_size=32 --ch_mult=1,2,2

A script opens with a block of `key = default  # comment` lines between two rules, then calls `configure(globals())`.
Config files are applied first, in order, then flags. A config file is Python and is executed: run only those that you
would run as a script.
"""

import ast
import ctypes
import difflib
import glob
import os
import re
import signal
import sys
import time
import types
from contextlib import suppress
from importlib.util import find_spec

import torch
import torch.distributed as dist

from ddpm import UserError, check_choice, check_range, load_model

HERE = os.path.dirname(os.path.abspath(__file__))
DISTRIBUTED = ("train.py", "augment.py")  # the scripts that torchrun may start
RANGES = {  # of the numbers of all scripts, where a script does not give its own; a model's are in DDPMConfig
    "[1, inf)": "batch_size grad_accum max_iters log_interval eval_interval eval_images num_samples per_class steps "
    "shard_size seeds rounds dpi z_dim",
    "[0, inf)": "epochs grad_clip sample_interval weight_decay warmup_iters image_size min_lr n n_real n_synthetic "
    "shift input_noise",
    "(0, inf)": "lr minutes",
    "[0, 1)": "val_fraction dropout ema_decay beta1",
    "(0, 1]": "crop",
    "[0, 1]": "eta",
    "(-inf, inf)": "w guidance_scale",
    "[0, 0.5)": "label_smoothing",
    "[1, 100000]": "timesteps",
    "[32, inf)": "resize",
    "[0, 4294967296)": "seed",
}
RANGES = {key: interval for interval, keys in RANGES.items() for key in keys.split()}
locked = set()  # folders that this process has locked


def settings_in(script):
    """{key: (default, comment)}, both as text, of the block of settings that opens a script; {} if there is none."""
    with open(script, encoding="utf-8") as f:
        parts = re.split(r"^# -{100,}\n", f.read(), maxsplit=2, flags=re.M)
    block = parts[1] if len(parts) == 3 else ""
    return {
        key: (default, comment) for key, default, comment in re.findall(r"^(\w+) = (.+?)(?:  # (.*))?$", block, re.M)
    }


def defaults_of(script):
    """{key: default} of a script's settings, without running it."""
    return {key: ast.literal_eval(default) for key, (default, _) in settings_in(os.path.join(HERE, script)).items()}


def hint(key, known):
    """The scripts that have an unknown key, or the nearest known one."""
    scripts = [os.path.basename(p) for p in sorted(glob.glob(f"{glob.escape(HERE)}/*.py")) if key in settings_in(p)]
    if scripts:
        return f"it is a key of {', '.join(scripts)}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "--help lists the keys"


def convert(value, kind):
    """The value as a bool, int, float, str or tuple: int for float, 1e5 for int, a list for a tuple. Else TypeError."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is tuple and type(value) in (list, int, float):
        return tuple(value) if type(value) is list else (value,)
    if type(value) is not kind:
        raise TypeError
    return os.path.expanduser(value) if kind is str else value  # ~/data


def parse(text, kind):
    """A flag's text as a value of the given kind. Raises TypeError."""
    if kind is str:
        return convert(text, kind)
    if kind is tuple and text == "":
        return ()
    try:
        return convert(ast.literal_eval(text.capitalize() if kind is bool else text), kind)
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):  # the last two: deeply nested
        raise TypeError from None


def run_config(path):
    """Executes a config file: {key: (value, "file:line")}. Raises UserError."""
    path = os.path.expanduser(path)
    found = next((p for p in (path, os.path.join(HERE, path)) if os.path.isfile(p)), None)
    if found is None:
        raise UserError(f"no config file {path!r} (settings are written as --key=value)")
    scope = {"__file__": found}
    try:
        with open(found, encoding="utf-8-sig") as f:  # Windows editors write a byte order mark
            source = f.read()
        exec(compile(source, found, "exec"), scope)
    except (Exception, SystemExit) as e:
        raise UserError(f"config file {path}: {type(e).__name__}: {e}") from None
    settings = {}
    for key, value in scope.items():
        if not key.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType)):
            lines = [i for i, line in enumerate(source.splitlines(), 1) if re.match(rf"\s*{key}\b.*=", line)]
            settings[key] = (value, f"{path}:{lines[-1] if lines else '?'}")
    return settings


def configure(namespace, ranges=(), **optional):
    """Overrides the settings in a script's globals from sys.argv. Returns (all settings, those given) as two dicts.

    A setting is a lower-case global that is a bool, int, float, str or tuple at the time of the call, or one whose
    default is None and whose type is in `optional` (w=float). ranges: {key: interval} that differ from RANGES.
    Raises UserError for an unknown key (with the nearest match), a wrong type, a missing file or a value out of range.
    """
    sys.excepthook = print_user_error
    if sys.stdout and not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
    script = os.path.basename(sys.argv[0])
    if process_rank()[1] > 1 and script not in DISTRIBUTED:
        raise UserError(f"one process is enough: start it with `python {script}`")
    kinds = {key: type(v) for key, v in namespace.items() if key.islower() and not key.startswith("_")}
    kinds = {key: kind for key, kind in kinds.items() if kind in (bool, int, float, str, tuple)} | optional
    defaults, given = {key: namespace[key] for key in kinds}, {}

    def set_key(key, value, where, reader):
        if key not in kinds:
            raise UserError(f"{where}: unknown key {key!r}: {hint(key, list(kinds))}")
        if kinds[key] is str and isinstance(value, bool):
            value = str(value)  # use_compile = True in a config file
        try:
            none = key in optional and value in (None, "None", "none")
            given[key] = None if none else reader(value, kinds[key])
        except TypeError:
            kind = kinds[key].__name__
            raise UserError(f"{where}: {key}={value!r} is not of type {kind} (default {defaults[key]!r})") from None

    for arg in sys.argv[1:]:
        if arg in ("--help", "-h"):
            print_help(namespace.get("__doc__") or "", defaults, optional)
            raise SystemExit(0)
        if not arg.startswith("-"):
            for key, (value, where) in run_config(arg).items():
                set_key(key, value, where, convert)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if not arg.startswith("--") or not equals:
            raise UserError(f"{arg!r}: write it as --{key or 'key'}=value")
        set_key(key, text, "flag", parse)
    config = defaults | given
    for key, interval in (RANGES | dict(ranges)).items():
        if type(config.get(key)) in (int, float):
            check_range(key, config[key], interval)
    for key in kinds.keys() & {"out_dir", "data_dir"}:
        check_folder(key, config[key], writable=key == "out_dir" and not config.get("synthetic_dir"))
    namespace.update(given)
    return config, given


def check_folder(key, path, writable):
    """Raises UserError, before any work is done, if path cannot be a folder to read, or to write to."""
    if path == "":
        raise UserError(f"{key} is empty: use {key}=. for the current folder")
    path = os.path.abspath(path)
    while not os.path.lexists(path) and os.path.dirname(path) != path:  # the latter: a drive that is not there
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise UserError(f"{key}: {path} is not a folder")
    if writable and not os.access(path, os.W_OK):
        raise UserError(f"{key}: no permission to write to {path}")


def apply_saved(saved, config, given, namespace, fixed, log=print):
    """Takes over the settings saved with a checkpoint, unless given. Those in `fixed`, a set, must not change."""
    if missing := (fixed & config.keys()) - saved.keys():
        raise KeyError(", ".join(sorted(missing)))
    for key, old in saved.items():
        if key in ("init_from", "out_dir", "device", "use_compile") or key not in config or given.get(key) == old:
            continue
        if key not in given:
            if type(old) is not type(config[key]) and None not in (old, config[key]):
                raise TypeError(f"{key}={old!r}")
            config[key] = namespace[key] = old
        elif key in fixed:
            raise UserError(f"{key}: checkpoint {old!r}, flag {given[key]!r}: it cannot change")
        else:
            log(f"{key} changes from the checkpoint's {old!r} to {given[key]!r}")


def catch_signals():
    """A list to which the first Ctrl-C, SIGTERM or SIGHUP is appended, for a loop to end on. A second one is final."""
    caught = []

    def stop(signum, frame):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last, a closed terminal, is not on Windows
        signum = getattr(signal, name, None)
        if signum and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):  # nohup ignores it
            signal.signal(signum, stop)
    return caught


def process_rank():
    """(rank, world) of this process under torchrun, else (0, 1)."""
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def join_process_group(backend, **settings):
    """dist.init_process_group, which would hide what print_user_error prints."""
    dist.init_process_group(backend, **settings)
    sys.excepthook = print_user_error


def leave_process_group():
    """Ends a process of torchrun that has succeeded, after the others.

    At once, without the interpreter's shutdown: a thread of gloo that wants the interpreter then aborts the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Output:
    """A stream that cannot end a run: it drops what nobody reads any more (`| head`), and replaces what a console's
    encoding lacks.
    """

    def __init__(self, stream):
        self.stream = stream
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def lock_folder(folder):
    """Makes a folder and locks it until this process ends. Raises UserError if another process has locked it."""
    os.makedirs(folder, exist_ok=True)
    if (path := os.path.realpath(folder)) in locked:
        return
    try:
        import fcntl

        locked.add(path)
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locked.remove(path)
        raise UserError(f"{folder} is in use by another process: wait for it, or use another folder") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass


def print_help(doc, defaults, optional):
    comments = settings_in(os.path.join(HERE, "train.py")) | settings_in(sys.argv[0])
    print(f"{doc.strip()}\n\nkeys (--key=value):")
    for key, value in defaults.items():
        kind = f"({optional[key].__name__}) " if key in optional else ""
        print(f"  {f'{key}={value!r}':36s} {kind}{comments.get(key, ('', ''))[1]}".rstrip())


def print_user_error(kind, error, trace):
    """The excepthook of the scripts: one line and exit status 2 for an error that the user can fix."""
    if issubclass(kind, torch.OutOfMemoryError):
        error = "out of memory: lower batch_size (in training, raise grad_accum to keep the batch)"
    elif kind is KeyboardInterrupt:
        error = "interrupted"
    elif issubclass(kind, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(2)


def duration(seconds):
    """12 s, 3.4 min, 5.6 h or 7.8 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def progress(title, share, start):
    """Shows on one line how much is done (0..1) and the time left. Silent unless stderr is a terminal."""
    if sys.stderr.isatty():
        left = duration((time.time() - start) * (1 - share) / max(share, 1e-9))
        print(f"\r{title}: {share:4.0%}, {left} left    ", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# models and devices


def open_model(out_dir, ema, device, amp_dtype):
    """load_model of out_dir's checkpoint. Where the default out_dir, `out`, has none, of the pretrained weights."""
    path, note = os.path.join(out_dir, "ckpt.pt"), ""
    pretrained = sorted(glob.glob(f"{glob.escape(HERE)}/weights/*.pt"))
    if os.path.basename(os.path.normpath(out_dir)) == "out" and pretrained and not os.path.exists(path):
        path, note = pretrained[0], f"{out_dir} holds no checkpoint, using the pretrained weights "
    model, info = load_model(path, ema, device, amp_dtype)
    return model, info | {"description": f"{note}{info['description']}; {device}, {dtype_name(amp_dtype)}"}


def resolve_guidance(w, guidance_scale, default, model):
    """w from two settings, w or guidance_scale = 1 + w. Without either: the default, or 0 without a null label."""
    if w is not None and guidance_scale is not None:
        raise UserError("give w or guidance_scale (= 1 + w), not both")
    if guidance_scale is not None:
        return round(guidance_scale - 1, 12)  # 1.3 - 1 is not 0.3 in binary
    return w if w is not None else default if model.K and model.config.p_uncond > 0 else 0.0


def describe_sampling(w, interval, sampler, steps, seed, **others):
    """One line about how images are sampled, with guidance in both conventions."""
    within = f"interval {tuple(interval)}, " if interval and w > 0 else ""
    return f"w={w:g} (guidance_scale={1 + w:g}), {within}{sampler}, {steps} steps, seed {seed}"


def dtype_name(amp_dtype):
    return str(amp_dtype or torch.float32).removeprefix("torch.")


def cpu_has_bfloat16():
    """Whether runs are on a CPU that computes in bfloat16, nearly twice as fast as in float32."""
    return not torch.cuda.is_available() and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def keep_freed_memory():
    """Tells glibc to keep freed memory: returning it and faulting it in again is 10% of a training step on a CPU."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def resolve_compile(use_compile, device):
    """Whether to use torch.compile; auto: on a GPU where it works. Raises UserError for True where it does not.

    It needs a compiler of C or C++, which is often missing, and on a GPU triton.
    """
    if use_compile == "False" or (use_compile == "auto" and not device.startswith("cuda")):
        return False
    fault = ""
    if device.startswith("cuda") and (not find_spec("triton") or torch.cuda.get_device_capability() < (7, 0)):
        fault = "torch.compile needs triton and compute capability 7"
    else:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
        except Exception as e:
            reason = str(e).strip().partition("\n")[0][:100]
            fault = f"torch.compile fails here ({type(e).__name__}: {reason})"
    if fault and use_compile == "True":
        raise UserError(f"use_compile: {fault}")
    if fault:
        print(f"{fault}: running eagerly", file=sys.stderr)
    return not fault


def setup_device(device="auto", dtype="auto", use_compile="auto"):
    """Resolves three settings to (device, autocast dtype or None, compile or not), and prepares the device.

    auto: cuda, mps or cpu, under torchrun the GPU of this process; bfloat16 if the GPU has it, float16 on an older one,
    no autocast on cpu and mps; compile on cuda where that works. Raises UserError for a device that is not there.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind, _, index = device.partition(":")
    check_choice("device", kind, ("cuda", "mps", "cpu"))
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    check_choice("use_compile", str(use_compile), ("auto", "True", "False"))
    if kind == "cuda":
        index, count = index or os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        device = f"cuda:{index}"
        if not index.isdigit() or int(index) >= count:
            raise UserError(f"device: {device!r} is not available (GPUs: {count}): use fewer processes or --device=cpu")
        torch.cuda.set_device(int(index))  # for all calls that name no GPU
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif kind == "mps" and not mps:
        raise UserError(f"device: {device!r} is not available: use --device=cpu or auto")
    elif kind == "cpu":
        keep_freed_memory()
    if dtype == "auto":
        dtype = "float32" if kind != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    return device, None if dtype == "float32" else getattr(torch, dtype), resolve_compile(str(use_compile), device)
