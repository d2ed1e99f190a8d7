"""ablate.py: the commands of a study, its table, and a study that is killed."""

import os
import re
import shlex
import signal
import sys
import time

import pytest
from conftest import TIMEOUT, path_of, start

import data
from configurator import run_config, settings_in
from lab import ablate


def planned(run, *words):
    """The commands of a study: (title and seed, script, {key: text}) of each."""
    lines = run("ablate", *words, "--dry_run=True").splitlines()[1:]
    parts = [re.fullmatch(r"(.*, seed \d+): python (?:-m lab\.)?(\w+)(?:\.py)? (.*)", line).groups() for line in lines]
    return [(cell, script, dict(re.findall(r"--(\w+)=(.*)", "\n".join(shlex.split(s))))) for cell, script, s in parts]


@pytest.mark.parametrize("study", ablate.STUDIES)
def test_dry_run_lists_every_command_with_settings_that_exist(study, run):
    cells = dict(schedules=12, gan=8, mistuned=10, sizes=5, ema_guidance=4, timesteps=4, linear_cosine=2).get(study, 3)
    scripts = {}
    for cell, script, settings in planned(run, study, "--seeds=2"):
        scripts.setdefault(cell, []).append(script)
        assert settings.keys() <= settings_in(path_of(script)).keys()
        assert script not in ("train", "gan") or int(settings["max_iters"]) > 0
    assert len(scripts) == 2 * cells
    for commands in scripts.values():
        assert commands[: -2 if study == "gan" else -1] in (["train", "augment"], ["gan"])


def test_seeds_differ_and_models_are_shared(run):
    def models(*words):
        return {(cell, s["seed"], s["out_dir"]) for cell, script, s in planned(run, *words) if script == "train"}

    folders = [{folder for _, seed, folder in models("ema_guidance", "--seeds=2") if seed == k} for k in "01"]
    assert len(folders[0]) == len(folders[1]) == 1 and folders[0] != folders[1]
    other = {cell: folder for cell, _, folder in models("linear_cosine")}
    assert folders[0] == {other["cosine, seed 0"]} != {other["linear, seed 0"]}  # the recipe's own cell, in any study
    assert folders[0].isdisjoint(folder for _, _, folder in models("ema_guidance", "--max_iters=9"))


def test_a_cells_settings_reach_the_script_that_has_them(run):
    by = {(cell, script): settings for cell, script, settings in planned(run, "mistuned", "--max_iters=9", "--n=55")}
    assert by["one step, seed 0", "augment"]["steps"] == "1" and "steps" not in by["one step, seed 0", "train"]
    guided = by["guidance w = 12 at every step, seed 0", "augment"]
    assert (guided["w"], guided["interval"], guided["per_class"]) == ("12.0", "", "6")
    assert by["lr 10 times too large, seed 0", "train"]["lr"] == "0.02"
    assert {s["max_iters"] for (_, script), s in by.items() if script == "train"} == {"9"}
    right = planned(run, "mistuned")[0][2]  # the quick start itself
    assert right.keys() == {"max_iters", "seed", "data_dir", "out_dir", "device"}
    assert right["max_iters"] == str(run_config("config/shapes.py")["max_iters"])
    by = {(cell, script): settings for cell, script, settings in planned(run, "conditional")}
    cats, both = (by[f"cats, trained on {images}, seed 0", "evaluate"] for images in ("cats", "both"))
    assert cats["classes"] == both["classes"] == "cat" and cats["samples"] != both["samples"]


def test_the_table():
    scores = dict(fd=None, precision=0.5, recall=0.25, images=640, val_loss=0.1, n=100, machine="here")
    real = dict(n=100, kd=-0.001)
    runs = [scores | dict(title="a", seed=k, kd=0.01 * (k + 1), real=real, classes="cat") for k in range(2)]
    runs.append(scores | dict(title="b", seed=0, kd=0.01, real=real, classes="cat,frog"))
    runs.append(scores | dict(title="c", seed=0, kd=0.01, real=dict(n=50, kd=-0.002), classes="frog", machine="there"))
    content = dict(study=dict(config="config/shapes.py", loss=True), command="a command", runs=runs)
    text = ablate.table("mistuned", content)
    assert text.startswith("`a command`, config/shapes.py; here; there.\n")
    assert "| a | 2 | 100 | 640 |  | 15.00 ± 5.00 | 0.500 ± 0.000 | 0.250 ± 0.000 | 0.1000 ± 0.0000 |" in text
    assert all(f"| real images {classes} |  | 100 |  |  | -1.00 |" in text for classes in ("cat", "cat,frog"))
    assert "-2.00" not in text  # nor real images that are fewer than n


def start_study(shards, root, *flags):
    """ablate.py with a study of two tiny cells, as a process group."""
    base = dict(dataset=f"{shards}/shapes", max_iters=12, ch=8, batch_size=4, log_interval=1, sample_interval=0)
    cells = {"DDPM": dict(timesteps=20, beta_end=0.6, eval_interval=5, steps=3), "DCGAN": dict(script="gan")}
    study = dict(config="config/shapes.py", base=base, n=(20,), cells=cells)
    code = f"from lab import ablate; ablate.STUDIES['tiny'] = {study}; ablate.main()"
    words = [sys.executable, "-c", code, "tiny", "--device=cpu", *flags]
    return start(words, cwd=root, start_new_session=True)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_results(shards, tmp_path):
    found, kills = {}, [("train-*/log.txt", 8), ("gan-*/log.txt", 5)]  # after so many lines
    for way in ("whole", "killed"):
        (root := tmp_path / way).mkdir()
        for path, n in kills if way == "killed" else ():
            process = start_study(shards, root)
            while sum(p.read_text().count("\n") for p in root.glob(f"out-ablate/{path}")) < n:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = (process := start_study(shards, root)).communicate(timeout=TIMEOUT)[0]
        assert process.returncode == 0, text
        found[way] = [r | dict(machine="") for r in data.read_json(f"{root}/out-ablate/tiny.json")["runs"]]
        assert (root / "out-ablate" / "tiny.md").read_text().count("\n| ") == 5  # title, rule, cells, real images
    assert found["whole"] == found["killed"] and [r["title"] for r in found["whole"]] == ["DDPM", "DCGAN"]
    failing = "--results_dir=b --max_iters=7 --device=cpu:x"
    for flags, said in ("", "wrote"), ("--n=21", "was made with other settings"), (failing, "failed: see out-ablate/"):
        text = (process := start_study(shards, root, *flags.split())).communicate(timeout=TIMEOUT)[0]
        assert said in text and len(text.splitlines()) == 2, text  # nothing is made again
        assert process.returncode == (0 if said == "wrote" else 2)
