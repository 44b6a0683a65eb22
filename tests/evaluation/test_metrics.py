"""Every metric against something that shares no code with it: torchmetrics, scipy, a naive formula, a closed form."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from stepdistill.evaluation.metrics.bootstrap import Interval, deviation_interval, mean_interval
from stepdistill.evaluation.metrics.classifier import class_accuracy, inception_score
from stepdistill.evaluation.metrics.diversity import authenticity, nearest_distance, within_class_spread
from stepdistill.evaluation.metrics.frechet import Moments, bootstrap_interval, frechet_distance
from stepdistill.evaluation.metrics.kernel import cmmd, kernel_distance
from stepdistill.evaluation.metrics.manifold import density_coverage, precision_recall
from stepdistill.evaluation.metrics.scores import Sample, prompt_spread, spread
from stepdistill.evaluation.reference import ReferenceStatistics
from stepdistill.features.classifier import SmallConvNet


def normal(n, d=6, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def correlated(n, d=6, seed=0):
    return normal(n, d, seed) @ normal(d, d, seed + 100) + normal(1, d, seed + 200)


# ---------------------------------------------------------------------------------------- Fréchet distance


class Passthrough(nn.Module):
    """torchmetrics' feature network for inputs that are features already."""

    num_features = 6

    def forward(self, x):
        return x


def test_frechet_distance_equals_torchmetrics():
    real, fake = correlated(300, seed=1), correlated(200, seed=2)
    reference = FrechetInceptionDistance(feature=Passthrough(), input_img_size=(6,)).set_dtype(torch.float64)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    assert frechet_distance(Moments.of(real), Moments.of(fake)) == pytest.approx(reference.compute().item(), rel=1e-9)


