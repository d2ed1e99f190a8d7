"""Draws what a report shows, into out_dir/plot_WHAT.png. Needs `pip install '.[plot]'`.

python -m lab.plot schedules                                   beta, signal and log-SNR of the five schedules
python -m lab.plot forward --dataset=cifar10                   an image noised along each of them
python -m lab.plot loss --logs=out,out-b                       the losses of any number of runs of train.py or lab.gan
python -m lab.plot confusion --results=out/classifier.json     confusion matrices of the arms, side by side
python -m lab.plot data --dataset=cifar10                      class balance, augmentation, noise
"""

import os
import sys
from importlib.util import find_spec

import numpy as np
import torch

import data
from configurator import configure
from ddpm import DDPM, SCHEDULES, DDPMConfig, check, check_choice, make_betas, make_generator, to_float, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"
logs = ""  # of loss: folders of runs, or their log.json, comma-separated; default out_dir
results = ""  # of confusion: a file of classifier.py; default out_dir/classifier.json
dataset = "cifar10"  # of forward and data
data_dir = "data"
classes = ""  # cat,frog keeps only these; default all
image_size = 0  # 0: the data set's own
seed = 0  # of the noise and of the choice of images
timesteps = 500  # T
beta_start = 1e-4
beta_end = 0.028
# ---------------------------------------------------------------------------------------------------------------------
COLOURS = ("#1f5aa0", "#c2551e", "#3c8d40", "#7b4ea3", "#8a6d3b", "#444444")
SCALE = "objective loss weighting schedule timesteps beta_start beta_end".split()  # settings on which a loss depends


def diffusion(schedule, channels=3, side=32):
    """A DDPM with a schedule. Its network is not used."""
    betas = dict(timesteps=timesteps, schedule=schedule, beta_start=beta_start, beta_end=beta_end)
    config = DDPMConfig(side, channels, ch_mult=(1,), attn_resolutions=(), **betas)
    return DDPM(config, net=torch.nn.Identity())


def noised(x0, schedule, ts):
    """x0 (B or 1, C, H, W) at each t of ts (B), with the same noise for all: (B, C, H, W)."""
    eps = torch.randn((1, *x0.shape[1:]), generator=make_generator(seed))
    return diffusion(schedule, *x0.shape[1:3]).q_sample(x0, torch.tensor(ts), eps)


def show(axis, x, title=""):
    """Shows an image (C, H, W) in [-1, 1] without a frame."""
    image = to_uint8(x).numpy()
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def side_title(axis, text):
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def plot_schedules(figure):
    """beta_t, sqrt(1 - beta_t), alpha_bar_t and log-SNR over t. The large betas of two have an axis of their own."""
    figure.set_size_inches(14, 3.4)
    axes = figure.subplots(1, 4)
    titles = (r"$\beta_t$", r"$\sqrt{1-\beta_t}$", r"$\bar\alpha_t$", r"$\log\ \bar\alpha_t / (1-\bar\alpha_t)$")
    right, large = [axis.twinx() for axis in axes[:2]], ("cosine", "lognormal")
    for schedule, colour in zip(SCHEDULES, COLOURS):
        abar = torch.tensor(diffusion(schedule).abar, dtype=torch.float64)
        betas = make_betas(schedule, timesteps, beta_start, beta_end)
        for k, values in enumerate((betas, (1 - betas).sqrt(), abar, (abar / (1 - abar)).log())):
            own = schedule in large and k < 2
            (right if own else axes)[k].plot(values, "--" if own else "-", color=colour, lw=1.8)
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="t")
        axis.grid(alpha=0.3)
    for axis in right:
        axis.tick_params(axis="y", labelsize=8)
        axis.set_ylabel(", ".join(large), fontsize=8)
    labels = [f"{s} (dashed: axis on the right)" if s in large else s for s in SCHEDULES]
    figure.legend(axes[2].lines, labels, loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))


