"""Studies: trains the cells of a comparison, samples and scores each, and writes a table and an image.

python ablate.py mistuned                       a gallery of mistakes on generated shapes
python ablate.py schedules --seeds=2            two training runs of each cell; mean ± standard error in the table
python ablate.py schedules --dry_run=True       lists the cells, their commands and the expected time
python ablate.py report                         writes the tables of results/ into RESULTS.md

Every cell runs train.py (or gan.py), augment.py and evaluate.py as its own processes, with the same budget; cells of
the same script sample from the same noise. Resumable: run the same command again, even after kill -9.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from configurator import HERE, catch_signals, configure, defaults_of, duration, lock_folder, run_config
from data import load_array, read_json, save_json, tile
from ddpm import LOSSES, SCHEDULES, UserError, atomic_write, check_choice, load_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
seeds = 1  # training runs of each cell
seed = 0  # the first of them
minutes = 0.0  # of training, each cell; 0: the study's
max_iters = 0  # steps of each cell instead of minutes; 0: from the minutes
n = 0  # images to sample and score, each cell; 0: the study's
data_dir = "data"
work_dir = "out-ablate"  # checkpoints, samples and logs; can be deleted when a study is done
results_dir = "out-ablate"  # STUDY.json, STUDY.md and STUDY.png
device = "auto"  # cuda, mps, cpu
dry_run = False
# ---------------------------------------------------------------------------------------------------------------------
# A study: config, base (settings of all cells), cells ({title: settings}), and how they are compared.
#   Settings are keys of train.py (or of another `script`) and, if train.py does not have them, of augment.py.
#   n: numbers of images to score. score: sample and score only these classes. share: of the budget.
#   equal: images (the first cell sets how many steps all take) or minutes (each cell's speed is measured, except that
#   of a cell `like` another, which takes as many steps). loss: validation losses can be compared.

CIFAR = dict(config="config/cifar_small.py", minutes=15, n=(2000,))
CATS = dict(config="config/cats_frogs.py", minutes=10, n=(1000,))
CATS_ALONE = dict(classes="cat", conditional=False)
CATS_AND_FROGS = dict(classes="cat,frog", conditional=True)
UNGUIDED_DDPM = dict(script="train.py", w=0.0)
STUDIES = {
    "schedules": dict(
        config="config/fashion_mnist.py",
        minutes=10,
        n=(2000,),
        cells={f"{s}, {loss}": dict(schedule=s, loss=loss) for s in SCHEDULES for loss in LOSSES},
    ),
    "linear_cosine": CIFAR | dict(cells={s: dict(schedule=s) for s in ("linear", "cosine")}),
    "weighting": CIFAR | dict(cells={w: dict(weighting=w) for w in ("simple", "vlb", "min_snr")}),
    "objective": CIFAR | dict(cells={o: dict(objective=o) for o in ("eps", "v", "x0")}),
    "timesteps": CIFAR | dict(cells={f"T = {T}": dict(timesteps=T) for T in (100, 500, 1000, 1500)}),
    "sizes": CATS
    | dict(
        base=CATS_ALONE,
        equal="minutes",
        loss=True,
        cells={
            "2 levels, ch 64": {},
            "3 levels, ch 64": dict(ch_mult=(1, 2, 2)),
            "2 levels, ch 32": dict(ch=32),
            "3 levels, ch 32": dict(ch=32, ch_mult=(1, 2, 2)),
            "plain CNN": dict(arch="cnn"),
        },
    ),
    "ema_guidance": CIFAR
    | dict(cells={f"{'EMA' if e else 'raw'}, w = {w:g}": dict(ema=e, w=w) for e in (True, False) for w in (0.0, 1.8)}),
    "conditional": CATS
    | dict(
        base=dict(w=0.0),  # a model of one class cannot be guided
        cells={
            "cats, trained on cats": CATS_ALONE | dict(score="cat"),
            "cats, trained on both": dict(score="cat"),
            "frogs, trained on both": dict(score="frog"),
        },
    ),
    "gan": CATS
    | dict(
        n=(1000, 5000),
        base=CATS_ALONE | dict(script="gan.py"),
        equal="minutes",
        cells={
            "DCGAN, cats": {},
            "half the time": dict(share=0.5, like="DCGAN, cats"),
            "label smoothing": dict(label_smoothing=0.1, like="DCGAN, cats"),
            "noised inputs": dict(input_noise=0.1, like="DCGAN, cats"),
            "both": dict(label_smoothing=0.1, input_noise=0.1, like="DCGAN, cats"),
            "DDPM, cats": UNGUIDED_DDPM,
            "conditional DCGAN, cats + frogs": CATS_AND_FROGS | dict(like="DCGAN, cats"),
            "conditional DDPM, cats + frogs": UNGUIDED_DDPM | CATS_AND_FROGS | dict(like="DDPM, cats"),
        },
    ),
    "mistuned": dict(
        config="config/shapes.py",
        base=dict(schedule="linear"),
        minutes=2,
        n=(500,),
        cells={
            "as it should be": {},
            "lr 10 times too large": dict(lr=2e-2),
            "beta_end too small": dict(beta_end=0.004),
            "beta_end too large": dict(beta_end=0.5),
            "T = 50 with T = 500's betas": dict(timesteps=50),
            "half of the labels dropped": dict(p_uncond=0.5),
            "no EMA": dict(ema=False),
            "guidance w = 12 at every step": dict(w=12.0, interval=()),
            "one step": dict(steps=1),
        },
    ),
}
CELL_KEYS = dict(script="train.py", share=1, score="", like="")  # a cell's other keys, with their defaults
SAMPLING = defaults_of("augment.py").keys() - defaults_of("train.py").keys()


# ---------------------------------------------------------------------------------------------------------------------
# processes


# In a child, on Linux: SIGTERM when the parent is gone, even by kill -9 (1 is PR_SET_PDEATHSIG).
BEFORE_START = (lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)) if sys.platform == "linux" else None


def run(command, log):
    """Runs a command with its output appended to a file, and passes a signal on to it. Raises UserError if it fails."""
    with open(log, "ab") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, preexec_fn=BEFORE_START)
    while process.poll() is None and not signals:
        time.sleep(0.2)
    if signals:
        process.terminate()  # once: a second signal would end it before it saves
        process.wait()
    check_ended(process.returncode, command, log)


def check_ended(status, command, log):
    """Raises UserError after a signal, or, if the process failed by itself, with the last line of its log."""
    if signals:
        raise UserError("stopped by a signal: run the same command again to continue")
    if status:
        with open(log, encoding="utf-8", errors="replace") as f:
            last = (f.read().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{' '.join(command[1:3])} … failed: {last} (see {log})")


def steps_per_second(command, log):
    """The speed of a training command over 20 seconds, from its log lines; it is killed then."""
    with open(log, "wb") as f:
        process = subprocess.Popen([*command, "--log_interval=5"], stdout=f, stderr=f, preexec_fn=BEFORE_START)
    marks = []  # (time, step) of each new line
    while process.poll() is None and not signals and (len(marks) < 3 or time.time() - marks[0][0] < 20):
        time.sleep(0.2)
        with open(log, encoding="utf-8", errors="replace") as f:
            steps = [0, *map(int, re.findall(r"^step +(\d+)", f.read(), re.M))]
        if steps[-1] > (marks[-1][1] if marks else 0):
            marks.append((time.time(), steps[-1]))
    status = process.poll()
    process.kill()
    process.wait()
    check_ended(status, command, log)
    if len(marks) < 3:
        raise UserError(f"{' '.join(command[1:3])} … takes too few steps to be timed (see {log})")
    (start, first), (end, last) = marks[0], marks[-1]
    return (last - first) / (end - start)


def flags(**settings):
    """Settings as command-line flags."""
    return [f"--{key}={','.join(map(str, v)) if isinstance(v, (tuple, list)) else v}" for key, v in settings.items()]


# ---------------------------------------------------------------------------------------------------------------------
# a study


def slug(text):
    """A title as a file name."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", text).strip("-")