def test_frechet_distance_equals_scipy():
    real, fake = correlated(300, seed=3).numpy(), correlated(200, seed=4).numpy()
    cov_r, cov_f = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    mean_gap = np.square(real.mean(0) - fake.mean(0)).sum()
    expected = mean_gap + np.trace(cov_r + cov_f - 2 * scipy.linalg.sqrtm(cov_r @ cov_f).real)
    found = frechet_distance(Moments.of(torch.from_numpy(real)), Moments.of(torch.from_numpy(fake)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    rotation, _ = torch.linalg.qr(normal(5, 5))
    s, t, gap = torch.tensor([1.0, 4, 9, 0, 2]).double(), torch.tensor([4.0, 4, 1, 3, 0]).double(), normal(5, 1)[:, 0]
    real = Moments(100, torch.zeros(5).double(), rotation * s @ rotation.T)
    fake = Moments(100, gap, rotation * t @ rotation.T)
    expected = gap.square().sum() + (s.sqrt() - t.sqrt()).square().sum()
    assert frechet_distance(real, fake) == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("n", [4, 500])  # fewer images than features: a singular covariance
def test_frechet_distance_of_a_set_with_itself_is_zero(n):
    moments = Moments.of(correlated(n))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_float16_features_is_summed_in_float64():
    features = (normal(20_000) + 50).half()
    shifted = Moments.of(features).mean
    torch.testing.assert_close(shifted, features.double().mean(0))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_merged_moments_equal_the_whole(batch):
    features = correlated(100) + 1000
    parts = [Moments.of(part) for part in features.split(batch)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = Moments.of(features)
    assert merged.n == whole.n
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.cov, whole.cov)
    np.testing.assert_allclose(whole.cov.numpy(), np.cov(features.numpy(), rowvar=False))


# ------------------------------------------------------------------------------------------ bootstrap interval


def test_bootstrap_interval_is_as_wide_as_fresh_samples_spread():
    reference = Moments(10**6, torch.zeros(6).double(), torch.eye(6).double())
    fresh = torch.tensor([frechet_distance(reference, Moments.of(normal(400, seed=s, shift=0.3))) for s in range(200)])
    intervals = [bootstrap_interval(normal(400, seed=s, shift=0.3), reference) for s in range(5)]
    width = sum(interval.high - interval.low for interval in intervals) / 5
    expected = (fresh.quantile(0.975) - fresh.quantile(0.025)).item()
    assert width == pytest.approx(expected, rel=0.3)


def test_bootstrap_within_classes_does_not_count_the_mix_as_chance():
    labels = torch.arange(400) % 4

    def sample(seed):
        return normal(400, seed=seed) + 3.0 * labels[:, None]

    reference = Moments.of(normal(40_000, seed=999, shift=0.3) + 3.0 * (torch.arange(40_000) % 4)[:, None])
    fresh = torch.tensor([frechet_distance(reference, Moments.of(sample(s))) for s in range(200)])
    expected = (fresh.quantile(0.975) - fresh.quantile(0.025)).item()
    within = bootstrap_interval(sample(0), reference, labels=labels)
    assert within.high - within.low == pytest.approx(expected, rel=0.4)
    across = bootstrap_interval(sample(0), reference)
    assert across.high - across.low > 2 * expected


def test_bootstrap_draw_equals_the_repeated_images():
    fake, real = correlated(50), Moments.of(correlated(60, seed=9))
    drawn = torch.randint(50, (50,), generator=torch.Generator().manual_seed(3))
    one = bootstrap_interval(fake, real, resamples=2, seed=3)
    first = frechet_distance(real, Moments.of(fake[drawn]))
    generator = torch.Generator().manual_seed(3)
    second = [frechet_distance(real, Moments.of(fake[torch.randint(50, (50,), generator=generator)])) for _ in range(2)]
    assert second[0] == first
    half = abs(second[0] - second[1]) / 2 * 0.95  # the quantiles of two values lie on the line between them
    centre = frechet_distance(real, Moments.of(fake))
    assert (one.low, one.high) == pytest.approx((centre - half, centre + half), rel=1e-9)


def test_bootstrap_interval_repeats_and_holds_the_distance():
    fake, real = correlated(100), Moments.of(correlated(100, seed=5))
    interval = bootstrap_interval(fake, real, level=0.9)
    assert interval == bootstrap_interval(fake, real, level=0.9)
    assert interval.low < frechet_distance(real, Moments.of(fake)) < interval.high
    assert interval.overlaps(Interval(interval.high, interval.high + 1, 0.9))
    assert not interval.overlaps(Interval(interval.high + 0.1, interval.high + 1, 0.9))


# --------------------------------------------------------------------------------------------- kernel distances


def naive_unbiased_mmd(x, y, kernel):
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_equals_the_naive_estimator():
    real, fake = normal(30), normal(30, seed=1, shift=0.5)
    expected = naive_unbiased_mmd(real.numpy(), fake.numpy(), lambda a, b: (a @ b / 6 + 1) ** 3)
    found = kernel_distance(real, fake, subsets=3, subset_size=30)
    assert found.mean == pytest.approx(expected, rel=1e-10)
    assert found.std == pytest.approx(0, abs=1e-12)  # the subset is the whole set each time


def test_kernel_distance_is_unbiased_and_repeats():
    real, fake = normal(1000), normal(1000, seed=1)
    found = kernel_distance(real, fake, subset_size=100)
    assert abs(found.mean) < found.std
    assert found == kernel_distance(real, fake, subset_size=100)
    assert found != kernel_distance(real, fake, subset_size=100, seed=1)


def test_cmmd_equals_the_published_formula():
    real, fake = normal(40), normal(50, seed=1, shift=0.5)
    x, y = (z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True) for z in (real, fake))
    gram = {pair: np.exp(-scipy.spatial.distance.cdist(*pair_of, "sqeuclidean") / 200).mean()
            for pair, pair_of in {"xx": (x, x), "yy": (y, y), "xy": (x, y)}.items()}  # fmt: skip
    assert cmmd(real, fake) == pytest.approx(1000 * (gram["xx"] + gram["yy"] - 2 * gram["xy"]), rel=1e-8)
    assert cmmd(real, real) == pytest.approx(0, abs=1e-10)


# --------------------------------------------------------------------------------------- fidelity and diversity


def naive_manifolds(real, fake, k):
    """Loops over the definitions of Kynkäänniemi 2019 (precision, recall) and Naeem 2020 (density, coverage)."""

    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    real_r = [radius(real, i) for i in range(len(real))]
    fake_r = [radius(fake, i) for i in range(len(fake))]
    inside = [[math.dist(f, r) <= radius for r, radius in zip(real, real_r, strict=True)] for f in fake]
    covered = [[math.dist(f, r) <= radius for f, radius in zip(fake, fake_r, strict=True)] for r in real]
    precision = sum(any(row) for row in inside) / len(fake)
    recall = sum(any(row) for row in covered) / len(real)
    density = sum(map(sum, inside)) / (k * len(fake))
    coverage = sum(any(row[i] for row in inside) for i in range(len(real))) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_metrics_equal_the_naive_definitions(k, monkeypatch):
    monkeypatch.setattr("stepdistill.evaluation.metrics.manifold.BLOCK", 11)  # several blocks, the last one short
    real, fake = normal(60, 3), normal(40, 3, seed=1, shift=0.7, scale=0.6)
    expected = naive_manifolds(real.tolist(), fake.tolist(), k)
    assert (*precision_recall(real, fake, k=k), *density_coverage(real, fake, k=k)) == pytest.approx(expected)


def test_manifold_metrics_of_equal_and_of_disjoint_sets():
    real = normal(500)
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real).coverage == 1
    assert precision_recall(real, real + 100) == (0, 0)
    assert density_coverage(real, real + 100) == (0, 0)


