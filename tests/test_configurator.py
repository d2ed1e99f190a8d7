"""Settings: defaults, config files, flags, their types and ranges."""

import functools
import io
import os
import sys

import pytest
import torch
from conftest import HERE, finish, path_of

import configurator
from ddpm import UserError

SCRIPTS = ("train", "sample", "augment", "classifier", "evaluate", "plot", "gan", "resnet", "ablate", "bench")
FLAGS = "nan inf -inf -1 0 0.5 1e400 1e-400 None True [] () {} 1,, 1,2 [[1]] a ' \\ ~ 1j ² __import__('os')".split()
FLAGS += ["", " ", "1\n2", "4294967296", "-4294967297", "9" * 400, "9" * 5000, "-" * 5000 + "1", "(" * 5000, "1," * 99]
FILES = "10**400 -(10**5000) float('nan') b'x' 'a\\0' None [None] [float('inf')] {} object".split()


@pytest.fixture
def configure(monkeypatch):
    """configure(*arguments, script=path): what configurator.configure returns for a script's settings."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(configurator, "settings_in", functools.cache(configurator.settings_in))

    def configure(*arguments, script=f"{HERE}/train.py", also=None):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        return configurator.configure({"__file__": script, "above": 1}, also)

    return configure


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_key_with_its_default_and_comment(script, run):
    lines = run(script, "--help").split("keys (--key=value):")[1].splitlines()
    for key, (default, comment) in configurator.settings_in(path_of(script)).items():
        assert any(line.startswith(f"  {key}={default!r}") and line.endswith(comment) for line in lines), key


def test_settings_are_the_lines_of_the_block_and_nothing_else(tmp_path, configure):
    script, rule = tmp_path / "script.py", "# " + "-" * 117
    block = "# comment\nw = None  # of w\nlr = 0.5"
    script.write_text(f"above = 1\n{rule}\n{block}\n{rule}\nbelow = 2\n{rule}\nlast = 3\n")
    assert configure(script=script) == ({"w": None, "lr": 0.5}, {})
    for name in ("above", "below", "last", "comment"):
        with pytest.raises(UserError, match=f"unknown key '{name}': --help lists the keys"):
            configure(f"--{name}=1", script=script)
    config, given = configure("--batch_size=3", script=script, also="train.py")
    assert config["lr"] == 0.5 and config["ch"] == 128 and given == {"batch_size": 3}


def test_files_and_flags_count_in_order_and_convert(tmp_path, configure):
    first, second = tmp_path / "a=b.py", tmp_path / "c.py"
    first.write_text("import math as _math\nlr = 1\nch = 8.0\nattn_resolutions = [1, 2]\nseed = int(_math.pi)\n")
    second.write_text("lr = 2\n")
    given = configure(str(first), str(second), "--max-iters=1e5", "--dataset=a=b")[1]
    assert str(given) == str(dict(lr=2.0, ch=8, attn_resolutions=(1, 2), seed=3, max_iters=100_000, dataset="a=b"))
    second.write_text("w = None\n")
    given = configure(str(second), "--guidance_scale=None", "--ema=false", "--interval=", script=path_of("sample"))[1]
    assert given == dict(w=None, guidance_scale=None, ema=False, interval=())


def test_config_files_as_people_write_them(tmp_path, configure, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.py"
    file.write_bytes(b"\xef\xbb\xbfuse_compile = True\r\nout_dir = '~/runs'\r\n")  # as Windows editors write
    assert configure("~/c.py")[1] == dict(use_compile="True", out_dir=f"{tmp_path}/runs")
    assert configure("config/shapes.py", "--data_dir=~")[1]["data_dir"] == str(tmp_path)
    for text in ("exit()", "import sys; sys.exit()", "lr = 1 / 0", "lr = = 1", "lr = '\0'", "for i in 1,: lrr = 2"):
        file.write_text(text)
        with pytest.raises(UserError, match="c.py: (SystemExit|ZeroDivision|Syntax|Value|unknown key 'lrr')"):
            configure(str(file))
    others = "from math import pi, sqrt\nimport os\nclass A: x = 1\ndef f(): y = 2; return y\n"
    file.write_text(others + "lr = 1e-3 * sqrt(4)")
    (tmp_path / "base.py").write_text("seed, batch_size = 3, 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert configure(str(file))[1] == dict(lr=0.002)  # what is imported or defined is no setting, but
    file.write_text("from base import *\nseed += 1\n")
    assert configure(str(file))[1] == dict(seed=4, batch_size=4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_takes_a_value_of_its_type_and_range_or_names_the_key(script, tmp_path, configure):
    file, taken, script = tmp_path / "c.py", 0, path_of(script)
    for key, default in configure(script=script)[0].items():
        kind = float if default is None else type(default)
        for value in FLAGS + FILES:
            argument = f"--{key}={value}"
            if value in FILES:
                file.write_text(f"{key} = {value}\n")
                argument = str(file)
            try:
                got = configure(argument, script=script)[0][key]
            except UserError as e:
                assert str(e).startswith((f"{argument}: {key} is not of type", f"{argument}: {key} must be"))
                continue
            taken += 1
            assert (type(got) is kind and "\0" not in str(got)) or got is default is None
            for number in got if kind is tuple else [got] * (type(got) in (int, float)):
                assert (-(2**32) if default is None else 0) <= number < 2**32
    assert taken > len(FLAGS)


def test_a_real_command_line_works_anywhere_and_imports_little(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = finish("train", "config/shapes.py", "--dataset=nowhere", cwd=tmp_path, env=env)
    imports = {line for line in done.stderr.splitlines() if line.startswith("import time:")}
    (error,) = set(done.stderr.splitlines()) - imports
    assert (done.returncode, done.stdout) == (2, "") and error.startswith("train.py: dataset 'nowhere' is neither")
    names = {line.split("|")[-1].strip() for line in imports}  # what only some runs need is imported when it is needed
    assert "torch" in names and not names & {"torchvision", "PIL", "matplotlib", "torch._dynamo"}


def test_errors_are_one_line_and_a_bug_keeps_its_traceback(capfd, configure, monkeypatch):
    no_memory = MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate")
    for error in (*no_memory, UserError("out of\nmemory: lower batch_size")):
        with pytest.raises(SystemExit, match="2"):
            configurator.print_user_error(type(error), error, None)
        assert "out of memory: lower batch_size" in capfd.readouterr().err.splitlines()[0]
    configurator.print_user_error(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capfd.readouterr().err
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    configure()
    print("größe", flush=True)  # a name that the console cannot show
    assert sys.stdout.buffer.getvalue() == b"gr??e\n"