def make_plan(study, recipe, folder):
    """A dict for each seed and cell: its title, folders, and the commands that train, sample and score it.

    recipe: train.py's settings with those of the study's config. Cells share a model when they differ only in sampling;
    with max_iters, also those of different studies.
    """
    plan, model_of, models = [], {}, f"{work_dir}/models-{max_iters}" if max_iters else f"{folder}/models"
    digest = hashlib.sha256(repr(sorted(recipe.items())).encode()).hexdigest()[:6]
    for k in range(seed, seed + seeds):
        for title, own in study["cells"].items():
            settings = study.get("base", {}) | own
            sampling = {key: settings.pop(key) for key in SAMPLING & settings.keys()}
            script, share, score, like = (settings.pop(key, default) for key, default in CELL_KEYS.items())
            settings = {key: v for key, v in settings.items() if script != "train.py" or recipe.get(key) != v}
            of_budget = "" if share == 1 else f"{share} of "
            model = slug(f"{of_budget}{study['config']} {script} {settings or ''} {digest}")
            model_dir, cell_dir = f"{models}/{model}-{k}", f"{folder}/cell-{slug(title)}-{k}"
            where = dict(out_dir=model_dir, data_dir=data_dir, device=device)
            config = [study["config"]] if script == "train.py" else []
            train = [*python(script), *config, *flags(**settings, seed=k, **where)]
            resume = [*python(script), *flags(init_from="resume", **where)]
            if script == "train.py":
                checkpoint, synthetic = f"{model_dir}/ckpt.pt", f"{cell_dir}/synthetic"
                options = dict(out_dir=model_dir, synthetic_dir=synthetic, device=device, classes=score)
                sample = [*python("augment.py"), *flags(**options, **sampling)]
            else:  # it samples itself
                checkpoint, synthetic, sample = f"{model_dir}/gan.pt", f"{model_dir}/synthetic", resume
            classes = score or settings.get("classes", recipe["classes"])
            real = dict(dataset=recipe["dataset"], classes=classes, data_dir=data_dir, device=device)
            score_flags = flags(samples=synthetic, out_dir=cell_dir, cache_dir=f"{work_dir}/features", **real)
            evaluate = {
                count: [*python("evaluate.py"), *score_flags, *flags(n=count, allow_small_n=count <= 1280)]
                for count in study["n"]
            }
            model_of[title] = model
            cell = dict(title=title, seed=k, model=model, share=share, like=model_of.get(like))
            cell |= dict(classes=classes, score=score)
            cell |= dict(model_dir=model_dir, cell_dir=cell_dir, checkpoint=checkpoint, synthetic=synthetic)
            plan.append(cell | dict(train=train, resume=resume, sample=sample, evaluate=evaluate))
    return plan


