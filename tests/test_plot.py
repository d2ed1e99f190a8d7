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
    more = {"loss": [f"--logs={trained}/log.json,{trained}/log.json"], "data": ["--dataset=fashion_mnist"]}
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


def test_what_it_cannot_draw_is_one_line(results, run, fails):
    assert "'' is not one of schedules, forward, loss, confusion, data" in fails("plot", f"--out_dir={results}")
    log = dict(step=[], train_loss=[], val_loss=[], val_quarters=[])  # stopped before the first validation
    data.save_json(f"{results}/log.json", log)
    run("plot", "loss", f"--out_dir={results}")
    data.save_json(f"{results}/log.json", dict(step=[10], d_loss=[0.7], g_loss=[0.9]))  # as gan.py writes it
    assert "is not a log of train.py" in fails("plot", "loss", f"--out_dir={results}")
