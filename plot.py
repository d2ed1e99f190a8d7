"""Draws what a report shows. Needs `pip install '.[plot]'`; every picture goes to out_dir/plot_WHAT.png.

python plot.py schedules                                   beta, signal and noise of the four schedules
python plot.py forward --dataset=cifar10                   a picture noised along each of them
python plot.py loss --logs=out/log.json,out-b/log.json     training, validation and test loss of any number of runs
python plot.py confusion --results=out/classifier.json     confusion matrices of the arms, side by side
python plot.py data --dataset=cifar10                      class balance, augmentation, noise
"""

import os
import sys

import numpy as np
import torch

from configurator import ConfigError, configure
from data import Batches, load, read_json
from ddpm import SCHEDULES, make_betas, make_generator, one_of, to_float, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"
logs = ""  # of loss: log.json files of train.py, comma-separated; default out_dir/log.json
results = ""  # of confusion: a file of classifier.py; default out_dir/classifier.json
dataset = "cifar10"  # of forward and data
data_dir = "data"
classes = ""  # "cat,frog" keeps a subset; default all
image_size = 0  # 0: the data set's own
seed = 0  # of the noise and of the choice of pictures
timesteps = 500  # T
beta_start = 1e-4
beta_end = 0.028
hflip = True  # of data's augmentation, as in train.py and classifier.py
shift = 2
crop = 1.0
dpi = 110
# ---------------------------------------------------------------------------------------------------------------------
COLOURS = dict(zip(SCHEDULES, ("#1f5aa0", "#c2551e", "#3c8d40", "#7b4ea3")))
ARM_COLOURS = ("#1f5aa0", "#c2551e", "#3c8d40", "#7b4ea3", "#8a6d3b", "#444444")


def alphas_bar(schedule):
    return (1 - make_betas(schedule, timesteps, beta_start, beta_end)).cumprod(0)


