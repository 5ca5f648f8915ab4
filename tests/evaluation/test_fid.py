"""Feature sets: networks against references, sets that are saved, shared among processes and compared."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from diffalign import cli
from diffalign.data.images import read_folder
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.fid import (
    FeatureError,
    FeatureSet,
    collect,
    compare,
    distance_intervals,
    drawn_batches,
    extract,
    folder_batches,
    measure,
    model_batches,
    warnings,
)
from diffalign.evaluation.fid_sides import draw_scene
from diffalign.pipelines.drawing import Drawing
from diffalign.rewards import features
from diffalign.rewards.base import RewardError
from diffalign.rewards.inception import FIDInception, resize_like_tensorflow1
from diffalign.shapes import CHECKPOINTS


class Means:
    """A network: means and standard deviations of the channels."""

    name, weights, resize = "means", "none", "none"

    def __call__(self, images):
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


class Other(Means):
    name = "other"


def scenes(n_prompts=12, per=2, network=None, about=None):
    prompts = load_prompts("shapes:held_out", limit=n_prompts)
    source = drawn_batches(draw_scene, prompts, images_per_prompt=per, batch_size=5)
    return extract(network or Means(), source, about or {})


def fixed_inception():
    """Weights of no meaning, the same everywhere, whose activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(1)
    model = FIDInception().eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5
        else:
            p.data = torch.rand(p.shape, generator=generator) * 0.4 + 0.8
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.data = torch.randn(buffer.shape, generator=generator) * 0.1
        if "running_var" in name:
            buffer.data = torch.rand(buffer.shape, generator=generator) + 0.5
    return model, generator


def test_inception_is_that_of_torch_fidelity(tmp_path):
    """Its FeatureExtractorInceptionV3 (commit 5e211a9) gave these numbers for the same weights and images."""
    model, generator = fixed_inception()
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    network = features.load_network(f"inception:{tmp_path / 'inception.pth'}")
    images = torch.randint(0, 256, (2, 3, 120, 200), generator=generator, dtype=torch.uint8)
    found = network(images)
    expected = [
        [4.597687, 4.862771, 176.395508, 91.766602, 45.563148, 53.703171],
        [4.607790, 4.869084, 176.287445, 91.622414, 46.068516, 54.507572],
    ]
    torch.testing.assert_close(found[:, ::400], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 2048)
    assert "sha256" in network.weights  # not the released ones, and not called so
    assert found.mean().item() == pytest.approx(26.283266, rel=1e-4)


def test_tensorflow_1_resizes_from_the_corner():
    """Pixel i of the result lies at i H / h: every second of a doubled image is the image."""
    x = torch.rand(1, 1, 5, 7)
    doubled = resize_like_tensorflow1(x, 10, 14)
    torch.testing.assert_close(doubled[..., ::2, ::2], x)
    torch.testing.assert_close(doubled[..., 0, 1], (x[..., 0, 0] + x[..., 0, 1]) / 2)
    torch.testing.assert_close(
        doubled[..., 0, -1], x[..., 0, -1]
    )  # beyond the last there is nothing
    torch.testing.assert_close(resize_like_tensorflow1(x, 5, 7), x)


