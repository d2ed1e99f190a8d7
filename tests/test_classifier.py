"""classifier.py: gradients by hand, optimisers, early stopping, the four arms, and what its statistics say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import classifier_flags, same

import classifier
import data
from lab.resnet import ResNet18


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def train(monkeypatch):
    """train(images, labels, val_images, val_labels, K, seed, **settings): classifier.train, small and fast."""

    def train(*what, network=classifier.MLP, **changes):
        settings = dict(hidden=(32,), optimizer="adamw", batch_size=20, max_iters=30, lr=3e-3, eval_interval=10)
        for key, value in (settings | changes).items():
            monkeypatch.setattr(classifier, key, value)
        return classifier.train(*what, "cpu", network)

    return train


@pytest.mark.parametrize("B,sizes", ((1, (3, 2)), (4, (5, 7, 3)), (7, (6, 4, 9, 2)), (2, (4, 1, 5))))
def test_gradients_equal_autograds(double, B, sizes):
    model, loss, generator = classifier.MLP(sizes), classifier.SoftmaxCrossEntropy(), torch.Generator().manual_seed(1)
    for p in model.weights():
        p.normal_(generator=generator)
    x, y = torch.randn(B, sizes[0], generator=generator), torch.arange(B) % sizes[-1]
    y[-1] = sizes[-1] - 1  # labels at both ends
    loss.forward(model.forward(x, training=True), y)
    model.backward(loss.backward())
    weights = [p.clone().requires_grad_() for p in model.weights()]
    h = x
    for i, (W, b) in enumerate(zip(weights[::2], weights[1::2])):
        h = (F.relu(h) if i else h) @ W + b
    F.cross_entropy(h, y).backward()
    for g, w in zip(model.gradients(), weights):
        assert torch.allclose(g, w.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", (0.0, 1.0, 1e4))
def test_softmax_cross_entropy_of_extreme_logits(double, scale):
    loss, signs = classifier.SoftmaxCrossEntropy(), torch.tensor([[1.0, -1, 0], [-1, 1, 0.5], [0, 0, 0]])
    for y in (torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2]), torch.tensor([2, 2, 0])):
        logits = (scale * signs).requires_grad_()
        F.cross_entropy(logits, y).backward()
        value = loss.forward(logits.detach(), y)
        assert value.isfinite() and torch.allclose(value, F.cross_entropy(logits, y).detach(), rtol=1e-12)
        assert torch.allclose(loss.backward(), logits.grad, atol=1e-10)


def test_weights_start_with_variance_2_over_n():
    layer = classifier.Linear(500, 400, torch.Generator().manual_seed(0))
    assert layer.W.var().item() == pytest.approx(2 / 500, rel=0.02) and not layer.b.any()


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    layer, x = classifier.Dropout(0.2, torch.Generator().manual_seed(0)), torch.ones(400, 256)
    assert torch.equal(layer.forward(x), x) and torch.equal(layer.backward(x), x)  # nothing outside training
    y = layer.forward(x, training=True)
    zero = y == 0
    assert abs(zero.float().mean().item() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / x.numel())
    assert torch.allclose(y[~zero], torch.tensor(1 / 0.8)) and torch.equal(layer.backward(x), y)
    assert not torch.equal(y, layer.forward(x, training=True))
    assert zero.float().mean(dim=1).std() < 0.05  # a coin for each value, not for each row


@pytest.mark.parametrize("kind", ("sgd", "adamw"))
def test_optimizers_equal_torchs(double, kind):
    model = classifier.MLP((3, 4, 2))
    ours, theirs = classifier.OPTIMIZERS[kind](model, weight_decay=0.1), [p.clone() for p in model.weights()]
    how = dict(momentum=0.9) if kind == "sgd" else dict(weight_decay=0.1)
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](theirs, lr=0.01, **how)
    for _ in range(5):
        for layer in model.linears:
            layer.dW, layer.db = torch.randn_like(layer.W), torch.randn_like(layer.b)
        for p, g in zip(theirs, model.gradients()):
            p.grad = g.clone()
            if kind == "sgd":  # torch's SGD couples its decay with the momentum; ours is AdamW's
                p.mul_(1 - 0.01 * 0.1)
        optimizer.step()
        ours.step(0.01)
    assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(model.weights(), theirs))


def test_learns_with_autograd_off_and_is_a_function_of_the_seed(train, monkeypatch):
    seen, forward = set(), classifier.Linear.forward
    monkeypatch.setattr(classifier.Linear, "forward", lambda *a: seen.add(torch.is_grad_enabled()) or forward(*a))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("autograd was used"))
    rng, labels = np.random.default_rng(0), np.arange(1500) % 3
    images = (rng.integers(0, 200, (1500, 8, 8, 3)) + 12 * labels[:, None, None, None]).astype(np.uint8)
    sets = images[:1000], labels[:1000], images[1000:], labels[1000:], 3  # brighter by class
    how = dict(max_iters=200, batch_size=50, eval_interval=50)
    model, best = train(*sets, 0, **how)
    accuracy = (classifier.predict(model, images[1000:], "cpu") == labels[1000:]).mean()
    assert accuracy == pytest.approx(best["val"]) and accuracy > 0.6
    assert same(train(*sets, 0, **how)[0].weights(), model.weights())
    assert not same(train(*sets, 1, **how)[0].weights(), model.weights())
    assert not same(*(train(*sets, seed, lr=0.0)[0].weights() for seed in (0, 1)))  # from the start
    for more in ({"optimizer": "sgd", "lr": 0.01}, {"hidden": ()}):
        assert train(*sets, 0, **how | more)[1]["val"] > 0.5, more
    assert seen == {False} and not any(p.requires_grad for p in model.weights())


def test_keeps_the_best_validation(train, monkeypatch):
    images, labels, seen = np.zeros((30, 4, 4, 3), np.uint8), np.arange(30) % 3, []
    right = iter((10, 25, 20))  # of 30, at updates 10, 20 and 30

    def predict(model, *_):
        seen.append([p.clone() for p in model.weights()])
        return np.where(np.arange(30) < next(right), labels, -1)

    monkeypatch.setattr(classifier, "predict", predict)
    model, best = train(images, labels, images, labels, 3, 0)
    assert best["step"] == 20 and best["val"] == pytest.approx(25 / 30)
    assert same(model.weights(), seen[1]) and not same(seen[1], seen[2])


def test_resnet18_in_the_mlps_place(train, shards, synthetic, tmp_path, run, fails):
    """With its best weights it keeps the statistics of its batch norms."""
    labels = np.arange(120) % 3
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3)).astype(np.uint8)
    sets = images, labels, images, labels
    model, best = train(*sets, 3, 0, network=ResNet18, max_iters=9, eval_interval=1)
    assert (classifier.predict(model, images, "cpu") == labels).mean() == best["val"] and best["step"] < 9
    flags = classifier_flags(shards, tmp_path, synthetic, seeds=1, max_iters=1)
    assert "hidden and dropout are settings of the MLP" in fails("resnet", *flags)
    run("resnet", *[flag for flag in flags if "hidden" not in flag])
    found = data.read_json(f"{tmp_path}/classifier.json")["runs"]
    assert [r["arm"] for r in found] == ["real", "real+synthetic", "real+real"]


def test_arms_get_equal_weights_and_updates(train, monkeypatch):
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    real, synthetic = (images[:30], np.arange(30) % 3), (images[30:], np.arange(30) % 3)
    starts, rates, init, step = [], [], classifier.AdamW.__init__, classifier.AdamW.step
    keep = lambda self, model, *a: starts.append([p.clone() for p in model.weights()]) or init(self, model, *a)  # noqa: E731
    monkeypatch.setattr(classifier.AdamW, "__init__", keep)
    monkeypatch.setattr(classifier.AdamW, "step", lambda self, lr: rates.append(lr) or step(self, lr))
    for arm, n in {"real": 30, "synthetic": 30, "real+synthetic": 60, "real+real": 60}.items():
        x, y = classifier.arm_images(arm, real, synthetic, seed=0)
        assert len(x) == n and np.array_equal(x[:, 0, 0, 0] % 3, y)  # images keep their labels
        assert (x[:, 0, 0, 0] >= 30).any() == ("synthetic" in arm) and (x[:, 0, 0, 0] < 30).any() == ("real" in arm)
        train(x, y, *real, 3, 0)
    assert len(starts) == 4 and all(same(starts[0], start) for start in starts) and rates == 4 * rates[:30]
    real, _ = data.training_part(*real, ["a", "b", "c"], 0, 9)
    monkeypatch.setattr(classifier, "n_synthetic", 6)
    x, y = classifier.arm_images("real+synthetic", real, synthetic, seed=1)
    assert np.bincount(y[:9]).tolist() == [3, 3, 3] and np.bincount(y[9:]).tolist() == [2, 2, 2]
    assert len(set(x[:, 0, 0, 0])) == 15
    repeated, _ = classifier.arm_images("real+real", real, synthetic, seed=1)
    assert len(repeated) == 15 and set(repeated[:, 0, 0, 0]) == set(x[:9, 0, 0, 0])


def test_statistics_against_scipy():
    stats = pytest.importorskip("scipy.stats")  # comes with the extra `flowers`
    for df in range(1, 20):
        assert classifier.T_97_5[df - 1] == pytest.approx(stats.t.ppf(0.975, df), abs=6e-4)
    mean, error, half = classifier.mean_and_error([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, error) == (3, pytest.approx(math.sqrt(0.5))) and half == pytest.approx(2.776 * error, rel=1e-3)
    assert classifier.mean_and_error([1.0]) == (1.0, None, None)


def test_verdict_says_what_the_numbers_say(capsys):
    def runs(*tests):
        return [dict(test=t, confusion=[[100 * t, 100 - 100 * t], [50 - 50 * t, 50 * t]]) for t in tests]

    def verdict(synthetic, *control):
        arms = {"real": runs(0.50, 0.51, 0.52)[: len(synthetic)], "real+synthetic": runs(*synthetic)}
        return classifier.verdict(arms | ({"real+real": runs(*control)} if control else {}))

    helped = verdict((0.60, 0.61, 0.63))
    assert "minus real: +10.33 points, 95% interval [+" in helped and helped.endswith("Synthetic data helped.")
    hurt = verdict((0.40, 0.41, 0.43))
    assert "minus real: -9.67 points, 95% interval [-" in hurt and hurt.endswith("Synthetic data hurt.")
    assert verdict((0.40, 0.61, 0.53)).endswith("]. No effect was shown.")
    assert "One seed cannot tell" in verdict((0.60,)) and "95%" not in verdict((0.60,))
    assert "One seed cannot tell" in verdict((0.60, 0.61, 0.63), 0.50)  # the control has run once so far
    text = verdict((0.60, 0.61, 0.63), 0.60, 0.61, 0.62)  # the control gains as much
    assert "No effect was shown." in text and "real+synthetic minus real+real: +0.33 points" in text
    assert verdict((0.60, 0.61, 0.63), 0.51, 0.50, 0.52).endswith("Synthetic data helped.")
    assert classifier.verdict({"real": runs(0.5)}) == ""
    classifier.report({"real": runs(0.50, 0.52), "synthetic": runs(0.60, 0.62)}, ["cat", "dog"])
    text = " ".join(capsys.readouterr().out.split())
    assert "cat 51 49 dog 49 51" in text and "cat 61 39" in text  # percent of each true class, over both seeds
    assert "cat +10.00 points" in text and "dog +10.00 points" in text


def test_comparison_writes_what_it_says(shards, synthetic, tmp_path, run):
    """The synthetic images are counted where an arm takes them, and a second result gets a name of its own."""
    text = run("classifier", *classifier_flags(shards, tmp_path, synthetic))
    found = data.read_json(f"{tmp_path}/classifier.json")
    assert [(r["arm"], r["seed"]) for r in found["runs"]] == [(a, k) for a in classifier.ARMS for k in (0, 1)]
    for r in found["runs"]:
        confusion = np.array(r["confusion"])
        assert confusion.sum(axis=1).tolist() == [20, 20, 20] and r["test"] == pytest.approx(np.trace(confusion) / 60)
        assert r["step"] in (3, 6) and r["images"] == {"real": 54, "synthetic": 21}.get(r["arm"], 75)
    assert found["verdict"] in text and found["synthetic"]["w"] == 1 and "±" in text and "note:" not in text
    assert text.count("minus real by class") == 3
    text = run("classifier", *classifier_flags(shards, tmp_path, synthetic, val_fraction=0.3, seeds=1))
    assert "note: the generator may have been trained on the validation images" in text
    kept = [data.read_json(tmp_path / f"{name}.json")["config"]["seeds"] for name in ("classifier", "classifier-2")]
    assert kept == [2, 1]
    more = classifier_flags(shards, tmp_path, synthetic, seeds=1, n_synthetic=22)  # there are 21
    assert "54 real and 0 synthetic training images" in run("classifier", *more, "--arms=real")


def test_test_images_choose_nothing(shards, tmp_path, run):
    found = []
    for order in (1, -1):  # two data sets that differ in their test images alone
        for split in ("train", "test"):
            images, labels, names = data.read_shards(f"{shards}/tiny/{split}")
            data.write_shards(f"{tmp_path}/set/{split}", images[:: order if split == "test" else 1], labels, names)
        run("classifier", *classifier_flags("", tmp_path / str(order), "", dataset=f"{tmp_path}/set", arms="real"))
        found.append(data.read_json(f"{tmp_path}/{order}/classifier.json")["runs"])
    assert all((a["step"], a["val"]) == (b["step"], b["val"]) for a, b in zip(*found))
    assert all(a["confusion"] != b["confusion"] for a, b in zip(*found))