def test_coverage_of_a_fresh_sample_is_one_minus_two_to_the_minus_k():
    found = density_coverage(normal(2000), normal(2000, seed=1), k=5)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert found.density == pytest.approx(1, abs=0.1)


def test_within_class_spread_is_the_ratio_of_variances():
    labels = torch.arange(400) % 4
    real = normal(400) + 10 * labels[:, None]
    centre = torch.stack([real[labels == c].mean(0) for c in range(4)])[labels]
    assert within_class_spread(real, labels, real, labels) == pytest.approx(1)
    assert within_class_spread(real, labels, centre + (real - centre) / 2, labels) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="spread: expected 2 images of class 3, got 100 real, 1 fake"):
        within_class_spread(real, labels, real[labels < 4][:4].repeat(2, 1)[:7], torch.tensor([0, 0, 1, 1, 2, 2, 3]))


def spreads(fake, groups):
    """Spread within classes and within prompts, of a reference of unit covariance, also in each class."""
    d = fake.shape[1]
    corners = torch.eye(d, dtype=torch.float64) * (d - 0.5) ** 0.5
    names = groups.unique()
    real, labels = torch.cat([corners, -corners]).repeat(len(names), 1), names.repeat_interleave(2 * d)
    moments = Moments(None, torch.zeros(d).double(), torch.eye(d).double())
    sample = Sample(fake, groups, moments, real, labels, lambda rows: rows, prompts=groups)
    return [*spread(sample).values(), *prompt_spread(sample).values()]


@pytest.mark.parametrize(
    "sizes", [[2] * 60, [3] * 40, [5] * 20, [50] * 3, [2] * 30 + [3] * 20 + [9] * 6], ids=["2", "3", "5", "50", "mixed"]
)
def test_intervals_of_spread_hold_the_truth_whatever_the_size_of_a_group(sizes):
    """Of Gaussian images; their unbiased variance has the variance 2 sigma^4 / (n - 1) in each dimension."""
    d, sizes = 8, torch.tensor(sizes)
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)
    scores = [spreads(normal(len(groups), d, seed), groups) for seed in range(40)]
    each = (torch.ones(len(sizes)).double() / len(sizes), sizes / sizes.sum())  # classes count alike, prompts by images
    for found, share in zip(zip(*scores, strict=True), each, strict=True):
        width = 3.92 * (share.square() * 2 / (d * (sizes - 1))).sum().sqrt().item()
        mean_width = sum(score.interval.high - score.interval.low for score in found) / len(found)
        assert mean_width == pytest.approx(width, rel=0.12)
        assert sum(score.interval.low <= 1 <= score.interval.high for score in found) >= 34


def test_the_interval_of_spread_with_many_images_a_class_is_that_of_a_mean():
    classes = torch.arange(1000) % 2
    values = normal(1000, 1).square()[:, 0]
    found, plain = deviation_interval(values, classes), mean_interval(values, labels=classes)
    assert found == pytest.approx(plain, rel=0.002)
    assert deviation_interval(values[:2], classes[:1].repeat(2)) is None


def test_nearest_distance_finds_the_copy():
    training, queries = normal(50), normal(7, seed=1)
    queries[3] = training[20]
    found = nearest_distance(queries, training)
    expected = scipy.spatial.distance.cdist(queries.numpy(), training.numpy())
    assert found.row.tolist() == expected.argmin(1).tolist()
    assert found.row[3] == 20
    np.testing.assert_allclose(found.distance.numpy(), expected.min(1), atol=1e-6)