def plot_forward(figure):
    """One image along each schedule, with the same noise everywhere."""
    images, _, _ = data.load(dataset, "train", data_dir, image_size, classes)
    x0 = to_float(torch.tensor(images[seed % len(images)][None]))
    ts = [round(u * (timesteps - 1)) for u in np.linspace(0, 1, 9)]
    figure.set_size_inches(1.15 * len(ts), 1.25 * len(SCHEDULES))
    for row, schedule in zip(figure.subplots(len(SCHEDULES), len(ts)), SCHEDULES):
        for axis, x, t in zip(row, noised(x0, schedule, ts), ts):
            show(axis, x, f"t = {t}" if schedule == SCHEDULES[0] else "")
        side_title(row[0], schedule)
    figure.tight_layout(pad=0.4)


def read_runs(paths):
    """[(name, log)] of runs, given as folders or as their log.json, named after the folders.

    Where config.json says that their losses differ in kind, the names say how.
    """
    paths = [os.path.join(path, "log.json") if os.path.isdir(path) else path for path in paths]
    for path in paths:
        check(os.path.exists(path), f"no log {path}: train.py and lab.gan write log.json into its out_dir")
    found = list(map(data.read_json, paths))
    for path, log in zip(paths, found):
        check("log_loss" in log or "d_loss" in log, f"{path} is not a log of train.py or lab.gan")
    check(len({"d_loss" in log for log in found}) == 1, "logs of train.py and of lab.gan: draw one kind at a time")

    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    names = list(map(os.path.basename, folders))
    names = names if len(set(names)) == len(names) else paths
    files = [f"{folder}/config.json" for folder in folders]
    settings = [data.read_json(path).get("config", {}) if os.path.exists(path) else {} for path in files]
    differing = [key for key in SCALE if len({repr(own.get(key)) for own in settings}) > 1]
    marks = [[f", {key} {own.get(key, 'unknown')}" for key in differing] for own in settings]
    return [(name + "".join(mark), log) for name, mark, log in zip(names, marks, found)]


def curve(axis, x, y, style, label, **how):
    axis.plot(x, np.array(y, dtype=float), style, label=label, **how)  # None, of a loss that was not finite, is a gap


def draw_run(left, right, name, log, colour):
    """Every logged loss of a run of train.py, its validations, also by quarter of t, and its test loss as a star."""
    thin = dict(color=colour, lw=0.7, ms=2, alpha=0.6)
    curve(left, log["log_step"], log["log_loss"], ".-", f"training: {name}", **thin)
    if log["val_loss"]:  # not with val_fraction=0
        curve(left, log["step"], log["val_loss"], "o-", "validation", color=colour, lw=1.8, ms=5)
        for k, style in enumerate(("o-", "o--", "o-.", "o:")):
            label, values = f"quarter {k + 1}" + f": {name}" * (k == 0), [q[k] for q in log["val_quarters"]]
            curve(right, log["step"], values, style, label, color=colour, lw=1.5, ms=3)
    if log.get("test_loss") is not None:
        label = f"test {log['test_loss']:.4f}"
        curve(left, log["step"][-1:], [log["test_loss"]], "*", label, color=colour, ms=12)
    left.set_title("training: raw weights with dropout; validation, test: averaged weights without", fontsize=9)
    right.set_title("validation loss by quarter of t, from clean to noisy", fontsize=9)
    for axis in (left, right):
        axis.set_yscale("log")  # the first losses are the largest
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="both", labelsize=8)


def draw_gan(left, right, name, log, colour):
    """Both losses of a run of lab.gan, and what its discriminator takes for real."""
    thin = dict(color=colour, lw=1, ms=3)
    curve(left, log["step"], log["d_loss"], ".-", f"D: {name}", **thin)
    curve(left, log["step"], log["g_loss"], ".--", "G", **thin)
    curve(right, log["step"], log["d_real"], ".-", f"of real images: {name}", **thin)
    curve(right, log["step"], log["d_fake"], ".--", "of generated images", **thin)
    left.set_title("loss of discriminator (D) and generator (G)", fontsize=9)
    right.set_title("share that the discriminator takes for real", fontsize=9)