def test_shapes_features_are_those_of_transformers():
    folder = CHECKPOINTS / "shapes-clip"
    model, processor = (
        CLIPModel.from_pretrained(folder).eval(),
        CLIPImageProcessorPil.from_pretrained(folder),
    )
    pixels = [draw_scene(p, i) for i, p in enumerate(load_prompts("shapes:held_out", limit=3))]
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
        expected = model.float().vision_model(**inputs).pooler_output
    found = features.load_network("shapes_clip")(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_networks_have_names_and_weights(tmp_path):
    with pytest.raises(features.UnknownNetwork, match="known are inception, clip, shapes_clip"):
        features.load_network("resnet")
    with pytest.raises(features.UnknownNetwork):
        features.load_network("clip:some.pth")
    with pytest.raises(RewardError, match=r"could not be loaded.*network shapes_clip"):
        features.load_network(f"inception:{tmp_path / 'none.pth'}")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(RewardError, match="could not be loaded"):
        features.load_network(f"inception:{tmp_path / 'cut.pth'}")


def test_a_download_must_be_what_its_name_says(tmp_path, monkeypatch):
    """And where there is none, the error says what can be done without."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = features.INCEPTION_URL.rpartition("/")[2]
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / name).as_uri())
    with pytest.raises(RewardError, match=r"could not be loaded.*shapes_clip needs no download"):
        features.load_network("inception")
    torch.save(FIDInception().state_dict(), tmp_path / name)
    with pytest.raises(RewardError, match="invalid hash value"):
        features.load_network("inception")


def test_statistics_are_saved_and_loaded(tmp_path):
    made = scenes(about={"drawn": "shapes"})
    made.save(tmp_path / "s.npz")
    again = FeatureSet.load(tmp_path / "s.npz")
    assert (again.network, again.resize, again.about) == (made.network, made.resize, made.about)
    assert again.moments.n == 24
    torch.testing.assert_close(again.features, made.features)
    found = compare(made, again)
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert found["precision"] == found["recall"] == 1


def test_statistics_of_pytorch_fid_give_fid_alone(tmp_path):
    made = scenes()
    np.savez(
        tmp_path / "p.npz", mu=made.moments.mean.numpy(), sigma=made.moments.covariance.numpy()
    )
    found = compare(made, FeatureSet.load(tmp_path / "p.npz"))
    assert set(found) == {"fid", "diversity_within_prompt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": np.eye(5)}, r"mu is \(6,\) and sigma \(5, 5\)"),
        ({"mu": np.zeros((6, 1))}, "mu is"),
        ({"mu": np.full(6, np.nan)}, "mu holds NaN"),
        ({"sigma": np.full((6, 6), np.inf)}, "sigma holds NaN or infinity"),
        ({"sigma": np.eye(6) + np.eye(6, k=1)}, "sigma is not symmetric"),
        ({"sigma": np.diag([1.0, 1, 1, 1, 1, -1])}, "sigma has the negative eigenvalue -1"),
        ({"mu": np.zeros(6) + 1j}, "mu holds complex numbers"),
        ({"sigma": np.eye(6) + 0j}, "sigma holds complex numbers"),
        ({"features": np.zeros((4, 5)), "group": np.zeros(4)}, "do not fit"),
        ({"features": np.zeros((4, 6))}, "do not fit"),
        ({"mu": np.array(["a"] * 6)}, "no statistics"),
        ({"mu": np.array([None] * 6)}, "no statistics"),
        ({"notes": np.array("[1]")}, "no statistics"),
        ({"notes": np.array("{")}, "no statistics"),
        ({"notes": np.array('{"n": "many"}')}, "no statistics"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_when_they_are_read(tmp_path, change, message):
    np.savez(tmp_path / "s.npz", **({"mu": np.zeros(6), "sigma": np.eye(6)} | change))
    with pytest.raises(FeatureError, match=message):
        FeatureSet.load(tmp_path / "s.npz")


@pytest.mark.parametrize("cut", [10, 100, -30, -1])
def test_cut_statistics_are_refused(tmp_path, cut):
    scenes().save(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:cut])
    with pytest.raises(FeatureError, match="no statistics"):
        FeatureSet.load(tmp_path / "s.npz")


def test_single_precision_statistics_are_read(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(6, np.float32), sigma=np.eye(6, dtype=np.float32))
    assert FeatureSet.load(tmp_path / "s.npz").moments.mean.dtype == torch.float64


@pytest.mark.parametrize("name", ["stats", "stats.npz", "stats.v1", "STATS.NPZ"])
def test_statistics_always_end_in_npz(tmp_path, name):
    file = scenes().save(tmp_path / "new" / name)
    assert file.suffix.lower() == ".npz"
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert FeatureSet.load(file).moments.n == 24


def test_all_paths_are_checked_before_a_network_is_loaded(tmp_path, capsys, monkeypatch):
    """Nothing of this may download Inception, load a model or read an image."""

    def load(name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(features, "load_network", load)
    save(tmp_path / "images", np.zeros((3, 8, 8, 3), np.uint8), ["a.png", "b.png", "c.png"])
    (tmp_path / "broken.npz").write_bytes(b"PK")
    (tmp_path / "file").write_text("x")
    generated = f"--generated={tmp_path / 'images'}"
    for flags, message in (
        ([generated, "--reference=coco/val2017"], "coco/val2017"),
        ([generated, f"--reference={tmp_path / 'broken.npz'}"], "no statistics"),
        ([generated, f"--reference={tmp_path / 'none.npz'}"], "does not exist"),
        ([generated, f"--save_statistics={tmp_path / 'file' / 'x'}"], "is a file"),
        ([f"--images={tmp_path / 'none'}", "--reference=shapes:held_out"], "none"),
    ):
        assert cli.main(["evaluate", "fid", *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_reference_of_other_features_is_refused_before_images_are_drawn(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    flags = [
        "--model=shapes-none",
        "--network=shapes_clip",
        f"--reference={tmp_path / 'other.npz'}",
    ]
    assert cli.main(["evaluate", "fid", *flags]) == 2
    error = capsys.readouterr().err
    assert "and 5 dimensions cannot be compared" in error or "shapes-none" in error
    scenes(network=Other()).save(tmp_path / "named.npz")
    with pytest.raises(FeatureError, match="different networks"):
        FeatureSet.load(tmp_path / "named.npz").check_network(Means())
    with pytest.raises(FeatureError, match="6 .* and 5 dimensions"):
        FeatureSet.load(tmp_path / "other.npz").check_network(Means())
    scenes().save(tmp_path / "same.npz")
    FeatureSet.load(tmp_path / "same.npz").check_network(Means())


def sets(n, m, shift=0.0, dimension=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        collect(Means(), [torch.from_numpy(rng.normal(s, 1, (k, dimension))).float()], range(k), {})
        for k, s in ((n, shift), (m, 0.0))
    ]


@pytest.mark.parametrize(
    ("n", "m", "words"),
    [
        (4, 400, ["4 generated images are too few", "rank 3"]),
        (400, 3, ["3 reference images are too few"]),
        (30, 400, ["30 generated images are few", "biased upwards"]),
        (400, 400, []),
    ],
)
def test_few_images_are_warned_of(n, m, words):
    told = " ".join(warnings(*sets(n, m)))
    assert all(w in told for w in words)
    assert bool(told) == bool(words)
    assert ("KID" in told) == bool(words)


def test_fid_of_few_images_is_too_high_and_kid_is_not():
    """The reason for the warning: two sets of one distribution."""
    few = [compare(*sets(20, 20, dimension=16, seed=i)) for i in range(20)]
    many = compare(*sets(2000, 2000, dimension=16))
    assert np.mean([f["fid"] for f in few]) > 20 * many["fid"]
    kid = np.array([f["kid"] for f in few])
    assert abs(kid.mean()) < 3 * kid.std() / len(kid) ** 0.5


@pytest.mark.slow
def test_the_interval_of_kid_holds_the_truth_as_often_as_it_says():
    truth = compare(*sets(4000, 4000, shift=0.3, seed=99))["kid"]
    held = 0
    for i in range(100):
        pair = sets(60, 80, shift=0.3, seed=i)
        found = distance_intervals(*pair, *measure(*pair))["kid"]
        held += found["low"] <= truth <= found["high"]
    assert held >= 90
    few = sets(4, 40)
    assert "kid" not in distance_intervals(*few, *measure(*few))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut", "no moments"])
def test_files_without_statistics_are_refused(tmp_path, content):
    file = tmp_path / "x.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        np.savez(file, other=np.zeros(3))
    with pytest.raises(FeatureError, match="no statistics"):
        FeatureSet.load(file)


def test_what_cannot_be_compared_is_refused():
    made = scenes()
    with pytest.raises(FeatureError, match="different networks"):
        compare(made, scenes(network=Other()))
    wider = collect(Means(), [torch.randn(5, 9)], [0] * 5, {})
    with pytest.raises(FeatureError, match="6 and 9 dimensions"):
        compare(made, wider)
    with pytest.raises(FeatureError, match="two images"):
        collect(Means(), [torch.randn(1, 6)], [0], {})
    with pytest.raises(FeatureError, match="not finite"):
        collect(Means(), [torch.full((3, 6), float("nan"))], [0] * 3, {})


def save(folder, pixels, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(folder / name)


def test_folders_count_what_they_hold_and_are_shared_among_processes(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(7)]
    save(tmp_path, rng.integers(0, 256, (7, 20, 30, 3), dtype=np.uint8), names)
    for name in names[:3]:
        (tmp_path / name).with_suffix(".txt").write_text("the same prompt")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images, about = read_folder(tmp_path), {}
    whole = extract(Means(), folder_batches(images, about, batch_size=3), about)
    assert (about["images"], about["unreadable"], about["formats"]) == (7, 1, ["png"])
    assert sorted(np.bincount(whole.group.numpy()).tolist())[-1] == 3
    features_of, group = [], []
    for process in range(2):
        for pixels, numbers in folder_batches(images, {}, batch_size=2, process=(process, 2)):
            features_of.append(Means()(pixels))
            group += numbers
    shared = collect(Means(), features_of, group, {})
    found = compare(shared, whole)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["diversity_within_prompt"] == pytest.approx(
        compare(whole, whole)["diversity_within_prompt"]
    )


def test_models_share_their_batches_among_processes(sd3):
    prompts = load_prompts("shapes:held_out", limit=3)
    drawing = Drawing(1, images_per_prompt=2, micro_batch_size=2, mixed_precision="no")

    def batches(**kwargs):
        return list(model_batches(sd3, prompts, {}, drawing, **kwargs))

    whole = batches()
    parts = [batches(process=(i, 2)) for i in range(2)]
    assert [len(p) for p in parts] == [2, 1]
    mixed = [parts[0][0], parts[1][0], parts[0][1]]
    for (images, numbers), (expected, group) in zip(mixed, whole, strict=True):
        assert numbers == group
        assert (images.int() - expected.int()).abs().max() <= 1


def test_fid_from_the_command_line(tmp_path, capsys):
    """Drawn scenes are near Shapes, noise is far; a model's images can be the generated ones."""
    prompts = load_prompts("shapes:held_out", limit=40)
    save(
        tmp_path / "right",
        [draw_scene(p, 1000 + i) for i, p in enumerate(prompts)],
        [f"{i}.png" for i in range(40)],
    )
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    save(tmp_path / "noise", noise, [f"{i}.png" for i in range(40)])

    def fid(*flags):
        assert cli.main(["evaluate", "fid", "--json", "--reference=shapes:held_out", *flags]) == 0
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    near = fid(f"--images={tmp_path / 'right'}", f"--save_statistics={tmp_path / 'r.npz'}")
    far = fid(f"--images={tmp_path / 'noise'}")
    assert near["fid"] < far["fid"] / 5
    assert near["precision"] > 0.8 > far["precision"]
    assert near["generated"]["n"] == 40
    assert near["reference"]["n"] == 98 * 8
    assert "shapes-clip" in near["network"]
    model = fid(
        "--model=shapes-sd3", "--max_prompts=4", "--num_inference_steps=2", "--images_per_prompt=2"
    )
    assert model["generated"]["n"] == 8
    assert near["generated"]["formats"] == ["png"]
    assert model["generated"]["formats"] == model["reference"]["formats"] != ["png"]
    assert "torchmetrics" in model["library"]
    assert "torchmetrics" in model["versions"]

    assert cli.main(["evaluate", "fid"]) == 2
    assert "needs --reference" in capsys.readouterr().err
    flags = [
        f"--images={tmp_path / 'right'}",
        f"--reference={tmp_path / 'none'}",
        "--network=shapes_clip",
    ]
    assert cli.main(["evaluate", "fid", *flags]) == 2
    same = [
        f"--images={tmp_path / 'right'}",
        f"--reference={tmp_path / 'r.npz'}",
        "--network=shapes_clip",
    ]
    assert cli.main(["evaluate", "fid", "--json", *same]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["fid"] == pytest.approx(
        0, abs=1e-6
    )


def test_generated_is_a_folder_or_a_model(tmp_path, capsys):
    """And its statistics can be kept without comparing them with anything."""
    prompts = load_prompts("shapes:held_out", limit=6)
    pixels = [draw_scene(p, i) for i, p in enumerate(prompts)]
    save(tmp_path / "images", pixels, [f"{i}.png" for i in range(6)])

    def fid(generated, *flags):
        command = ["evaluate", "fid", f"--generated={generated}", "--json", *flags]
        command += ["--network=shapes_clip"]
        status = cli.main(command)
        out = capsys.readouterr()
        return json.loads(out.out.strip().splitlines()[-1]) if status == 0 else out.err

    statistics = tmp_path / "kept" / "s.npz"
    kept = fid(tmp_path / "images", f"--save_statistics={statistics}")
    assert "fid" not in kept
    assert "reference" not in kept
    assert kept["generated"]["n"] == FeatureSet.load(statistics).moments.n == 6
    again = fid(tmp_path / "images", f"--reference={statistics}")
    assert again["fid"] == pytest.approx(0, abs=1e-6)
    few = ("--max_prompts=3", "--num_inference_steps=1", "--images_per_prompt=1")
    drawn = fid("shapes-sd3", f"--reference={statistics}", *few)
    assert (drawn["generated"]["n"], drawn["generated"]["model"]) == (3, "shapes-sd3")
    assert "give either it or --images" in fid("shapes-sd3", f"--images={tmp_path}")
    assert "shapes-sd4" in fid("shapes-sd4", f"--reference={statistics}")
