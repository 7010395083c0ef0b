"""The model hub, by a fake: names, the cache, downloads and uploads."""

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import GOLDEN, refusal, run_inside, small_checkpoint, small_vae

import ddt
from ddt import hub
from ddt.autoencoder import KLAutoencoder
from ddt.checkpoint.format import find_checkpoint, read_config
from ddt.checkpoint.models import PUBLISHED
from ddt.checkpoint.published import find_released
from ddt.errors import UserError
from ddt.export import ExportSettings, HubModel, export

pytestmark = pytest.mark.usefixtures("one_thread")
COMMIT = "0123456789" * 4


@pytest.fixture
def exported(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint")
    export(ExportSettings(str(folder), "hub", str(tmp_path / "exported")))
    return tmp_path / "exported"


class Hub:
    """A hub of some folders, with a cache of the true layout; `asked`: the requests that need a
    network, `reachable`: whether there is one.
    """

    def __init__(self, cache):
        self.cache, self.models, self.asked, self.reachable = cache, {}, [], True
        self.snapshot_download = huggingface_hub.snapshot_download

    def folder(self, name):
        return self.cache / f"models--{name.replace('/', '--')}"

    def put_into_cache(self, name, files, revision="main"):
        """As the client does: a commit's folder, and a file for the name of a branch or tag."""
        place = self.folder(name)
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(COMMIT)
        for file in files:
            target = place / "snapshots" / COMMIT / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.models[name] / file, target)
        return place / "snapshots" / COMMIT

    def names(self, name, revision):
        self.asked.append((name, revision))
        if not self.reachable:
            raise OSError("\x1b[1mNo route\x1b[0m to the host\nmore")
        if name not in self.models:
            raise OSError("404 Client Error\nRepository Not Found")
        model = self.models[name]
        return [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]

    def download(self, name, revision=None, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return self.snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns=allow_patterns, cache_dir=self.cache
            )
        return str(self.put_into_cache(name, allow_patterns, revision or "main"))

    def model_info(self, name, revision=None, timeout=None):
        assert timeout is not None, "a request without a limit"
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.names(name, revision)])