def noised(x0, schedule, ts):
    """x0 (C, H, W) along a schedule at each t of ts, with one eps: (len(ts), C, H, W)."""
    eps = torch.randn(x0.shape, generator=make_generator(seed))
    abar = alphas_bar(schedule)[ts].float()[:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def show(axis, x, title=""):
    """A picture (C, H, W) in [-1, 1], without a frame."""
    picture = to_uint8(x).numpy()
    axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def plot_schedules(plt):
    """beta_t, sqrt(1 - beta_t), alpha_bar_t and log-SNR over t; cosine's betas, up to 0.999, have their own axis."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    titles = (r"$\beta_t$", r"$\sqrt{1-\beta_t}$", r"$\bar\alpha_t$", r"$\log\ \bar\alpha_t / (1-\bar\alpha_t)$")
    own = [axis.twinx() for axis in axes[:2]]
    for schedule, colour in COLOURS.items():
        betas, abar = make_betas(schedule, timesteps, beta_start, beta_end), alphas_bar(schedule)
        places = [*own, *axes[2:]] if schedule == "cosine" else axes
        for axis, values in zip(places, (betas, (1 - betas).sqrt(), abar, (abar / (1 - abar)).log())):
            axis.plot(values, color=colour, lw=1.8, ls="--" if axis in own else "-")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="t")
        axis.grid(alpha=0.3)
    for axis in own:
        axis.tick_params(axis="y", colors=COLOURS["cosine"], labelsize=8)
        axis.set_ylabel("cosine", color=COLOURS["cosine"], fontsize=8)
    lines = [plt.Line2D([], [], color=colour, lw=1.8) for colour in COLOURS.values()]
    figure.legend(
        lines,
        [f"{s} (dashed: own axis)" if s == "cosine" else s for s in COLOURS],
        loc="lower center",
        ncol=4,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def plot_forward(plt):
    """One picture along each schedule, the same noise everywhere: a row per schedule."""
    images, _, _ = load(dataset, "train", data_dir, image_size, classes)
    x0 = to_float(torch.tensor(images[seed % len(images)][None]))[0]
    ts = [round(u * (timesteps - 1)) for u in np.linspace(0, 1, 9)]
    figure, axes = plt.subplots(len(SCHEDULES), len(ts), figsize=(1.15 * len(ts), 1.25 * len(SCHEDULES)))
    for row, schedule in zip(axes, SCHEDULES):
        for axis, x, t in zip(row, noised(x0, schedule, ts), ts):
            show(axis, x, f"t = {t}" if schedule == SCHEDULES[0] else "")
        row[0].set_ylabel(schedule, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def plot_loss(plt):
    """Training and validation loss of each run, its test loss as a star, and validation loss by quarter of t."""
    paths = logs.split(",") if logs else [os.path.join(out_dir, "log.json")]
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"no log {path}: train.py writes log.json into its out_dir")
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    runs = dict(zip(folders if len(set(folders)) == len(paths) else paths, map(read_json, paths)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for colour, (name, log) in zip(ARM_COLOURS * len(runs), runs.items()):
        left.plot(log["step"], log["train_loss"], color=colour, lw=1, alpha=0.5, label=f"{name}: training")
        if log["val_loss"]:  # there is none with val_fraction=0
            left.plot(log["step"], log["val_loss"], color=colour, lw=1.8, label="validation")
        if log.get("test_loss") is not None:
            left.plot(log["step"][-1], log["test_loss"], "*", color=colour, ms=11, label=f"test {log['test_loss']:.4f}")
        for k, style in enumerate(("-", "--", "-.", ":") if log["val_loss"] else ()):
            label = f"{name}: " * (k == 0) + f"quarter {k + 1}"
            right.plot(log["step"], [q[k] for q in log["val_quarters"]], style, color=colour, lw=1.5, label=label)
    settled = [v for log in runs.values() for v in log["train_loss"][len(log["step"]) // 10 :] + log["val_loss"]]
    if settled:  # a run that was stopped early has none
        left.set_ylim(0.95 * min(settled), np.quantile(settled, 0.97) * 1.1)
    left.set(title="loss", xlabel="step")
    right.set(title="validation loss by quarter of t", xlabel="step", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8, ncol=len(runs))
    figure.tight_layout()
    return figure


def plot_confusion(plt):
    """The confusion matrices of every arm in a result of classifier.py, summed over seeds, in percent of the row."""
    path = results or os.path.join(out_dir, "classifier.json")
    if not os.path.exists(path):
        raise ConfigError(f"no result {path}: classifier.py writes classifier.json into its out_dir")
    content = read_json(path)
    arms, names = {}, content["classes"]
    for run in content["runs"]:
        amount = f", {run['n_real']} + {run['n_synthetic']}" if "amounts" in os.path.basename(path) else ""
        arms.setdefault(run["arm"] + amount, []).append(run)
    figure, axes = plt.subplots(1, len(arms), figsize=(4.1 * len(arms) + 0.6, 4.4), squeeze=False, sharey=True)
    for axis, (arm, runs) in zip(axes[0], arms.items()):
        matrix = np.sum([run["confusion"] for run in runs], axis=0)
        matrix = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for i in range(len(names)):
            for j in range(len(names)):
                ink = "white" if matrix[i, j] > 55 else "black"
                axis.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", color=ink, fontsize=7)
        axis.set_title(f"{arm}: {100 * np.mean([run['test'] for run in runs]):.2f} %, n={len(runs)}", fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("predicted", fontsize=8)
    axes[0][0].set_ylabel("true", fontsize=8)
    figure.tight_layout()
    return figure


def plot_data(plt):
    """Pictures of each class in the training split; one of each of ten classes, augmented four ways, and with noise."""
    images, labels, names = load(dataset, "train", data_dir, image_size, classes)
    names = [] if labels is None else names
    groups = [np.arange(len(images))] if labels is None else [np.flatnonzero(labels == k) for k in range(len(names))]
    shown = [k for k, group in enumerate(groups) if len(group)][:10]
    places = groups[0][:8] if labels is None else np.array([groups[k][seed % len(groups[k])] for k in shown])
    batches = Batches(images[places], None, len(places), seed, hflip, crop, shift)
    order = [torch.argsort(batches.indices(step)) for step in range(4)]
    augmented = [batches(step)[0][rank] for step, rank in enumerate(order)]
    clean = to_float(torch.tensor(images[places]))
    half = [torch.stack([noised(x, "linear", [timesteps // k])[0] for x in clean]) for k in (8, 4)]
    rows = [("clean", clean)] + [("augmented" if i == 0 else "", x) for i, x in enumerate(augmented)]
    rows += [(f"t = {timesteps // k}", x) for k, x in zip((8, 4), half)]
    figure = plt.figure(figsize=(1.0 * len(places) + 4.6, 1.02 * len(rows) + 0.4))
    grid = figure.add_gridspec(len(rows), len(places) + 5, wspace=0.08, hspace=0.08)
    bars = figure.add_subplot(grid[:, :3])
    bars.barh(range(len(groups)), list(map(len, groups)), color=ARM_COLOURS[0])
    bars.set_yticks(range(len(groups)), names or ["all"], fontsize=min(8, 300 / len(groups)))
    bars.invert_yaxis()
    bars.set_title(f"{len(images)} training pictures", fontsize=9)
    for i, (title, pictures) in enumerate(rows):
        for j, x in enumerate(pictures):
            axis = figure.add_subplot(grid[i, j + 5])
            show(axis, x, names[shown[j]][:12] if i == 0 and names else "")
            if j == 0:
                axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure


PLOTS = {name[5:]: function for name, function in list(globals().items()) if name.startswith("plot_")}

if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    config, given = configure(globals())
    one_of("plot.py draws", kind, PLOTS)
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("plot.py needs matplotlib: `pip install '.[plot]'`") from None
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, f"plot_{kind}.png")
    PLOTS[kind](plt).savefig(path, dpi=dpi, bbox_inches="tight")
    print(f"wrote {path}")
