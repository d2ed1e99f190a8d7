"""What every script needs of the machine: device, processes, a lock, whole files, progress, and the model to sample."""

import contextlib
import ctypes
import datetime
import itertools
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import torch
import torch.distributed as dist

from configurator import HERE, print_user_error
from ddpm import UserError, check, check_choice, load_model

# ---------------------------------------------------------------------------------------------------------------------
# device


def setup_device(device="auto", dtype="auto", use_compile="auto"):
    """Resolves three settings to (device, autocast dtype or None, how to compile or {}), and prepares the device.

    auto: cuda, mps or cpu, under torchrun the GPU of this process; bfloat16 where GPU or CPU compute in it, float16 on
    an older GPU, else no autocast; compile on cuda where Triton is. channels_last: compile, with all convolutions in
    that memory layout. Raises UserError for a device that is not there.
    """
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = next(kind for kind in there if there[kind]) if device == "auto" else device
    kind, colon, index = device.partition(":")
    check_choice("device", kind, [kind for kind in there if there[kind]])
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    check_choice("use_compile", use_compile, ("auto", "True", "False", "channels_last"))
    check(kind == "cuda" or not colon, f"device: {device}: only CUDA devices have a number")
    if kind == "cuda":
        alone, count = os.environ.get("WORLD_SIZE", "1") == "1", torch.cuda.device_count()
        check(alone or not index, f"device: {device} for every process: with cuda, each takes a GPU of its own")
        rank = int(os.environ.get("RANK", "0")) % max(1, count)  # srun and mpirun set no LOCAL_RANK
        index = index or os.environ.get("LOCAL_RANK", str(rank))
        check(index in map(str, range(count)), f"device: cuda:{index} is not there (GPUs: {count})")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)  # for all calls that name no GPU
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not torch.version.hip  # AMD's search takes minutes for every new shape
        half = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    elif kind == "cpu":
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than glibc
            libc = ctypes.CDLL(None)  # to keep freed memory: faulting it in again is 10% of a training step
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
        half = "bfloat16" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "float32"
    dtype = dtype if dtype != "auto" else "float32" if kind == "mps" else half
    compiles = use_compile not in ("auto", "False") or use_compile == "auto" and kind == "cuda" and find_spec("triton")
    how = dict(dynamic=False) if compiles else {}
    if use_compile == "channels_last":
        how["options"] = dict(force_layout_optimization=True, layout_optimization=True)
    return device, None if dtype == "float32" else getattr(torch, dtype), how


def machine(device):
    """What a result needs beside its numbers: the commit, the machine and torch."""
    name, commit = platform.machine(), ""
    with contextlib.suppress(OSError):  # git is not there
        done = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = done.stdout.strip()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):  # Linux tells the model
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(": ")[1].strip() for line in f if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"commit {commit or 'unknown'}, {name}, {threads} threads, torch {torch.__version__}"


# ---------------------------------------------------------------------------------------------------------------------
# processes


def join_processes(device):
    """(rank, world) of this process under torchrun, after it has joined the others; (0, 1) without torchrun.

    It waits five minutes for them to start, then for days: rank 0 may have to decode a data set or make more shards.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    nccl = device.startswith("cuda") and dist.is_nccl_available()  # it is not on Windows
    how = dict(timeout=datetime.timedelta(days=20), device_id=torch.device(device) if nccl else None)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=5)))
        store.set_timeout(how["timeout"])
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=world, **how)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"the processes cannot reach each other: {str(e).splitlines()[0]}") from None
    sys.excepthook = print_user_error  # again: init_process_group wrapped it in a hook that loses the line it prints
    return rank, world


@contextlib.contextmanager
def rank_0_first(rank, world):
    """Runs a block in rank 0, which downloads or decodes what is missing, and then in the other processes."""
    if rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def leave_processes():
    """Ends a process of torchrun that has succeeded, after the others, before a thread of gloo can abort it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def catch_signals():
    """A list to which the first Ctrl-C or SIGTERM is appended, for a loop to end on. A second one is final."""
    caught = []

    def stop(signum, frame):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    return caught


# ---------------------------------------------------------------------------------------------------------------------
# files


def lock_folder(folder):
    """Makes a folder and locks it until this process ends. Raises UserError if another process has locked it."""
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(ImportError, OSError):  # Windows, a file system without locks
        import fcntl

        try:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check(False, f"{folder} is in use by another process: wait for it, or use another folder")


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file for writing and renames it to `path` at the end: `path` is complete at every moment.

    Raises UserError if the disk is full, or the like.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides it
        check(not isinstance(cause, OSError), f"cannot write {path}: {getattr(cause, 'strerror', '') or cause}")
        raise
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never there
            os.remove(temporary)


def new_path(path):
    """The path, or if that is taken path-2, path-3, … before the extension: a finished result is not replaced."""
    stem, extension = os.path.splitext(path)
    others = (f"{stem}-{k}{extension}" for k in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not os.path.exists(p))


# ---------------------------------------------------------------------------------------------------------------------
# what a person reads


def duration(seconds):
    """12 s, 3.4 min, 5.6 h or 7.8 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def progress(title, share, start):
    """Shows on one line how much is done (0..1) and the time left. Silent unless stderr is a terminal."""
    if sys.stderr and sys.stderr.isatty():
        left = duration((time.time() - start) * (1 - share) / max(share, 1e-9))
        print(f"\r{title}: {share:4.0%}, {left} left    ", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the model to sample


def open_model(out_dir, checkpoint, ema, device, amp_dtype):
    """load_model of a checkpoint; default: out_dir's, or the pretrained weights where the default out_dir has none."""
    path = checkpoint or os.path.join(out_dir, "ckpt.pt")
    if not checkpoint and os.path.normpath(out_dir) == "out" and not os.path.exists(path):
        path = os.path.join(HERE, "weights", "cifar_small.pt")
        print(f"{out_dir} holds no checkpoint: the pretrained weights are used")
    model, content = load_model(path, ema, device, amp_dtype)
    weights = f"{'averaged' if ema else 'raw'} weights{' and a guide' if model.guide else ''}"
    print(f"{path}, step {content['step']}, {weights}; {device}, {amp_dtype or 'float32'}")
    return model, content


def resolve_guidance(w, guidance_scale, default, model):
    """w from two settings, w or guidance_scale = 1 + w. Without either: the default, or 0 without a null label."""
    check(w is None or guidance_scale is None, "give w or guidance_scale (= 1 + w), not both")
    if guidance_scale is not None:
        return round(guidance_scale - 1, 12)  # 1.3 - 1 is not 0.3 in binary
    return w if w is not None else default if model.K and model.config.p_uncond > 0 else 0.0


def guidance_text(w, interval, model):
    """What a script says about guidance; nothing for an unconditional model."""
    where = f" for sigma in {list(interval)}" if interval and w > 0 else ""
    return f"w={w:g} (guidance_scale={1 + w:g}){where}, " if model.K else ""
