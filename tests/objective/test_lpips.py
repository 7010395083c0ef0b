"""LPIPS against its formula over torchvision's VGG-16, and its files."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddt.errors import UserError
from ddt.objective.lpips import LPIPS, STAGES, vgg_stages

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def random_weights():
    """State dicts of VGG-16 as torchvision has it, less its large classifier, and of the linear
    layers, random.
    """
    torch.manual_seed(0)
    vgg = {}
    for stage in vgg_stages():
        vgg |= {f"features.{name}": value * 2 for name, value in stage.state_dict().items()}
    linear = {f"lin{k}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for k, widths in enumerate(STAGES)}
    return {**vgg, "classifier.6.bias": torch.zeros(1000)}, linear


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    vgg, linear = random_weights()
    save_file(vgg, folder / "vgg16.safetensors")
    torch.save(linear, folder / "lpips.pth")
    return str(folder / "vgg16.safetensors"), str(folder / "lpips.pth")


def test_the_distance_is_that_of_the_formula(files):
    import torchvision

    vgg, linear = random_weights()
    reference = torchvision.models.vgg16(weights=None).features.eval()
    reference.load_state_dict({k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")})
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    expected = torch.zeros(2)
    maps = [(x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) for x in (a, b)]
    maps = [x / torch.tensor([0.458, 0.448, 0.450])[:, None, None] for x in maps]
    with torch.no_grad():
        for number, layer in enumerate(reference):
            maps = [layer(x) for x in maps]
            if number in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                x, y = (m / (m.norm(dim=1, keepdim=True) + 1e-10) for m in maps)
                weights = linear[f"lin{(3, 8, 15, 22, 29).index(number)}.model.1.weight"]
                expected += ((x - y).square() * weights[0]).sum(1).mean((1, 2))
        found = LPIPS(*files)(a, b)
    torch.testing.assert_close(found, expected.mean(), rtol=1e-5, atol=1e-7)
    assert found > 1e-3


def test_only_the_images_get_gradients(files):
    distance = LPIPS(*files)
    pixels = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance(torch.ones(1, 3, 16, 16), pixels).backward()
    assert pixels.grad.abs().sum() > 0
    assert not any(p.requires_grad for m in (distance.stages, distance.linear) for p in m.parameters())
    assert distance(pixels, pixels).item() == 0


def test_other_files_are_refused(files, tmp_path):
    vgg, linear = files
    with pytest.raises(UserError, match=r"reconstruction\.vgg_weights: not set; give torchvision's vgg16"):
        LPIPS(None, linear)
    with pytest.raises(UserError, match=r"reconstruction\.lpips_weights=none: no such file; give vgg\.pth of taming"):
        LPIPS(vgg, "none")
    with pytest.raises(UserError, match=r"reconstruction\.lpips_weights=.*vgg16\.safetensors: does not fit"):
        LPIPS(vgg, vgg)
    state, _ = random_weights()
    del state["features.28.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"reconstruction\.vgg_weights=.*short\.safetensors: does not fit"):
        LPIPS(str(tmp_path / "short.safetensors"), linear)


@pytest.mark.parametrize(("number", "name"), [(0, "vgg16-397923af.pth"), (1, "vgg.pth")])
def test_other_files_by_the_published_names_are_refused(files, tmp_path, number, name):
    """Versions of LPIPS share name, keys and shapes."""
    other = tmp_path / name
    other.write_bytes(Path(files[number]).read_bytes())
    given = [str(other) if k == number else file for k, file in enumerate(files)]
    with pytest.raises(UserError, match=rf"={other}: is not the published file of this name"):
        LPIPS(*given)