@pytest.fixture
def there(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


@pytest.fixture
def asked(there, exported):
    """Requests to a hub that has one model."""
    there.models["owner/name"] = exported
    return there.asked


class Api:
    """A hub that accepts everything, and its requests."""

    def __init__(self, token="a token"):
        self.token = token
        self.requests = []
        self.models = set()

    def __call__(self, **_):
        return self

    def whoami(self):
        if self.token is None:
            raise RuntimeError("Token is required\nlog in")

    def repo_exists(self, name):
        return name in self.models

    def create_repo(self, name=None, repo_id=None, **options):
        self.requests.append(("create", name or repo_id, options))
        return SimpleNamespace(repo_id=name or repo_id)

    def upload_folder(self, repo_id, folder_path, **_):
        self.requests.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        self.model = ddt.load_model(folder_path)


@pytest.fixture
def api(monkeypatch):
    fake = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", fake)
    return fake


def test_a_misspelt_run_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("owner/name")
    assert hub.is_hub_id("owner/name.v2@refs/pr/1")
    assert not hub.is_hub_id("runs/demo")  # without a folder runs, too
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    paths = ("runs/demo", "runs/dmeo", "mine/x", "runs", "./a/b", "../a", "a/b/c", "/a/b", str(tmp_path), "owner/name@")
    for path in (*paths, "owner/name@../../x", "a/b..c"):
        assert not hub.is_hub_id(path), path


@pytest.mark.parametrize("key", ["ckpt", "released", "init_from", "autoencoder.source"])
def test_a_typing_error_in_a_path_asks_no_hub(key, there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    calls = {
        "ckpt": lambda source: ddt.load_model(source),
        "released": lambda source: find_released(source),
        "init_from": lambda source: find_released(source, "init_from"),
        "autoencoder.source": lambda source: KLAutoencoder(source, revision="main"),
    }
    for source in ("runs/slip", "./slip", "/no/such", "a/b/c"):
        with pytest.raises(
            UserError, match=rf"^{'' if key == 'ckpt' else f'{key}='}{source.removeprefix('./')}|\./slip"
        ):
            calls[key](source)
    assert there.asked == []


def test_a_model_of_the_hub_is_loaded_at_its_revision(asked, exported):
    here = ddt.load_model(exported).state_dict()
    for there in (ddt.load_model("owner/name", revision="abc123"), ddt.load_model("owner/name@abc123")):
        assert all(torch.equal(value, here[key]) for key, value in there.state_dict().items())
    ddt.load_model("owner/name")
    assert asked == [("owner/name", "abc123"), ("owner/name", None)]  # the second time from the cache


def test_what_is_in_the_cache_needs_no_network(there, exported):
    there.models["owner/name"] = exported
    place = there.put_into_cache("owner/name", [path.name for path in exported.iterdir()])
    there.reachable = False
    assert ddt.load_model("owner/name") is not None
    assert there.asked == []
    (place / "model.safetensors").unlink()  # a download that was interrupted
    with pytest.raises(
        UserError, match=r"^owner/name: no such .* the hub did not give it \(No route to the host\); give"
    ):
        ddt.load_model("owner/name")
    there.reachable = True
    assert ddt.load_model("owner/name") is not None


@pytest.mark.parametrize("files", [["x.ckpt"], ["x.safetensors", "README.md"], ["x.pt", "folder/y.pt"]])
def test_a_published_file_of_the_hub_comes_from_the_cache_or_is_downloaded(there, tmp_path, files):
    model = tmp_path / "model"
    for file in files:
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(GOLDEN / "tiny.weights.safetensors", model / file)
    there.models["owner/ddt"] = model
    found = find_released("owner/ddt")
    assert found.name == files[0]
    assert [path.name for path in found.parent.iterdir()] == [files[0]]  # nothing else was downloaded
    there.reachable = False
    assert find_released("owner/ddt") == found
    assert ddt.load_released(found, encoder_depth=3) is not None
    assert len(there.asked) == 1


def test_a_published_model_is_converted_once_and_then_taken_from_the_cache(there, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DDT_CACHE", str(tmp_path / "models"))
    smaller = dataclasses.replace(PUBLISHED["ddt-xl-256"], settings={"encoder_depth": 3, "resolution": 256})
    monkeypatch.setitem(PUBLISHED, "ddt-xl-256", smaller)
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(GOLDEN / "tiny.weights.safetensors", model / "x.safetensors")
    there.models["MCG-NJU/DDT-XL-22en6de-R256"] = model
    assert {"ddt-xl-256", "ddt-xl-512", "ditdh-xl-256"} <= set(ddt.list_models())
    there.reachable = False
    with pytest.raises(UserError, match="the hub did not give it") as error:
        ddt.load_model("ddt-xl-256")
    command = f"scripts/convert_checkpoint.py released=FILE encoder_depth=3 resolution=256 out={tmp_path}/models/models"
    assert "copy the weights of MCG-NJU/DDT-XL-22en6de-R256 to this machine" in str(error.value)
    assert f"{command}/ddt-xl-256" in str(error.value)
    there.reachable = True
    network = ddt.load_model("ddt-xl-256")
    expected = ddt.load_released(model / "x.safetensors", encoder_depth=3)
    for a, b in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    shutil.rmtree(there.cache)  # what was converted needs the hub no more
    there.reachable = False
    assert ddt.load_model("ddt-xl-256") is not None
    stored = read_config(find_checkpoint("ddt-xl-256"))
    assert stored["latent_shape"] == [4, 32, 32]
    assert stored["sampler"]["cfg_interval"] == [0.3, 1.0]
    assert stored["autoencoder"]["source"] == "stabilityai/sd-vae-ft-ema"
    assert "one of its checkpoints/step_*, or a published model (ddt-xl-256, " in refusal("sample", "ckpt=ddt-xl-255")


def test_a_name_of_a_published_model_that_is_a_folder_here_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_checkpoint(tmp_path / "ddt-xl-256")
    assert find_checkpoint("ddt-xl-256") == Path("ddt-xl-256")


def test_several_published_files_are_not_guessed_among(there, tmp_path):
    there.models["owner/ddt"] = tmp_path / "model"
    (tmp_path / "model").mkdir()
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(UserError, match="released=owner/ddt: holds 2 files of weights"):
        find_released("owner/ddt")


def test_an_autoencoder_of_the_hub_comes_from_the_cache_or_is_downloaded(there, tmp_path):
    model = Path(small_vae(tmp_path / "vae", levels=2))
    shutil.copy(model / "config.json", model / "preprocessor.json")
    there.models["owner/vae"] = model
    first = KLAutoencoder("owner/vae", revision=COMMIT)
    assert there.asked == [("owner/vae", COMMIT)]
    there.reachable = False
    assert KLAutoencoder("owner/vae", revision=COMMIT).fingerprint == first.fingerprint
    assert KLAutoencoder(str(model)).fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"^autoencoder\.source=owner/none: .*No route to the host.*local folder"):
        KLAutoencoder("owner/none", revision=COMMIT)


def test_the_offline_switch_is_respected(monkeypatch):
    """With the true client: HF_HUB_OFFLINE=1 is set for all tests."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match=r"nobody/nothing: .*offline mode is enabled.*HF_HUB_OFFLINE") as error:
        find_released("nobody/nothing")
    assert len(str(error.value).splitlines()) == 1


def test_a_failed_download_is_one_line(asked, exported):
    with pytest.raises(
        UserError, match=r"^nobody/nothing: no such file or folder here, .*\(404 Client Error\); give"
    ) as e:
        ddt.load_model("nobody/nothing")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="revision=abc: has no effect with"):
        ddt.load_model(exported, revision="abc")
    (exported / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"owner/name: is on the hub, but no model of this project"):
        ddt.load_model("owner/name")


def test_samples_of_a_hub_model_lie_here_and_not_in_the_cache(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_inside("sample", "ckpt=owner/name@v1", "num_samples=2", "num_processes=1")
    assert done.returncode == 0, done.stderr
    assert [path.parent for path in tmp_path.rglob("samples.npz")] == [tmp_path / "outputs" / "owner" / "name@v1"]
    assert asked == [("owner/name", "v1")]


def test_an_export_is_pushed_as_a_new_private_model(api, tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint")
    done = run_inside("scripts.export", f"ckpt={folder}", "format=hub", f"out={tmp_path / 'out'}", "push=owner/name")
    assert done.returncode == 0, done.stderr
    files = ["README.md", "config.json", "manifest.json", "model.safetensors"]
    assert api.requests == [
        ("create", "owner/name", {"private": True, "exist_ok": False}),
        ("upload", "owner/name", files),
    ]
    assert "https://huggingface.co/owner/name" in done.stderr
    assert 'ddt.load_model("owner/name")' in (tmp_path / "out" / "README.md").read_text()


def test_mistakes_with_the_hub_are_one_line(api, exported):
    with pytest.raises(UserError, match="push=name: no name of a model; write owner/name"):
        hub.check_push("name")
    api.models.add("owner/name")
    with pytest.raises(UserError, match="push=owner/name: exists already and is not written over"):
        hub.check_push("owner/name")
    api.token = None
    with pytest.raises(
        UserError, match=r"^push=owner/new: the hub does not take it \(Token is required\); log in"
    ) as e:
        hub.check_push("owner/new")
    assert "\n" not in str(e.value)
    api.upload_folder = lambda **_: (_ for _ in ()).throw(OSError("413 too large\nmore"))
    with pytest.raises(UserError, match=r"is written, but the hub did not take it \(413 too large\); upload it by"):
        hub.push(exported, "owner/new")


def test_the_methods_of_huggingface_hub(api, exported, tmp_path):
    loaded = HubModel.from_pretrained(exported)
    with torch.no_grad():
        loaded.model.decoder.output.linear.bias += 1  # as fine-tuning does
    loaded.save_pretrained(tmp_path / "again")
    again = HubModel.from_pretrained(str(tmp_path / "again")).model
    expected = loaded.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    config = ddt.checkpoint.format.read_config(tmp_path / "again")
    assert config["sampler"]["num_steps"] == 4
    assert config["export"]["weights_sha256"] != config["export"]["made_from_sha256"]
    assert (tmp_path / "again" / "README.md").is_file()
    with pytest.raises(UserError, match="exists already and is not written over"):
        loaded.save_pretrained(tmp_path / "again")
    loaded.push_to_hub("owner/name", private=True)
    assert [call[:2] for call in api.requests] == [("create", "owner/name"), ("upload", "owner/name")]
    assert torch.equal(api.model.decoder.output.linear.bias, expected["decoder.output.linear.bias"])
