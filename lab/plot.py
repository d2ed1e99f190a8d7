"""Draws what a report shows, into out_dir/plot_WHAT.png. Needs `pip install '.[plot]'`.

python -m lab.plot schedules                                   beta, signal and log-SNR of the four schedules
python -m lab.plot forward --dataset=cifar10                   an image noised along each of them
python -m lab.plot loss --logs=out/log.json,out-b/log.json     training, validation and test loss of any number of runs
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
# ---------------------------------------------------------------------------------------------------------------------
COLOURS = ("#1f5aa0", "#c2551e", "#3c8d40", "#7b4ea3", "#8a6d3b", "#444444")


def diffusion(schedule, channels=3, side=32):
    """A DDPM with a schedule. Its network, the smallest, is not used."""
    smallest = dict(ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    betas = dict(timesteps=timesteps, schedule=schedule, beta_start=beta_start, beta_end=beta_end)
    return DDPM(DDPMConfig(side, channels, **smallest, **betas))


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
    """beta_t, sqrt(1 - beta_t), alpha_bar_t and log-SNR over t. cosine's betas, up to 0.999, have their own axis."""
    figure.set_size_inches(14, 3.4)
    axes = figure.subplots(1, 4)
    titles = (r"$\beta_t$", r"$\sqrt{1-\beta_t}$", r"$\bar\alpha_t$", r"$\log\ \bar\alpha_t / (1-\bar\alpha_t)$")
    right = [axis.twinx() for axis in axes[:2]]
    for schedule, colour in zip(SCHEDULES, COLOURS):
        abar = torch.tensor(diffusion(schedule).abar, dtype=torch.float64)
        betas = make_betas(schedule, timesteps, beta_start, beta_end)
        for k, values in enumerate((betas, (1 - betas).sqrt(), abar, (abar / (1 - abar)).log())):
            own = schedule == "cosine" and k < 2
            (right if own else axes)[k].plot(values, "--" if own else "-", color=colour, lw=1.8)
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="t")
        axis.grid(alpha=0.3)
    for axis in right:
        axis.tick_params(axis="y", colors=COLOURS[1], labelsize=8)
        axis.set_ylabel("cosine", color=COLOURS[1], fontsize=8)
    labels = [f"{s} (dashed: axis on the right)" if s == "cosine" else s for s in SCHEDULES]
    figure.legend(axes[2].lines, labels, loc="lower center", ncol=4, frameon=False)
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


def plot_loss(figure):
    """Training and validation loss of each run, its test loss as a star, and validation loss by quarter of t."""
    paths = logs.split(",") if logs else [os.path.join(out_dir, "log.json")]
    for path in paths:
        check(os.path.exists(path), f"no log {path}: train.py writes log.json into its out_dir")
        check("train_loss" in data.read_json(path), f"{path} is not a log of train.py")  # gan.py has another log.json
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    names = folders if len(set(folders)) == len(paths) else paths
    runs = {name.replace("$", r"\$"): data.read_json(path) for name, path in zip(names, paths)}  # no formula
    figure.set_size_inches(11, 4)
    left, right = figure.subplots(1, 2)
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
    from matplotlib.figure import Figure

    figure, path = Figure(), os.path.join(out_dir, f"plot_{what}.png")
    PLOTS[what](figure)
    os.makedirs(out_dir, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"wrote {path}")
