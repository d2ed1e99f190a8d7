"""Draws what a report shows, into out_dir/plot_WHAT.png. Needs `pip install '.[plot]'`.

python plot.py schedules                                   beta, signal and log-SNR of the four schedules
python plot.py forward --dataset=cifar10                   an image noised along each of them
python plot.py loss --logs=out/log.json,out-b/log.json     training, validation and test loss of any number of runs
python plot.py confusion --results=out/classifier.json     confusion matrices of the arms, side by side
python plot.py data --dataset=cifar10                      class balance, augmentation, noise
"""

import math
import os
import sys

import numpy as np
import torch

from configurator import configure
from data import Batches, load, read_json
from ddpm import DDPM, SCHEDULES, DDPMConfig, UserError, check_choice, make_betas, make_generator, to_float, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"
logs = ""  # of loss: log.json files of train.py, comma-separated; default out_dir/log.json
results = ""  # of confusion: a file of classifier.py; default out_dir/classifier.json
dataset = "cifar10"  # of forward and data
data_dir = "data"
classes = ""  # cat,frog keeps only these; default all
image_size = 0  # 0: the data set's own
seed = 0  # of the noise and of the choice of images
timesteps = 500  # T
beta_start = 1e-4
beta_end = 0.028
hflip = True  # of data's augmentation, as in train.py and classifier.py
shift = 2
crop = 1.0
dpi = 110
# ---------------------------------------------------------------------------------------------------------------------
COLOURS = ("#1f5aa0", "#c2551e", "#3c8d40", "#7b4ea3", "#8a6d3b", "#444444")


