"""evaluate.py: distances against formulas, the memorisation test against chance and copies, both feature networks."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import flags

import data
from lab import evaluate


def feature_sets(n=90, k=70, d=12):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(1, 1, (n, d)), rng.normal(1.1, 1.1, (k, d)) * np.linspace(0.7, 1.2, d)
    return X.astype(np.float32), Y.astype(np.float32)


def evaluation(root, samples, **changes):
    """Flags that score a sample folder against the real shapes. Earlier results are removed."""
    shutil.rmtree(f"{root}/out", ignore_errors=True)
    settings = dict(dataset=f"{root}/real", data_dir=f"{root}/data", out_dir=f"{root}/out", cache_dir=f"{root}/kept")
    return flags(**settings | dict(samples=samples, resize=32, device="cpu") | changes)


def result(root, name="evaluate"):
    return data.read_json(f"{root}/out/{name}.json")


@pytest.mark.parametrize("n", (90, 10))  # more images than features, and fewer
def test_frechet_distance_equals_torch_fidelitys(n):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    X, Y = feature_sets(n)
    statistics = [fid_features_to_statistics(torch.from_numpy(Z).double()) for Z in (X, Y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert evaluate.frechet_distance(X, Y) == pytest.approx(expected, rel=1e-5)
    assert abs(evaluate.frechet_distance(X, X)) < 1e-9


def test_kernel_distance_is_a_mean_over_disjoint_parts():
    def unbiased(P, Q):  # of 35 each
        XX, YY, XY = ((A.astype(float) @ B.T / 12 + 1) ** 3 for A, B in ((P, P), (Q, Q), (P, Q)))
        return (XX.sum() - XX.trace() + YY.sum() - YY.trace()) / (35 * 34) - 2 * XY.mean()

    X, Y = feature_sets(n=70)
    rng = np.random.default_rng(0)
    halves = zip(*(np.array_split(rng.permutation(70), 2) for _ in range(2)))
    kd = [unbiased(X[i], Y[j]) for i, j in halves]
    expected = np.mean(kd), np.std(kd, ddof=1) / 2**0.5
    assert evaluate.kernel_distance(X, Y, parts=2) == pytest.approx(expected, rel=1e-6)


def test_samples_inside_the_real_ones_have_precision_but_no_recall():
    X, Y = feature_sets()
    middle = Y.mean(axis=0) + 0.01 * X
    for Z, expected in ((middle, (1, 0)), (X + 100, (0, 0)), (Y, (1, 1))):
        scores = evaluate.scores(Z, Y)
        assert (scores["precision"], scores["recall"]) == expected


def test_nearest_neighbours():
    X, Y = feature_sets(n=1100)  # more than one block
    distances, indices = evaluate.nearest(X, Y)
    table = np.linalg.norm(X[:, None] - Y[None], axis=-1)
    assert np.array_equal(indices.numpy(), table.argmin(1)) and np.allclose(distances.numpy(), table.min(1), atol=1e-4)


def test_error_of_the_memorised_share_accounts_for_hubs():
    rng, found = np.random.default_rng(0), []
    pool = rng.normal(size=(100, 6)).astype(np.float32)
    X = (pool[:8].repeat(50, axis=0) + 0.1 * rng.normal(size=(400, 6))).astype(np.float32)  # crowds around a few
    for _ in range(200):
        a, b = np.array_split(pool[rng.permutation(100)], 2)  # random halves of one pool
        found.append(evaluate.share_nearer(evaluate.nearest(X, a), evaluate.nearest(X, b), 50))
    shares, errors = zip(*found)
    assert np.std(shares) == pytest.approx(np.mean(errors), rel=0.2)
    assert abs(np.mean(shares) - 0.5) < 4 * np.mean(errors) / 200**0.5
    assert np.mean(errors) > 5 * 0.5 / 400**0.5  # than that of coin tosses
    every = evaluate.nearest(pool, a), evaluate.nearest(pool, b)  # one copy of each: always half of them
    assert evaluate.share_nearer(*every, 50) == pytest.approx((0.5, 0))
    tie = evaluate.nearest(pool[:1], pool)
    assert evaluate.share_nearer(tie, tie, 100)[0] == 0.5


def test_features_are_cached_by_content(tmp_path):
    class Network:
        device, key, calls = "cpu", "net-1234", 0

        def __call__(self, images):
            self.calls += 1
            return images.flatten(1)[:, :3].float()

    def features(images):
        return evaluate.features_of(network, images, "reference", f"{tmp_path}/cifar10")

    network, images = Network(), np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
    for _ in range(2):
        assert np.array_equal(features(images), images.reshape(5, -1)[:, :3]) and network.calls == 1
    features(images + 1)
    network.key = "net-5678"
    features(images)
    assert network.calls == 3 and all(name.startswith("cifar10-5-net-") for name in os.listdir(tmp_path))


def test_generator_saw_what_its_manifest_says(tmp_path):
    images, labels = np.arange(20 * 12, dtype=np.uint8).reshape(20, 2, 2, 3), np.arange(20) % 2
    order = data.fixed_order(images, labels)
    made_with, part = dict(val_fraction=0.1, n_real=0, validation=data.fingerprint(images[order[18:]])), order[:18]
    few = made_with | dict(n_real=6)
    cases = [(None, range(20)), (made_with, part), (few, part[data.balanced(images[part], labels[part], 6, 0)])]
    cases += [(made_with | dict(init_from=made_with), part), (few | dict(init_from=made_with), ())]
    cases += [(made_with | dict(validation="other"), range(20)), (few | dict(validation="other"), ())]
    cases += [(made_with | dict(val_fraction=0.01), range(20))]  # of these images that is none
    for trained_on, expected in cases:
        if trained_on:
            data.save_json(f"{tmp_path}/manifest.json", dict(complete=True, trained_on=trained_on))
        seen, seen_labels = evaluate.seen_by_generator(tmp_path, images, labels)
        assert np.array_equal(seen, images[list(expected)]), trained_on
        assert not len(seen) or np.array_equal(seen_labels, labels[list(expected)])


def test_table_says_what_was_compared(real_shapes, run):
    text = run("evaluate", *evaluation(real_shapes, f"{real_shapes}/copied"))
    assert "EfficientNet-Lite0, 1280 features, images resized to 32" in text
    assert "train split; 100 images of each" in text and "real: test" in text
    assert "FD is biased high" in text and "FID" not in text and "every sample a copy: 67%" in text
    samples, real = result(real_shapes)["scores"].values()
    assert samples["n"] == real["n"] == 100 and abs(samples["kd"]) < 5 * samples["kd_error"]  # the same, in part
    assert 0 < samples["fd"] < real["fd"]
    found = result(real_shapes)["memorisation"]
    assert found["share"] > 0.55 and (found["train"], found["of"], found["test"]) == (100, 300, 100)


def test_copied_samples_are_found(real_shapes, run):
    """Of the training split, not of the test split. The second result does not replace the first."""
    of = lambda split: f"{real_shapes}/real/{split}"  # noqa: E731
    how = {s: evaluation(real_shapes, of(s), classes="ring,disc", split=s) for s in ("train", "test")}
    for split, share, name in (("train", "100.0%", "evaluate"), ("test", " 0.0%", "evaluate-2")):
        assert f"{share} of the samples are nearer" in run("evaluate", *how[split])
        assert os.path.exists(f"{real_shapes}/out/{name}_nearest.png")
        found = result(real_shapes, name)
        copies, real = found["scores"].values()
        assert found["config"]["split"] == split and copies["n"] == 60 and copies["precision"] == copies["recall"] == 1
        assert abs(copies["fd"]) < 1e-4 < real["fd"] and abs(copies["kd"]) < 4 * copies["kd_error"]


def test_damage_is_seen_in_grey_images_without_labels_or_test_split(real_shapes, tmp_path, run):
    images, labels, names = data.load(f"{real_shapes}/real/train")
    grey = images[:200].mean(axis=-1, keepdims=True).round()
    noise = np.random.default_rng(0).normal(0, 30, grey.shape)
    data.write_shards(f"{tmp_path}/real", grey, labels[:200], names)
    damaged = (grey + noise).round().clip(0, 255)
    for k, samples in enumerate((grey.repeat(3, axis=-1), damaged)):  # the first in colour
        data.write_shards(f"{tmp_path}/{k}", samples, None, [])
        text = run("evaluate", *evaluation(tmp_path, f"{tmp_path}/{k}"))
        assert "real: other half of train" in text and "memorisation: not measured" in text
        samples, real = result(tmp_path)["scores"].values()
        assert (samples["kd"] > real["kd"] + 5 * real["kd_error"] and samples["fd"] > real["fd"]) == (k == 1)


def test_inception_weights_are_downloaded_or_given_but_never_executed(real_shapes, fails, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: open(tmp_path / "no network"))
    inception = evaluation(real_shapes, f"{real_shapes}/copied", features="inception")
    assert "FileNotFoundError: get https://" in fails("evaluate", *inception)
    torch.save({"fc.weight": os.system}, tmp_path / "code.pth")
    assert "UnpicklingError: get https://" in fails("evaluate", *inception, f"--weights={tmp_path}/code.pth")


@pytest.mark.slow
def test_inception_is_torch_fidelitys(real_shapes, run, tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    weights, features = f"{tmp_path}/weights.pth", ["2048", "logits_unbiased"]
    with monkeypatch.context() as patch:  # random weights
        patch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.save(theirs.FeatureExtractorInceptionV3("random", features).state_dict(), weights)
    images = data.load(f"{real_shapes}/copied")[0][:4]
    expected, logits = theirs.FeatureExtractorInceptionV3("", features, weights)(torch.tensor(images).movedim(-1, 1))
    monkeypatch.setattr(evaluate, "weights", weights)
    network = evaluate.Inception("cpu")
    X = torch.tensor(evaluate.features_of(network, images, "samples"))
    assert torch.allclose(X, expected, rtol=1e-4) and torch.allclose(X @ network.head, logits, rtol=1e-4, atol=1e-5)
    flags = evaluation(real_shapes, f"{real_shapes}/copied", features="inception", weights=weights, n=20)
    text = run("evaluate", *flags)
    assert "FID is biased high" in text and "KID" in text and "of the samples are nearer to one of 20" in text
    for scores in result(real_shapes, "evaluate_inception")["scores"].values():
        assert scores["fd"] > 0 and abs(scores["kd"]) < 1 <= scores["inception_score_mean"]
