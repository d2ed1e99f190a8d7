"""Studies: trains the cells of a comparison, samples and scores each, and writes a table and an image.

python -m lab.ablate mistuned                       a gallery of mistakes on generated shapes
python -m lab.ablate schedules --seeds=2            two training runs of each cell; mean ± standard error in the table
python -m lab.ablate schedules --max_iters=100      shorter trainings, all of the same length
python -m lab.ablate schedules --dry_run=True       lists the cells and their commands

Every cell runs train.py (or lab.gan), augment.py and lab.evaluate as its own processes; cells of the same script
sample from the same noise. Resumable: run the same command again, even after kill -9.
"""

import hashlib
import math
import os
import shlex
import statistics
import subprocess
import sys
import time

import numpy as np

from configurator import HERE, configure, run_config, settings_in
from data import load_array, read_json, save_json, tile
from ddpm import LOSSES, SCHEDULES, check, check_choice, load_checkpoint
from runtime import atomic_write, duration, lock_folder, machine, setup_device

# ---------------------------------------------------------------------------------------------------------------------
seeds = 1  # training runs of each cell
seed = 0  # the first of them
max_iters = 0  # steps of every cell; 0: the study's
n = 0  # images to sample and score, each cell; 0: the study's
data_dir = "data"
work_dir = "out-ablate"  # checkpoints, samples and logs; can be deleted when a study is done
results_dir = "out-ablate"  # STUDY.json, STUDY.md and STUDY.png
device = "auto"  # cuda, mps, cpu
dry_run = False
# ---------------------------------------------------------------------------------------------------------------------
# A study: config, base (settings of all cells), cells ({title: settings}), n (numbers of images to score), and loss if
#   validation losses can be compared. Settings are keys of train.py (or of another `script`) and, if train.py does not
#   have them, of augment.py; and score: sample and score only these classes.
# max_iters: the steps of the committed results. In `sizes` and `gan` they are what one core did in equal minutes (10),
#   measured once; elsewhere all cells take equally many.