def test_authenticity_of_copies_and_of_held_out_images():
    training = normal(2000)
    assert authenticity(training[:500] + 1e-4, training) == 0
    assert authenticity(normal(2000, seed=1), training) == pytest.approx(0.5, abs=0.06)


# ------------------------------------------------------------------------------------------- classifier metrics


def test_inception_score_equals_torchmetrics():
    logits = normal(200, 10) * 3
    reference = InceptionScore(feature=Passthrough(), splits=1).double()
    reference.update(logits)
    assert inception_score(logits, splits=1).mean == pytest.approx(reference.compute()[0].item(), rel=1e-6)


def test_inception_score_of_sure_and_of_equal_classes():
    sure = torch.eye(10).repeat(100, 1) * 1000  # certain, and sorted by nothing: every class in every split
    assert inception_score(sure, splits=1).mean == pytest.approx(10)
    assert inception_score(torch.zeros(100, 10)).mean == pytest.approx(1)
    sorted_by_class = sure[sure.argmax(1).argsort()]
    assert inception_score(sorted_by_class).mean > 9  # unshuffled splits would hold one class each: a score of 1


@pytest.mark.parametrize("count", [20, 29, 1001])
def test_inception_score_has_as_many_parts_as_asked_for_of_every_number_of_images(count):
    logits = 4 * normal(count, 10)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = np.array_split(logits[order].softmax(1).numpy(), 10)
    scores = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in parts]
    assert len({len(part) for part in parts}) <= 2 and min(map(len, parts)) > 1
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(scores)) and found.std == pytest.approx(np.std(scores, ddof=1))
    with pytest.raises(ValueError, match="expected at least 20 images, got 19"):
        inception_score(logits[:19])


def test_a_collapsed_generator_is_caught():
    """Class means: perfect class accuracy, high precision, and nothing else right."""
    labels = torch.arange(1000) % 10
    means = 6 * torch.eye(10, dtype=torch.float64)[labels]
    real, collapsed = normal(1000, 10) + means, means + normal(1000, 10, seed=1, scale=1e-3)
    logits = -torch.cdist(collapsed, 6 * torch.eye(10, dtype=torch.float64))
    assert class_accuracy(logits, labels) == 1
    assert precision_recall(real, collapsed).precision > 0.95
    assert precision_recall(real, collapsed).recall < 0.01
    assert density_coverage(real, collapsed).coverage < 0.6
    fresh = normal(1000, 10, seed=2) + means
    assert density_coverage(real, fresh).coverage > 0.9
    assert within_class_spread(real, labels, collapsed, labels) < 1e-5
    assert within_class_spread(real, labels, fresh, labels) == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------------------------------- reference statistics


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallConvNet(width=2, num_features=6).eval()


def test_our_reference_statistics_come_back(tmp_path, network):
    moments = Moments.of(correlated(50))
    ReferenceStatistics.of(moments, network).write(tmp_path / "reference.npz")
    read = ReferenceStatistics.read(tmp_path / "reference.npz").check(network)
    assert read.n == 50
    assert torch.equal(read.mean, moments.mean) and torch.equal(read.cov, moments.cov)


def test_statistics_of_other_weights_are_refused(tmp_path, network):
    """RELIABILITY row 33: another feature network."""
    ReferenceStatistics.of(Moments.of(correlated(50)), network).write(tmp_path / "reference.npz")
    with torch.no_grad():
        network.head.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="reference made with features 'small_convnet' \\(sha256"):
        ReferenceStatistics.read(tmp_path / "reference.npz").check(network)


def test_statistics_of_another_preprocessing_are_refused(network):
    reference = ReferenceStatistics(Moments.of(correlated(9)), {**network.describe(), "preprocessing": {"size": 224}})
    with pytest.raises(ValueError, match="preprocessing {'size': 224}"):
        reference.check(network)


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 8, 8, 3))}])
def test_adm_and_clean_fid_statistics_are_inceptions_only(tmp_path, network, extra):
    np.savez(tmp_path / "stats.npz", mu=np.ones(6, np.float32), sigma=np.eye(6), **extra)
    reference = ReferenceStatistics.read(tmp_path / "stats.npz")
    assert reference.moments.n is None
    with pytest.raises(ValueError, match="reference made with features 'inception'.*not 'small_convnet'"):
        reference.check(network)
    network.name = "inception"
    assert torch.equal(reference.check(network).mean, torch.ones(6).double())
    network.num_features = 2048
    with pytest.raises(ValueError, match="reference of length 6, features of 2048"):
        reference.check(network)