def python(script):
    return [sys.executable, f"{HERE}/{script}"]


def steps_done(cell):
    """How many steps the cell's model was trained for; 0 without a checkpoint."""
    return load_checkpoint(cell["checkpoint"], ("step",))["step"] if os.path.exists(cell["checkpoint"]) else 0


def train_cell(cell, content, save):
    """Trains a cell's model, or goes on with it, for the steps of the study's budget."""
    budgets = content["budgets"]  # {model: its steps}
    first = next(iter(budgets.values()), None)
    if cell["model"] not in budgets:
        if max_iters:
            budgets[cell["model"]] = round(cell["share"] * max_iters)
        elif first and content["study"].get("equal", "images") == "images":
            budgets[cell["model"]] = first
        elif cell["like"] in budgets:
            budgets[cell["model"]] = math.ceil(cell["share"] * budgets[cell["like"]])
        else:
            trial = f"{cell['model_dir']}-trial"
            shutil.rmtree(trial, ignore_errors=True)
            os.makedirs(trial)
            speed = steps_per_second([*cell["train"], f"--out_dir={trial}"], f"{trial}.txt")
            shutil.rmtree(trial)
            budgets[cell["model"]] = math.ceil(60 * content["minutes"] * cell["share"] * speed)
        save()
    steps = budgets[cell["model"]]
    if steps_done(cell) < steps:
        os.makedirs(cell["model_dir"], exist_ok=True)
        how = "resume" if os.path.exists(cell["checkpoint"]) else "train"
        run([*cell[how], f"--max_iters={steps}"], f"{cell['model_dir']}/log.txt")
        if (done := steps_done(cell)) < steps:
            raise UserError(f"the training stopped at step {done} of {steps}")


