"""The model hub, by a fake: names, downloads and uploads."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import refusal, run_inside, small_checkpoint

import ddt
from ddt.checkpoint import hub
from ddt.errors import UserError
from ddt.export import ExportSettings, HubModel, export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def exported(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint")
    export(ExportSettings(str(folder), "hub", str(tmp_path / "exported")))
    return tmp_path / "exported"


@pytest.fixture
def asked(monkeypatch, exported):
    """Requests to a hub that has one model."""
    calls = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append((name, revision))
        if name != "owner/name":
            raise OSError("404 Client Error\nRepository Not Found")
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


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
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for path in ("runs/demo", "runs/dmeo", "runs", "./a/b", "../a", "a/b/c", "/a/b", str(tmp_path), "owner/name@"):
        assert not hub.is_hub_id(path), path


def test_a_model_of_the_hub_is_loaded_at_its_revision(asked, exported):
    here = ddt.load_model(exported).state_dict()
    for there in (ddt.load_model("owner/name", revision="abc123"), ddt.load_model("owner/name@abc123")):
        assert all(torch.equal(value, here[key]) for key, value in there.state_dict().items())
    ddt.load_model("owner/name")
    assert asked == [("owner/name", "abc123")] * 2 + [("owner/name", None)]


def test_a_failed_download_is_one_line(asked, exported, monkeypatch):
    with pytest.raises(UserError, match=r"^nobody/nothing: no such folder here, .*\(404 Client Error\); give") as error:
        ddt.load_model("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="revision=abc: has no effect with"):
        ddt.load_model(exported, revision="abc")
    (exported / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"owner/name: is on the hub, but no model of this project"):
        ddt.load_model("owner/name")


def test_sampling_from_the_hub_needs_out(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("sample", "ckpt=owner/name").startswith("out: not set; ckpt=owner/name is a model of the hub")
    done = run_inside("sample", "ckpt=owner/name@v1", "num_samples=2", "num_processes=1", f"out={tmp_path / 'set'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "set" / "samples.npz").is_file()
    assert set(asked) == {("owner/name", "v1")}


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
