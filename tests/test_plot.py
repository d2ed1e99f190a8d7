"""plot.py: every kind gives a picture with something on it; texts are drawn as they are."""

import numpy as np
import pytest
from PIL import Image

import data
from lab import plot


@pytest.fixture
def results(tmp_path):
    """A folder with the classifier.json of two arms and two seeds."""
    names, matrix = ["US$", "a$b$", "c"], np.eye(3, dtype=int).tolist()
    runs = [dict(arm=arm, test=0.5, confusion=matrix) for arm in ("real", "synthetic") for _ in range(2)]
    data.save_json(f"{tmp_path}/classifier.json", dict(classes=names, runs=runs))
    return tmp_path


@pytest.mark.parametrize("kind", plot.PLOTS)
def test_every_kind_is_drawn(shards, trained, results, run, kind):
    more = {"loss": [f"--logs={trained},{trained}/log.json"], "data": ["--dataset=fashion_mnist"]}
    run("plot", kind, f"--out_dir={results}", f"--data_dir={shards}", *more.get(kind, []))
    image = np.asarray(Image.open(results / f"plot_{kind}.png").convert("RGB"))
    assert min(image.shape[:2]) > 250 and image.std() > 20


def test_texts_are_drawn_as_they_are(results, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    monkeypatch.setattr(plot, "results", f"{results}/classifier.json")
    plot.plot_confusion(figure)
    assert [axis.get_title() for axis in figure.axes] == ["real: 50.00 %, 2 seeds", "synthetic: 50.00 %, 2 seeds"]
    for text in figure.axes[0].get_xticklabels() + figure.axes[0].get_yticklabels():
        assert text.get_text() in ("US$", "a$b$", "c") and not text.get_parse_math()


LOG = dict(step=[4], train_loss=[0.3], val_loss=[0.2], val_quarters=[[0.4, 0.3, 0.2, 0.1]], test_loss=0.01)
LOG |= dict(log_step=[1, 2, 4], log_loss=[9.0, None, 0.25])  # None: it was not finite
STOPPED = dict(step=[], train_loss=[], val_loss=[], val_quarters=[], test_loss=None, log_step=[1], log_loss=[0.7])
GAN = dict(step=[1, 2], d_loss=[1.4, 1.3], g_loss=[0.7, 0.8], d_real=[0.5, 0.6], d_fake=[0.5, 0.3])


def losses(tmp_path, monkeypatch, **runs):
    """Draws runs, name=(log, settings or None): the finite points of both axes, inside them, and a legend."""
    for name, (log, settings) in runs.items():
        (tmp_path / name).mkdir(exist_ok=True)
        data.save_json(tmp_path / name / "log.json", log)
        if settings is not None:
            data.save_json(tmp_path / name / "config.json", dict(config=settings))
    monkeypatch.setattr(plot, "logs", ",".join(f"{tmp_path}/{name}" for name in runs))
    plot.plot_loss(figure := pytest.importorskip("matplotlib.figure").Figure())
    figure.draw_without_rendering()
    drawn = []
    for axis in figure.axes:
        points = np.concatenate([line.get_xydata() for line in axis.lines])
        drawn.append(sorted(map(tuple, points[np.isfinite(points[:, 1])].tolist())))
        low, high = np.transpose([axis.get_xlim(), axis.get_ylim()])
        assert ((low < drawn[-1]) & (drawn[-1] < high)).all()
        assert all(line.get_marker() != "None" for line in axis.lines)  # so that a single point can be seen
    legend = figure.axes[0].get_legend().get_texts()
    assert not any(text.get_parse_math() for text in legend)
    return *drawn, [text.get_text() for text in legend]


def test_every_logged_loss_is_drawn_inside_the_axes(tmp_path, monkeypatch):
    left, right, legend = losses(tmp_path, monkeypatch, _base=(LOG, None), **{"a$b$": (STOPPED, None)})
    assert left == [(1, 0.7), (1, 9), (4, 0.01), (4, 0.2), (4, 0.25)]
    assert right == [(4, 0.1), (4, 0.2), (4, 0.3), (4, 0.4)]
    assert legend == ["training: _base", "validation", "test 0.0100", "training: a$b$"]
    left, right, legend = losses(tmp_path, monkeypatch, gan=(GAN, None))
    assert left == [(1, 0.7), (1, 1.4), (2, 0.8), (2, 1.3)] and legend == ["D: gan", "G"]
    assert right == [(1, 0.5), (1, 0.5), (2, 0.3), (2, 0.6)]


def test_runs_whose_losses_differ_in_kind_are_told_apart(tmp_path, monkeypatch):
    settings = dict(objective="v", weighting="min_snr", lr=1e-3)
    others = {"": settings | dict(lr=1), ", objective v": settings | dict(objective="x0"), ", objective v, ": None}
    for mark, other in others.items():
        _, _, legend = losses(tmp_path, monkeypatch, a=(LOG, settings), **{f"b{len(mark)}": (LOG, other)})
        assert legend[0].startswith(f"training: a{mark}") and (other is None or legend[0] == f"training: a{mark}")
    assert legend[3].endswith(", objective unknown, weighting unknown")


def test_what_it_cannot_draw_is_one_line(results, fails):
    data.save_json(f"{results}/log.json", dict(step=[10]))
    assert "is not a log of train.py or lab.gan" in fails("plot", "loss", f"--out_dir={results}")
    data.save_json(f"{results}/log.json", LOG)
    data.save_json(f"{results}/gan.json", GAN)
    assert "draw one kind at a time" in fails("plot", "loss", f"--logs={results},{results}/gan.json")