def sample_and_score(cell):
    """What the table needs of a trained cell: a dict for each n."""
    checkpoint = load_checkpoint(cell["checkpoint"], ("config", "step", "history"))
    K = checkpoint.get("model_args", checkpoint)["num_classes"]
    per_class = math.ceil(max(cell["evaluate"]) / (len(cell["score"].split(",")) if cell["score"] else max(1, K)))
    os.makedirs(cell["cell_dir"], exist_ok=True)
    log = f"{cell['cell_dir']}/log.txt"
    run([*cell["sample"], f"--per_class={per_class}"], log)
    result = {key: cell[key] for key in ("title", "seed", "classes")} | dict(steps=checkpoint["step"])
    result |= dict(images=checkpoint["step"] * checkpoint["config"]["batch_size"])
    result |= dict(val_loss=(checkpoint["history"].get("val_loss") or [None])[-1])
    results = []
    for command in cell["evaluate"].values():
        run(command, log)
        samples, real = read_json(f"{cell['cell_dir']}/evaluate.json")["scores"].values()
        results.append(result | samples | dict(real=real, machine=machine()))
    return results


def mean_text(values, scale, digits):
    """Mean ± standard error of the scaled values; no error for counts (digits 0)."""
    if any(v is None for v in values):
        return ""
    values = [scale * v for v in values]
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if digits and len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def shown_flags(name, content):
    """The flags of ablate.py that give the runs of a study's JSON."""
    study, used = content["study"], sorted({run["seed"] for run in content["runs"]})
    shown = dict(seed=used[0], seeds=len(used), minutes=content["minutes"], max_iters=content["max_iters"])
    shown |= dict(n=study["n"])
    usual = dict(seed=0, seeds=1, minutes=study["minutes"], n=list(STUDIES[name]["n"]))
    return flags(**{key: value for key, value in shown.items() if value and value != usual.get(key)})


def table(name, content, image):
    """The study as Markdown, with a link to its image."""
    study, cells = content["study"], {}
    for result in content["runs"]:
        cells.setdefault((result["title"], result["n"]), []).append(result)
    columns = {"n": ("n", 1, 0), "images seen": ("images", 1, 0), "FD": ("fd", 1, 2), "KD": ("kd", 1000, 2)}
    columns |= {"precision": ("precision", 1, 3), "recall": ("recall", 1, 3)}
    if study.get("loss"):
        columns["validation loss"] = ("val_loss", 1, 4)
    machines = "; ".join(dict.fromkeys(run.get("machine") or content["machine"] for run in content["runs"]))
    command = " ".join(["python ablate.py", name, *shown_flags(name, content)])
    lines = [f"`{command}`, {study['config']}; {machines}.", ""]
    lines += [f"| {' | '.join(['', 'seeds', *columns])} |", "| --- " * (len(columns) + 2) + "|"]

    def add_row(title, count, runs):
        texts = [mean_text([run.get(key) for run in runs], scale, digits) for key, scale, digits in columns.values()]
        lines.append(f"| {' | '.join([title, str(count), *texts])} |")

    for (title, _), runs in cells.items():
        add_row(title, len(runs), runs)
    for (classes, count), real in {(run["classes"], run["n"]): run["real"] for run in content["runs"]}.items():
        if real["n"] == count:  # not more than the test split holds
            add_row(f"real images {classes}".strip(), "", [real])
    return "\n".join([*lines, "", f"![{name}]({image})", ""])


def write_image(plan, content, path):
    """A row of ten images per finished cell of the first seed, from the same noise.

    Leaves the image alone if work_dir no longer has the samples of every cell.
    """
    finished = {(r["title"], r["seed"]) for r in content["runs"]}
    shown = [cell for cell in plan if (cell["title"], cell["seed"]) in finished and cell["seed"] == seed]
    paths = [f"{cell['synthetic']}/images_00000.npy" for cell in shown]
    if all(map(os.path.exists, paths)):
        tile(np.concatenate([load_array(p)[:10] for p in paths]), 10, [cell["title"] for cell in shown]).save(path)