def plot_loss(figure):
    """The losses of runs, of one kind, all in the same two plots."""
    runs = read_runs(logs.split(",") if logs else [out_dir])
    figure.set_size_inches(12, 5)
    axes = figure.subplots(1, 2)
    for (name, log), colour in zip(runs, COLOURS * len(runs)):
        (draw_gan if "d_loss" in log else draw_run)(*axes, name, log, colour)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            for text in axis.legend(fontsize=8, ncol=1 + (len(runs) > 2)).get_texts():
                text.set_parse_math(False)  # two dollar signs in a name are no formula
    figure.tight_layout()


def plot_confusion(figure):
    """The confusion matrices of classifier.py's arms, summed over seeds, in percent of each true class."""
    path = results or os.path.join(out_dir, "classifier.json")
    check(os.path.exists(path), f"no results {path}: classifier.py writes classifier.json into its out_dir")
    content, arms = data.read_json(path), {}
    check(content.get("runs") and "classes" in content, f"{path} is not of classifier.py")
    for run in content["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    ticks = dict(ticks=range(len(content["classes"])), labels=content["classes"], fontsize=8, parse_math=False)
    figure.set_size_inches(4.1 * len(arms) + 0.6, 4.4)
    axes = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axis, (arm, runs) in zip(axes, arms.items()):
        matrix = np.sum([run["confusion"] for run in runs], axis=0)
        matrix = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value > 55 else "black"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        axis.set_title(f"{arm}: {100 * np.mean([run['test'] for run in runs]):.2f} %, {seeds}", fontsize=10)
        axis.set_xticks(**ticks, rotation=90)
        axis.set_yticks(**ticks)
        axis.set_xlabel("predicted", fontsize=8)
    axes[0].set_ylabel("true", fontsize=8)
    figure.tight_layout()


def plot_data(figure):
    """Images per class in the training split; one of each of ten classes, augmented four ways, and with noise."""
    images, labels, names = data.load(dataset, "train", data_dir, image_size, classes)
    names = [] if labels is None else names
    groups = [np.arange(len(images))] if labels is None else [np.flatnonzero(labels == k) for k in range(len(names))]
    shown = [k for k, group in enumerate(groups) if len(group)][:10]
    chosen = groups[0][:8] if labels is None else np.array([groups[k][seed % len(groups[k])] for k in shown])
    batches = data.Batches(images[chosen], None, len(chosen), seed, shift=2)  # as in classifier.py
    augmented = [batches(step)[0][torch.argsort(batches.indices(step))] for step in range(4)]
    clean = to_float(torch.tensor(images[chosen]))
    rows = [("clean", clean)] + [("" if i else "augmented", x) for i, x in enumerate(augmented)]
    for t in (timesteps // 8, timesteps // 4):
        rows.append((f"t = {t}", noised(clean, "linear", [t] * len(clean))))
    figure.set_size_inches(len(chosen) + 4.6, 1.02 * len(rows) + 0.4)
    grid = figure.add_gridspec(len(rows), len(chosen) + 5, wspace=0.08, hspace=0.08)
    bars = figure.add_subplot(grid[:, :3])
    bars.barh(range(len(groups)), list(map(len, groups)), color=COLOURS[0])
    bars.set_yticks(range(len(groups)), names or ["all"], fontsize=min(8, 300 / len(groups)), parse_math=False)
    bars.invert_yaxis()
    bars.set_title(f"{len(images)} training images", fontsize=9)
    for i, (title, row) in enumerate(rows):
        for j, x in enumerate(row):
            axis = figure.add_subplot(grid[i, j + 5])
            show(axis, x, names[shown[j]][:12] if i == 0 and names else "")
            if j == 0:
                side_title(axis, title)


PLOTS = dict(schedules=plot_schedules, forward=plot_forward, loss=plot_loss, confusion=plot_confusion, data=plot_data)

if __name__ == "__main__":
    what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    check_choice("the first word, what to draw", what, PLOTS)
    check(find_spec("matplotlib"), "plot needs `pip install '.[plot]'`")
    os.environ["MPLBACKEND"] = "agg"  # a file is drawn; the one of a notebook may not be there
    from matplotlib.figure import Figure

    figure, path = Figure(), os.path.join(out_dir, f"plot_{what}.png")
    PLOTS[what](figure)
    os.makedirs(out_dir, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"wrote {path}")