def test_files_without_statistics_are_named(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nonsense")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    for name, message in [
        ("images.npz", "expected mu and sigma, got images"),
        ("broken.npz", "expected an .npz of statistics"),
        ("absent.npz", "expected an .npz of statistics"),
        ("odd.npz", r"mu \(3,\) and sigma \(4, 4\) do not fit"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            ReferenceStatistics.read(tmp_path / name)


FACTS = json.dumps({"name": "small_convnet", "sha256": "0", "preprocessing": {}})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mu": np.array(["a"])}, "mu: expected numbers, got <U1"),
        ({"mu": np.full(3, np.nan)}, "got NaN or infinity in mu or sigma"),
        ({"sigma": np.full((3, 3), np.inf)}, "got NaN or infinity in mu or sigma"),
        ({"n": np.array([1, 2])}, "n: expected the number of images"),
        ({"n": np.array(-1)}, "n: expected the number of images, got array"),
        ({"rows": np.zeros((4, 2))}, r"rows: expected float \(N, 3\), got float64 \(4, 2\)"),
        ({"rows": np.zeros((4, 3), int)}, r"rows: expected float \(N, 3\), got int64"),
        ({"rows": np.zeros((4, 3)), "labels": np.zeros(3, int)}, "labels: expected a whole number for every row"),
        ({"labels": np.zeros(3, int)}, "labels: expected a whole number for every row"),
        ({"features": np.array("{")}, "features: expected JSON"),
        ({"features": np.array("[1]")}, r"features: content: expected a section of keys, got \[1\]"),
        ({"features": np.array('{"sha256": "0"}')}, r"features: name: missing"),
        ({"images": np.array('{"shape": 3}')}, "images: shape: expected a list of whole numbers"),
        ({"arr_0": np.zeros((2, 8), np.uint8)}, r"arr_0: expected images \(N, H, W, C\), got \(2, 8\)"),
        ({"rows": np.array([{}], dtype=object)}, "holds Python objects"),
    ],
)  # fmt: skip
def test_odd_statistics_are_named(tmp_path, changed, message):
    """FAULTS 9, 10: a reference of any content is one sentence with the file's name."""
    np.savez(
        tmp_path / "a.npz", **{"mu": np.zeros(3), "sigma": np.eye(3), "n": np.array(9), "features": FACTS} | changed
    )
    with pytest.raises(ValueError, match=rf"a\.npz.*: .*{message}"):
        ReferenceStatistics.read(tmp_path / "a.npz")


def test_statistics_that_name_no_preprocessing_are_refused(network):
    reference = ReferenceStatistics(Moments.of(correlated(9)), {"name": "x", "sha256": network.sha256})
    with pytest.raises(ValueError, match="made with features 'x' \\(preprocessing None\\)"):
        reference.check(network)


# --------------------------------------------------------------------------------------------------- bad input


def test_one_image_has_no_covariance():
    """RELIABILITY row 33: N < 2."""
    with pytest.raises(ValueError, match="expected at least 2 images for a covariance, got 1"):
        frechet_distance(Moments.of(normal(9)), Moments.of(normal(1)))
    with pytest.raises(ValueError, match="expected at least 4 images, got 3"):
        precision_recall(normal(9), normal(3))


def test_nan_features_are_counted_and_located():
    """RELIABILITY row 33: NaN features."""
    features = normal(20)
    features[4, 2] = math.nan
    for metric in (Moments.of, inception_score, lambda x: cmmd(normal(9), x), lambda x: precision_recall(normal(9), x)):
        with pytest.raises(ValueError, match="1 of 20 images"):
            metric(features)


def test_lengths_that_differ_are_named():
    """RELIABILITY row 33: sizes of features."""
    with pytest.raises(ValueError, match="expected length 6, as the reference has, got 5"):
        cmmd(normal(9), normal(9, 5))
    with pytest.raises(ValueError, match="expected length 6, as the reference has, got 5"):
        frechet_distance(Moments.of(normal(9)), Moments.of(normal(9, 5)))


def test_a_subset_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="subset_size: got 1000 for 9 real and 8 fake images"):
        kernel_distance(normal(9), normal(8))