def main(name):
    check_choice("ablate.py STUDY", name, (*STUDIES, "report"))
    if name == "report":
        return report(given.get("results_dir", "results"))
    study = STUDIES[name] | dict(n=[n] if n else STUDIES[name]["n"])
    recipe = defaults_of("train.py") | {key: value for key, (value, _) in run_config(study["config"]).items()}
    budget, folder, path = minutes or study["minutes"], f"{work_dir}/{name}", f"{results_dir}/{name}.json"
    settings = dict(study=study, recipe=recipe, minutes=None if max_iters else budget, max_iters=max_iters)
    settings = json.loads(json.dumps(settings | dict(torch=torch.__version__)))
    plan = make_plan(study, recipe, folder)
    trainings = len({cell["model_dir"] for cell in plan})
    length = f"{max_iters} steps" if max_iters else f"{budget:g} minutes (equal {study.get('equal', 'images')}), about "
    length += "" if max_iters else f"{duration(60 * (budget * trainings + 1.5 * len(plan)))} in all"
    print(f"{name}: {len(study['cells'])} cells x {seeds} seeds, {trainings} trainings of {length}")
    if dry_run:
        print("--max_iters of the trainings and --per_class of the samples are added when they are known")
        for cell in plan:
            for command in (cell["train"], cell["sample"], *cell["evaluate"].values()):
                print(f"{cell['title']}, seed {cell['seed']}: {shlex.join(['python', *command[1:]])}")
        return
    lock_folder(work_dir)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(results_dir, exist_ok=True)
    content = settings | dict(runs=[], budgets={})
    for earlier in (f"{folder}/settings.json", path):
        if os.path.exists(earlier):
            content |= (old := read_json(earlier))
            old["recipe"] = defaults_of("train.py") | old["recipe"]  # keys that train.py did not have yet
            if differing := [key for key, value in settings.items() if old.get(key) != value]:
                raise UserError(
                    f"{earlier} was made with another {differing[0]}: use another --results_dir and --work_dir"
                )
    content |= settings

    def save():
        save_json(path, content)
        save_json(f"{folder}/settings.json", settings | dict(budgets=content["budgets"]))

    start, made, failed = time.time(), 0, 0
    for i, cell in enumerate(plan):
        if any((r["title"], r["seed"]) == (cell["title"], cell["seed"]) for r in content["runs"]):
            continue
        try:
            train_cell(cell, content, save)
            content["runs"] += (results := sample_and_score(cell))
        except UserError as error:
            if signals:
                raise
            print(f"{cell['title']}, seed {cell['seed']}: {error}")
            failed += 1
            continue
        save()
        with atomic_write(f"{results_dir}/{name}.md") as f:
            f.write(table(name, content, f"{name}.png").encode())
        write_image(plan, content, f"{results_dir}/{name}.png")
        made += 1
        left = duration((time.time() - start) / made * (len(plan) - i - 1))
        kd = ", ".join(f"KD {1000 * result['kd']:.2f}" for result in results)
        print(f"{i + 1:3d} of {len(plan)}  {cell['title']}, seed {cell['seed']}: {kd}; {left} left")
    if failed:
        raise UserError(f"{failed} of {len(plan)} cells failed: the same command tries them again")
    print(f"wrote {path}, {results_dir}/{name}.md and {results_dir}/{name}.png")


def machine():
    """What a result needs beside its numbers: the commit, the machine and torch."""
    done = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit = done.stdout.strip() or "unknown"
    on = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available() and device != "cpu":
        on = torch.cuda.get_device_name()
    return f"commit {commit}, {on}, torch {torch.__version__}"


def report(folder):
    """Writes the table of every STUDY.json in a folder into RESULTS.md, between <!-- STUDY --> and <!-- end -->."""
    path = f"{HERE}/RESULTS.md"
    with open(path, encoding="utf-8") as f:
        text = f.read()
    found = [name for name in STUDIES if os.path.exists(f"{folder}/{name}.json")]
    if not found:
        raise UserError(f"no study in {folder}: use --results_dir=PATH")
    for name in found:
        filled = table(name, read_json(f"{folder}/{name}.json"), f"{folder}/{name}.png")
        section = f"<!-- {name} -->\n{filled}<!-- end -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _: section, text, flags=re.S)
        print(f"{name}: {'written' if count else f'RESULTS.md has no <!-- {name} --> … <!-- end -->'}")
    with atomic_write(path) as f:
        f.write(text.encode())


if __name__ == "__main__":
    NAME = next((arg for arg in sys.argv[1:] if not arg.startswith("-")), "")
    sys.argv = [arg for arg in sys.argv if arg != NAME]
    config, given = configure(globals(), dict(minutes="[0, inf)", max_iters="[0, inf)"))
    signals = catch_signals()
    sys.stdout.reconfigure(line_buffering=True)
    main(NAME)