# EARLIER: the recipe of the committed results, except those of mistuned. Most configs have a newer one.
EARLIER = dict(schedule="cosine", objective="v", weighting="simple", optimizer="adamw", lr=1e-3)
CIFAR = dict(config="config/cats_frogs.py", base=EARLIER | dict(classes="", dropout=0.0, max_iters=3000), n=(2000,))
CATS = dict(config="config/cats_frogs.py", n=(1000,))
CATS_ALONE = dict(classes="cat", conditional=False)
CATS_AND_FROGS = dict(classes="cat,frog", conditional=True)
UNGUIDED_DDPM = EARLIER | dict(script="train", w=0.0, max_iters=1950)
STUDIES = {
    "schedules": dict(
        config="config/fashion_mnist.py",
        base=EARLIER | dict(max_iters=1000),
        n=(2000,),
        cells={f"{s}, {loss}": dict(schedule=s, loss=loss) for s in SCHEDULES[:4] for loss in LOSSES},
    ),
    "linear_cosine": CIFAR | dict(cells={s: dict(schedule=s) for s in ("linear", "cosine")}),
    "weighting": CIFAR | dict(cells={w: dict(weighting=w) for w in ("simple", "vlb", "min_snr")}),
    "objective": CIFAR | dict(cells={o: dict(objective=o) for o in ("eps", "v", "x0")}),
    "timesteps": CIFAR | dict(cells={f"T = {T}": dict(timesteps=T) for T in (100, 500, 1000, 1500)}),
    "sizes": CATS
    | dict(
        base=EARLIER | CATS_ALONE,
        loss=True,
        cells={
            "2 levels, ch 64": dict(max_iters=1765),
            "3 levels, ch 64": dict(max_iters=1495, ch_mult=(1, 2, 2)),
            "2 levels, ch 32": dict(max_iters=4305, ch=32),
            "3 levels, ch 32": dict(max_iters=3897, ch=32, ch_mult=(1, 2, 2)),
            "plain CNN": dict(max_iters=13122, arch="cnn"),
        },
    ),
    "ema_guidance": CIFAR
    | dict(cells={f"{'EMA' if e else 'raw'}, w = {w:g}": dict(ema=e, w=w) for e in (True, False) for w in (0.0, 1.8)}),
    "conditional": CATS
    | dict(
        base=EARLIER | dict(w=0.0, max_iters=2085),  # a model of one class cannot be guided
        cells={
            "cats, trained on cats": CATS_ALONE | dict(score="cat"),
            "cats, trained on both": dict(score="cat"),
            "frogs, trained on both": dict(score="frog"),
        },
    ),
    "gan": CATS
    | dict(
        n=(1000, 5000),
        base=CATS_ALONE | dict(script="gan", max_iters=1813),
        cells={
            "DCGAN, cats": {},
            "half the time": dict(max_iters=907),
            "label smoothing": dict(label_smoothing=0.1),
            "noised inputs": dict(input_noise=0.1),
            "both": dict(label_smoothing=0.1, input_noise=0.1),
            "DDPM, cats": UNGUIDED_DDPM,
            "conditional DCGAN, cats + frogs": CATS_AND_FROGS,
            "conditional DDPM, cats + frogs": UNGUIDED_DDPM | CATS_AND_FROGS,
        },
    ),
    "mistuned": dict(
        config="config/shapes.py",
        base=dict(max_iters=1000),  # the quick start's own recipe; its schedule has no beta_end
        n=(500,),
        cells={
            "as it should be": {},
            "lr 10 times too large": dict(lr=2e-2),
            "linear schedule, as it should be": dict(schedule="linear"),
            "linear, beta_end too small": dict(schedule="linear", beta_end=0.004),
            "linear, beta_end too large": dict(schedule="linear", beta_end=0.5),
            "linear, T = 50 with T = 500's betas": dict(schedule="linear", timesteps=50),
            "half of the labels dropped": dict(p_uncond=0.5),
            "no EMA": dict(ema=False),
            "guidance w = 12 at every step": dict(w=12.0, interval=()),
            "one step": dict(steps=1),
        },
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# commands: [script, *flags]


def path_of(script):
    """The file of a script: train, or lab's evaluate."""
    return next(path for path in (f"{HERE}/{script}.py", f"{HERE}/lab/{script}.py") if os.path.exists(path))


def flags(**settings):
    """Settings as command-line flags."""
    return [f"--{key}={','.join(map(str, v)) if isinstance(v, (tuple, list)) else v}" for key, v in settings.items()]


def shown(command):
    """A command as a person would type it."""
    script, *rest = command
    start = ["-m", f"lab.{script}"] if script in ("gan", "evaluate") else [f"{script}.py"]
    return shlex.join(["python", *start, *rest])


def run(command, log):
    """Runs a command with its output appended to a file. Raises UserError if it fails."""
    script, *rest = command
    process = [sys.executable, path_of(script), *rest]
    with open(log, "ab") as f:
        done = subprocess.run(process, stdout=f, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": HERE})
    check(done.returncode == 0, f"`{shown(command)}` failed: see {log}")


# ---------------------------------------------------------------------------------------------------------------------
# a study


def digest(*content):
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def make_cell(study, title, k):
    """A cell with seed k, as a dict: its folders, and the commands that train, sample and score it.

    A model's folder is named after the settings of its training: cells that differ only in sampling share it.
    """
    settings = study.get("base", {}) | study["cells"][title] | (dict(max_iters=max_iters) if max_iters else {})
    script, score = settings.pop("script", "train"), settings.pop("score", "")
    config = [study["config"]] if script == "train" else []
    defaults = {key: default for key, (default, _) in settings_in(path_of(script)).items()}
    recipe = defaults | (run_config(*config) if config else {}) | settings
    classes = score or recipe["classes"]
    C = len(classes.split(",")) if classes else 10  # of CIFAR-10, Fashion-MNIST and shapes
    settings["per_class"] = math.ceil(max(study["n"]) / (C if recipe["conditional"] else 1))

    # What the training script does not know is for augment.py. A GAN draws its set itself.
    sampling = {key: settings.pop(key) for key in list(settings) if key not in defaults}
    training = {key: v for key, v in (recipe | settings).items() if v != defaults.get(key) and key not in sampling}
    key = digest(script, training, sampling, score, study["n"])
    model_dir = f"{work_dir}/{script}-{digest(training)}-{k}"
    cell_dir = f"{model_dir}/{key}"
    samples = f"{cell_dir if sampling else model_dir}/synthetic"
    cell = dict(title=title, seed=k, key=key, classes=classes, script=script, steps=recipe["max_iters"])
    cell |= dict(images=cell["steps"] * recipe["batch_size"], model_dir=model_dir, cell_dir=cell_dir, samples=samples)

    model = dict(out_dir=model_dir, device=device)
    cell["train"] = [script, *config, *flags(**settings, seed=k, data_dir=data_dir, **model)]
    cell["resume"] = [script, *flags(init_from="resume", data_dir=data_dir, **model)]
    cell["measure"] = []
    if sampling:
        cell["measure"].append(["augment", *flags(**sampling, classes=score, synthetic_dir=samples, **model)])
    real = dict(dataset=recipe["dataset"], classes=classes, data_dir=data_dir, cache_dir=f"{work_dir}/features")
    real |= dict(samples=samples, out_dir=cell_dir, device=device)
    cell["measure"] += [["evaluate", *flags(**real, n=count)] for count in study["n"]]
    return cell


def is_trained(cell):
    """Whether the cell's model has taken all of its steps."""
    if cell["script"] == "gan":
        return os.path.exists(f"{cell['model_dir']}/synthetic/classes.json")  # what it writes last
    path = f"{cell['model_dir']}/ckpt.pt"
    return os.path.exists(path) and load_checkpoint(path)["step"] == cell["steps"]


def train_cell(cell):
    """Trains a cell's model, or goes on with it; a GAN that was not trained to the end starts again."""
    os.makedirs(cell["model_dir"], exist_ok=True)
    if not is_trained(cell):
        how = "resume" if os.path.exists(f"{cell['model_dir']}/ckpt.pt") else "train"
        run(cell[how], f"{cell['model_dir']}/log.txt")
        check(is_trained(cell), f"the training in {cell['model_dir']} was stopped: run the same command again")


def sample_and_score(cell):
    """What the table needs of a trained cell: a dict for each n."""
    os.makedirs(cell["cell_dir"], exist_ok=True)
    result, results = {key: cell[key] for key in ("title", "seed", "key", "classes", "steps", "images")}, []
    result |= dict(val_loss=None, machine=machine(setup_device(device)[0]))
    if cell["script"] == "train":
        history = load_checkpoint(f"{cell['model_dir']}/ckpt.pt")["history"]
        result["val_loss"] = (history["val_loss"] or [None])[-1]
    path = f"{cell['cell_dir']}/evaluate.json"
    for command in cell["measure"]:
        if os.path.exists(path):
            os.remove(path)  # of the n before this one, or of a study that was stopped
        run(command, f"{cell['cell_dir']}/log.txt")
        if command[0] == "evaluate":
            samples, real = read_json(path)["scores"].values()
            results.append(result | samples | dict(real=real))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# the table and the image


def mean_text(values, scale, digits):
    """Mean ± standard error of the scaled values; no error for counts (digits 0)."""
    if any(v is None for v in values):
        return ""
    values = [scale * v for v in values]
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if digits and len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def table(name, content):
    """The study as Markdown, with a link to its image."""
    study, cells = content["study"], {}
    for result in content["runs"]:
        cells.setdefault((result["title"], result["n"]), []).append(result)
    columns = {"n": ("n", 1, 0), "images seen": ("images", 1, 0), "FD": ("fd", 1, 2), "KD": ("kd", 1000, 2)}
    columns |= {"precision": ("precision", 1, 3), "recall": ("recall", 1, 3)}
    if study.get("loss"):
        columns["validation loss"] = ("val_loss", 1, 4)
    machines = "; ".join(dict.fromkeys(r["machine"] for r in content["runs"]))
    lines = [f"`{content['command']}`, {study['config']}; {machines}.", ""]
    lines += [f"| {' | '.join(['', 'seeds', *columns])} |", "| --- " * (len(columns) + 2) + "|"]

    def add_row(title, count, runs):
        texts = [mean_text([run.get(key) for run in runs], scale, digits) for key, scale, digits in columns.values()]
        lines.append(f"| {' | '.join([title, str(count), *texts])} |")

    for (title, _), runs in cells.items():
        add_row(title, len(runs), runs)
    for (classes, count), real in {(run["classes"], run["n"]): run["real"] for run in content["runs"]}.items():
        if real["n"] == count:  # not more than the test split holds
            add_row(f"real images {classes}".strip(), "", [real])
    return "\n".join([*lines, "", f"![{name}]({name}.png)", ""])


def write_image(cells, path):
    """A row of ten images per cell; returns False if work_dir no longer has the samples of all."""
    paths = [f"{cell['samples']}/images_00000.npy" for cell in cells]
    if there := all(map(os.path.exists, paths)):
        tile(np.concatenate([load_array(p)[:10] for p in paths]), 10, [cell["title"] for cell in cells]).save(path)
    return there


# ---------------------------------------------------------------------------------------------------------------------


def main():
    name = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    config, given = configure(globals())
    check_choice("ablate STUDY", name, tuple(STUDIES))
    study = STUDIES[name] | dict(n=[n] if n else list(STUDIES[name]["n"]))
    plan = [make_cell(study, title, k) for k in range(seed, seed + seeds) for title in study["cells"]]
    trainings = len({cell["model_dir"] for cell in plan})
    print(f"{name}: {len(study['cells'])} cells x {seeds} seeds, {trainings} trainings", flush=True)
    if dry_run:
        for cell in plan:
            for command in (cell["train"], *cell["measure"]):
                print(f"{cell['title']}, seed {cell['seed']}: {shown(command)}")
        return

    # What is done already: the runs in STUDY.json. They have to be of the same settings.
    for folder in {os.path.realpath(folder) for folder in (work_dir, results_dir)}:
        lock_folder(folder)
    path, keys = f"{results_dir}/{name}", {cell["title"]: cell["key"] for cell in plan}
    content = read_json(f"{path}.json") if os.path.exists(f"{path}.json") else dict(runs=[])
    for r in content["runs"]:
        same = r.get("key") == keys.get(r["title"])
        check(same, f"{path}.json: {r['title']!r} was made with other settings: use another --results_dir")
    told = {key: value for key, value in given.items() if not key.endswith("dir")}
    commands = content.get("command", "").split("; ") + [" ".join(["python -m lab.ablate", name, *flags(**told)])]
    content |= dict(study=study, command="; ".join(dict.fromkeys(filter(None, commands))))

    done = {(r["title"], r["seed"]) for r in content["runs"]}
    todo, start = [cell for cell in plan if (cell["title"], cell["seed"]) not in done], time.time()
    for i, cell in enumerate(todo, 1):
        train_cell(cell)
        content["runs"] += (results := sample_and_score(cell))
        save_json(f"{path}.json", content)
        with atomic_write(f"{path}.md") as f:
            f.write(table(name, content).encode())
        left = duration((time.time() - start) / i * (len(todo) - i))
        kd = ", ".join(f"KD {1000 * result['kd']:.2f}" for result in results)
        print(f"{i:3d} of {len(todo)}  {cell['title']}, seed {cell['seed']}: {kd}; {left} left", flush=True)
    drawn = write_image([cell for cell in plan if cell["seed"] == seed], f"{path}.png")
    print(f"wrote {path}.json, {path}.md" + f" and {path}.png" * drawn)


if __name__ == "__main__":
    main()