def pyplot():
    """matplotlib.pyplot without a display. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def noised(x0, schedule, ts):
    """x0 (C, H, W) at each t of ts, with the same noise: (len(ts), C, H, W)."""
    smallest = dict(ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())  # the network is not used
    betas = dict(timesteps=timesteps, schedule=schedule, beta_start=beta_start, beta_end=beta_end)
    model = DDPM(DDPMConfig(x0.shape[-1], len(x0), **smallest, **betas))
    eps = torch.randn(x0.shape, generator=make_generator(seed))
    return model.q_sample(x0[None], torch.tensor(ts), eps[None])


def show(axis, x, title=""):
    """Shows an image (C, H, W) in [-1, 1] without a frame."""
    image = to_uint8(x).numpy()
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def side_title(axis, text):
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def plot_schedules():
    """beta_t, sqrt(1 - beta_t), alpha_bar_t and log-SNR over t. cosine's betas, up to 0.999, have their own axis."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    titles = (r"$\beta_t$", r"$\sqrt{1-\beta_t}$", r"$\bar\alpha_t$", r"$\log\ \bar\alpha_t / (1-\bar\alpha_t)$")
    right = [axis.twinx() for axis in axes[:2]]
    for schedule, colour in zip(SCHEDULES, COLOURS):
        betas = make_betas(schedule, timesteps, beta_start, beta_end)
        abar = (1 - betas).cumprod(0)
        for k, values in enumerate((betas, (1 - betas).sqrt(), abar, (abar / (1 - abar)).log())):
            own = schedule == "cosine" and k < 2
            (right if own else axes)[k].plot(values, "--" if own else "-", color=colour, lw=1.8)
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="t")
        axis.grid(alpha=0.3)
    for axis in right:
        axis.tick_params(axis="y", colors=COLOURS[1], labelsize=8)
        axis.set_ylabel("cosine", color=COLOURS[1], fontsize=8)
    lines = [plt.Line2D([], [], color=colour, lw=1.8) for colour in COLOURS[:4]]
    labels = [f"{s} (dashed: axis on the right)" if s == "cosine" else s for s in SCHEDULES]
    figure.legend(lines, labels, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def plot_forward():
    """One image along each schedule, with the same noise everywhere."""
    images, _, _ = load(dataset, "train", data_dir, image_size, classes)
    x0 = to_float(torch.tensor(images[seed % len(images)][None]))[0]
    ts = [round(u * (timesteps - 1)) for u in np.linspace(0, 1, 9)]
    figure, axes = pyplot().subplots(len(SCHEDULES), len(ts), figsize=(1.15 * len(ts), 1.25 * len(SCHEDULES)))
    for row, schedule in zip(axes, SCHEDULES):
        for axis, x, t in zip(row, noised(x0, schedule, ts), ts):
            show(axis, x, f"t = {t}" if schedule == SCHEDULES[0] else "")
        side_title(row[0], schedule)
    figure.tight_layout(pad=0.4)
    return figure


def plot_loss():
    """Training and validation loss of each run, its test loss as a star, and validation loss by quarter of t."""
    paths = logs.split(",") if logs else [os.path.join(out_dir, "log.json")]
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"no log {path}: train.py writes log.json into its out_dir")
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    runs = dict(zip(folders if len(set(folders)) == len(paths) else paths, map(read_json, paths)))
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4))
    for colour, (name, log) in zip(COLOURS * len(runs), runs.items()):
        left.plot(log["step"], log["train_loss"], color=colour, lw=1, alpha=0.5, label=f"{name}: training")
        if log["val_loss"]:  # not with val_fraction=0
            left.plot(log["step"], log["val_loss"], color=colour, lw=1.8, label="validation")
            for k, style in enumerate(("-", "--", "-.", ":")):
                label, values = f"{name}: " * (k == 0) + f"quarter {k + 1}", [q[k] for q in log["val_quarters"]]
                right.plot(log["step"], values, style, color=colour, lw=1.5, label=label)
        if log.get("test_loss") is not None:
            left.plot(log["step"][-1], log["test_loss"], "*", color=colour, ms=11, label=f"test {log['test_loss']:.4f}")
    settled = [v for log in runs.values() for v in log["train_loss"][len(log["step"]) // 10 :] + log["val_loss"]]
    settled = [v for v in settled if v is not None]  # it was not finite
    if settled:  # not before the first validation
        left.set_ylim(0.95 * min(settled), np.quantile(settled, 0.97) * 1.1)
    left.set(title="loss", xlabel="step")
    right.set(title="validation loss by quarter of t", xlabel="step", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8, ncol=len(runs))
    figure.tight_layout()
    return figure


def plot_confusion(path=""):
    """The confusion matrices in a file of classifier.py, summed over seeds, in percent of each true class."""
    path = path or results or os.path.join(out_dir, "classifier.json")
    if not os.path.exists(path):
        raise UserError(f"no results {path}: classifier.py writes classifier.json into its out_dir")
    content = read_json(path)
    cells, names = {}, content["classes"]
    for run in content["runs"]:
        amount = f", {run['n_real']} + {run['n_synthetic']}" if "amounts" in os.path.basename(path) else ""
        cells.setdefault(run["arm"] + amount, []).append(run)
    columns, rows = min(4, len(cells)), math.ceil(len(cells) / 4)
    size = (4.1 * columns + 0.6, 4.4 * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    for axis, (title, runs) in zip(axes.flat, cells.items()):
        matrix = np.sum([run["confusion"] for run in runs], axis=0)
        matrix = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value > 55 else "black"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        axis.set_title(f"{title}: {100 * np.mean([run['test'] for run in runs]):.2f} %, n={len(runs)}", fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("predicted", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("true", fontsize=8)
    figure.tight_layout()
    return figure


def plot_data():
    """Images per class in the training split; one of each of ten classes, augmented four ways, and with noise."""
    images, labels, names = load(dataset, "train", data_dir, image_size, classes)
    names = [] if labels is None else names
    groups = [np.arange(len(images))] if labels is None else [np.flatnonzero(labels == k) for k in range(len(names))]
    shown = [k for k, group in enumerate(groups) if len(group)][:10]
    chosen = groups[0][:8] if labels is None else np.array([groups[k][seed % len(groups[k])] for k in shown])
    batches = Batches(images[chosen], None, len(chosen), seed, hflip, crop, shift)
    augmented = [batches(step)[0][torch.argsort(batches.indices(step))] for step in range(4)]
    clean = to_float(torch.tensor(images[chosen]))
    rows = [("clean", clean)] + [("" if i else "augmented", x) for i, x in enumerate(augmented)]
    rows += [
        (f"t = {t}", torch.cat([noised(x, "linear", [t]) for x in clean])) for t in (timesteps // 8, timesteps // 4)
    ]
    figure = pyplot().figure(figsize=(1.0 * len(chosen) + 4.6, 1.02 * len(rows) + 0.4))
    grid = figure.add_gridspec(len(rows), len(chosen) + 5, wspace=0.08, hspace=0.08)
    bars = figure.add_subplot(grid[:, :3])
    bars.barh(range(len(groups)), list(map(len, groups)), color=COLOURS[0])
    bars.set_yticks(range(len(groups)), names or ["all"], fontsize=min(8, 300 / len(groups)))
    bars.invert_yaxis()
    bars.set_title(f"{len(images)} training images", fontsize=9)
    for i, (title, row) in enumerate(rows):
        for j, x in enumerate(row):
            axis = figure.add_subplot(grid[i, j + 5])
            show(axis, x, names[shown[j]][:12] if i == 0 and names else "")
            if j == 0:
                side_title(axis, title)
    return figure


PLOTS = dict(schedules=plot_schedules, forward=plot_forward, loss=plot_loss, confusion=plot_confusion, data=plot_data)

if __name__ == "__main__":
    WHAT = next((arg for arg in sys.argv[1:] if not arg.startswith("-")), "")
    sys.argv = [arg for arg in sys.argv if arg != WHAT]
    configure(globals())
    check_choice("plot.py WHAT", WHAT, PLOTS)
    try:
        figure = PLOTS[WHAT]()
    except ImportError:
        raise UserError("plot.py needs matplotlib: `pip install '.[plot]'`") from None
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, f"plot_{WHAT}.png")
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    print(f"wrote {path}")
