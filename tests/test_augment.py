"""Augmentation: each image its own draw, a pure function of (seed, position), labels kept honest."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.augment import OPS, Augment, crop_and_flip, erase, uniforms
from vitrail.batch import Batch, normalize
from vitrail.config import AugmentConfig, Preprocessing

PLAIN = AugmentConfig(crop_padding=0, flip=False)
PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
EVERYTHING = AugmentConfig(policy="randaugment", erasing=0.5)


def make_batch(count: int = 16, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(count) % 4, torch.ones(count))


def augment(config: AugmentConfig, batch: Batch, start: int = 0, seed: int = 0) -> Batch:
    return Augment(config, PREPROCESSING, 4, seed)(batch, start)


@given(seed=st.integers(0, 2**31 - 1), start=st.integers(0, 2**40))
def test_draws_are_uniform_and_pure(seed: int, start: int) -> None:
    positions = start + torch.arange(64)
    draws = uniforms(seed, positions, 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.equal(uniforms(seed, positions[10:11], 8)[0], draws[10])
    assert 0.3 < draws.mean() < 0.7
    assert len(draws.unique()) > 500
    assert not torch.equal(uniforms((seed + 1) % 2**31, positions, 8), draws)


def test_draws_look_independent() -> None:
    draws = uniforms(0, torch.arange(20_000), 6)
    correlation = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], dim=1).T)
    assert (correlation - torch.eye(12)).abs().max() < 0.03
    histogram = draws.flatten().histc(20, 0, 1)
    assert (histogram / histogram.mean() - 1).abs().max() < 0.06


@pytest.mark.parametrize("policy", ["none", "trivialaugment", "randaugment"])
def test_an_images_augmentation_depends_on_its_position_alone(policy: str) -> None:
    batch = make_batch()
    config = AugmentConfig(policy=policy, erasing=0.5)
    whole = augment(config, batch, start=100)
    part = augment(config, Batch(batch.images[5:9], batch.labels[5:9], batch.weight[5:9]), start=105)
    torch.testing.assert_close(part.images, whole.images[5:9])
    assert not torch.equal(augment(config, batch, start=101).images, whole.images)
    assert not torch.equal(augment(config, batch, start=100, seed=1).images, whole.images)


def test_no_augmentation_is_normalisation_alone() -> None:
    batch = make_batch()
    out = augment(PLAIN, batch)
    torch.testing.assert_close(out.images, normalize(batch.images, PREPROCESSING))
    assert torch.equal(out.labels, batch.labels)


def test_crop_shifts_every_image_by_its_own_offset_and_mirrors_the_edge() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8).repeat(3, 1, 1, 1)
    draws = torch.tensor([[0.5, 0.0, 0.9], [0.5, 0.5, 0.9], [0.5, 0.99, 0.9]])  # columns -2, 0 and +2
    out = crop_and_flip(ramp, draws, padding=2, flip=True)[:, 0, 0]
    assert out[0].tolist() == [2, 1, 0, 1, 2, 3, 4, 5]
    assert out[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert out[2].tolist() == [2, 3, 4, 5, 6, 7, 6, 5]


def test_half_of_the_images_are_mirrored() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(4000, 3, 8, 8)
    batch = Batch(ramp, torch.zeros(4000, dtype=torch.int64), torch.ones(4000))
    out = augment(replace(PLAIN, flip=True), batch).images
    mirrored = out[:, 0, 0, 0] > out[:, 0, 0, 7]
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_erasing_blanks_a_rectangle_of_the_chosen_share_of_images() -> None:
    images = torch.ones(4000, 3, 16, 16)
    out = erase(images, uniforms(0, torch.arange(4000), 5), 0.25)
    blank = out[:, 0] == 0
    hit = blank.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.25, abs=0.03)
    share = blank[hit].float().mean((1, 2))
    assert share.min() > 0.01
    assert share.max() < 0.4
    rows, columns = blank.any(2).sum(1), blank.any(1).sum(1)
    assert torch.equal(rows * columns, blank.sum((1, 2)))  # a full rectangle, no holes
    assert torch.equal(out[:, 0], out[:, 2])


def grey_ramp() -> Tensor:
    return torch.linspace(0, 255, 64).view(1, 1, 8, 8).repeat(1, 3, 1, 1)


@pytest.mark.parametrize("name", OPS)
def test_every_operation_keeps_shape_and_range(name: str) -> None:
    operation, widest, _, signed = OPS[name]
    images = make_batch().images.float()
    for sign in (1, -1) if signed else (1,):
        out = operation(images, torch.full((16,), sign * widest))
        assert out.shape == images.shape
        assert out.min() >= 0
        assert out.max() <= 255
        changed = (out - images).abs().max() > 1
        assert changed or name in ("identity", "autocontrast")


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op[3] or n in ("posterize", "solarize")])
def test_strength_zero_changes_nothing(name: str) -> None:
    images = make_batch().images.float()
    out = OPS[name][0](images, torch.zeros(16))
    if name == "solarize":  # its threshold is 255 then, which no pixel passes
        assert (images <= 255).all()
    torch.testing.assert_close(out, images, atol=1e-3, rtol=0)


def test_operations_do_what_their_names_say() -> None:
    ramp = grey_ramp()
    assert OPS["brightness"][0](ramp, torch.tensor([-1.0])).max() == 0
    assert OPS["contrast"][0](ramp, torch.tensor([-1.0])).std() < 1e-3
    red = torch.tensor([200.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert OPS["color"][0](red, torch.tensor([-1.0])).std(1).max() < 1e-3
    shifted = OPS["translate_x"][0](ramp, torch.tensor([0.25]))  # a quarter of 8 pixels
    torch.testing.assert_close(shifted[..., :6], ramp[..., 2:])
    turned = OPS["rotate"][0](ramp, torch.tensor([torch.pi / 2]))
    torch.testing.assert_close(turned, ramp.rot90(1, (2, 3)))
    dull = ramp / 5 + 100
    stretched = OPS["autocontrast"][0](dull, torch.zeros(1))
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert OPS["solarize"][0](ramp, torch.tensor([0.5])).max() <= 128
    assert len(OPS["posterize"][0](ramp, torch.tensor([6.0])).unique()) == 4
    dark = (ramp / 255) ** 4 * 255
    flat = OPS["equalize"][0](dark, torch.zeros(1)).flatten()
    assert flat.max() == 255
    assert flat.median() > dark.median() + 50


def test_a_policy_draws_a_different_operation_per_image() -> None:
    same = make_batch().images[:1].expand(400, 3, 8, 8)
    batch = Batch(same, torch.zeros(400, dtype=torch.int64), torch.ones(400))
    out = augment(replace(PLAIN, policy="trivialaugment"), batch).images
    assert len(out.flatten(1).unique(dim=0)) > 100


@settings(deadline=None, max_examples=20)
@given(mixup=st.sampled_from([0.0, 0.2, 1.0]), cutmix=st.sampled_from([0.0, 1.0]), start=st.integers(0, 10**6))
def test_mixing_keeps_the_mass_of_the_labels(mixup: float, cutmix: float, start: int) -> None:
    batch = make_batch()
    out = augment(replace(PLAIN, mixup=mixup, cutmix=cutmix), batch, start)
    if mixup or cutmix:
        torch.testing.assert_close(out.labels.sum(1), torch.ones(16))
        assert out.labels.min() >= 0
        # every image keeps a share of its own label, and the rest is its partner's
        assert ((out.labels > 0).sum(1) <= 2).all()
        partners = batch.labels.roll(1)
        own_and_partner = torch.zeros(16, 4).scatter_(1, batch.labels[:, None], 1).scatter_(1, partners[:, None], 1)
        assert (out.labels * (1 - own_and_partner)).sum() == 0
        torch.rand(1)  # whatever else has drawn from the global generator since
        again = augment(replace(PLAIN, mixup=mixup, cutmix=cutmix), batch, start)
        assert torch.equal(out.images, again.images)
    else:
        assert torch.equal(out.labels, batch.labels)


def test_cutmix_labels_are_the_shares_of_the_area() -> None:
    images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 8, 8)
    batch = Batch(images, torch.arange(16) % 4, torch.ones(16))
    out = augment(replace(PLAIN, cutmix=1.0), batch, start=3)
    own = normalize(images, PREPROCESSING)
    kept = (out.images[:, 0] - own[:, 0]).abs().lt(1e-4).float().mean((1, 2))
    torch.testing.assert_close(out.labels[torch.arange(16), batch.labels], kept)


def test_augmenting_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augment(replace(EVERYTHING, mixup=0.5, cutmix=0.5), make_batch())
    assert torch.equal(torch.rand(3), expected)
