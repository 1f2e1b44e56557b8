"""The contract that users run on their own rewards: it passes what is sound and names what is not."""

import pickle
import random

import pytest
import torch

from blend.rewards import REWARDS, check_images
from blend.rewards.contract import ContractError, check_reward


class Sound:
    """Mean of the red channel, below 0.9: the rewards below each break one clause."""

    name, version, range, differentiable = "sound", "1", (0.0, 0.9), True

    def __call__(self, images, prompts):
        check_images(images, prompts)
        return self.score(images, prompts)

    def score(self, images, prompts):
        return images[:, 0].float().mean((1, 2)).clamp(max=0.9)


class DependsOnTheBatch(Sound):
    range = (-1.0, 1.0)

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return scores - scores.mean()


class DependsOnPlaces(Sound):
    range = (0.0, 2.0)

    def score(self, images, prompts):
        return super().score(images, prompts) + 1e-3 * torch.arange(len(images))


class ReadsTheFirstPromptAlone(Sound):
    range = (0.0, 99.0)
    differentiable = False

    def score(self, images, prompts):
        return super().score(images, prompts) + len(prompts[0])


class CouplesGradients(Sound):
    """The scores themselves are invariant."""

    def score(self, images, prompts):
        mean = images.mean()
        return super().score(images, prompts) + mean - mean.detach()


class Random(Sound):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def score(self, images, prompts):
        return super().score(images, prompts) * torch.rand(len(images), generator=self.generator)


class Seeds(Sound):
    def score(self, images, prompts):
        torch.manual_seed(0)
        return super().score(images, prompts) * torch.rand(1)


class DrawsFromPython(Sound):
    def score(self, images, prompts):
        random.random()
        return super().score(images, prompts)


class Remembers(Sound):
    """Divides by the largest score so far."""

    range = (0.0, 1.0)
    largest = 1e-3

    def score(self, images, prompts):
        scores = super().score(images, prompts) * (2 if self.largest > 1e-3 else 1) / 2
        self.largest = max(self.largest, float(scores.detach().max()))
        return scores


class ForgetsItsWeights(Sound):
    made = 0

    def __init__(self):
        type(self).made += 1
        self.weight = 1 / type(self).made

    def score(self, images, prompts):
        return super().score(images, prompts) * self.weight


class OutOfRange(Sound):
    def score(self, images, prompts):
        return images[:, 0].mean((1, 2))


class NotANumber(Sound):
    """On a picture without red only, as a ratio of channels is."""

    def score(self, images, prompts):
        return super().score(images, prompts) * (images[:, 0].sum((1, 2)) / images[:, 0].sum((1, 2)))


class Column(Sound):
    def score(self, images, prompts):
        return super().score(images, prompts)[:, None]


class Half(Sound):
    def score(self, images, prompts):
        return super().score(images, prompts).half()


class Squeezes(Sound):
    """One image loses its dimension."""

    def score(self, images, prompts):
        return super().score(images, prompts).squeeze()


class Array(Sound):
    def score(self, images, prompts):
        return super().score(images, prompts).tolist()


class Detached(Sound):
    def score(self, images, prompts):
        return super().score(images, prompts).detach()


class Flat(Sound):
    """The gradient of what was rounded is zero."""

    def score(self, images, prompts):
        return super().score(images, prompts).mul(255).round() / 255


class Downhill(Sound):
    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return 2 * scores.detach() - scores


class Steep(Sound):
    """A root of zero has no finite gradient."""

    def score(self, images, prompts):
        return super().score(images, prompts).sqrt()


class Constant(Sound):
    differentiable = False

    def score(self, images, prompts):
        return torch.full((len(images),), 0.5)


class Writes(Sound):
    def score(self, images, prompts):
        scores = super().score(images, prompts)
        images.detach().clamp_(max=0.5)
        return scores


class Fails(Sound):
    def score(self, images, prompts):
        raise RuntimeError("weights are missing")


class TakesAnything(Sound):
    def __call__(self, images, prompts):
        return self.score(images if images.ndim == 4 else images[None], prompts)


class NoVersion(Sound):
    version = None


class Backwards(Sound):
    range = (1.0, 0.0)


BROKEN = {
    DependsOnTheBatch: "batch invariance: image 1 scores 0 alone and 0.4.* in the batch",
    DependsOnPlaces: "batch invariance: image",
    ReadsTheFirstPromptAlone: "batch invariance: image",
    CouplesGradients: "has a gradient in other images",
    Random: "determinism: the same images score differently when asked again",
    Seeds: "it draws from, or seeds, the global random state",
    DrawsFromPython: "it draws from, or seeds, the global random state",
    Remembers: "determinism: the same images",
    ForgetsItsWeights: "determinism: loaded again it scores differently",
    OutOfRange: r"range: image 1 scores 1, outside \(0.0, 0.9\)",
    NotANumber: "range: image 0 scores nan",
    Column: r"shape: 16 images gave torch.float32 \[16, 1\], not float32 \[16\]",
    Half: r"shape: 16 images gave torch.float16 \[16\]",
    Squeezes: r"shape: an image alone gave \[\], not \[1\]",
    Array: "shape: 16 images gave list",
    Detached: "differentiable: the scores have no gradient",
    Flat: "differentiable: the gradient is zero for every image",
    Downhill: "differentiable: a step along the gradient raises no score",
    Steep: "differentiable: the gradient of image 0 is not finite",
    Constant: "it gives every image the same score, 0.5",
    Writes: "it writes to the images",
    Fails: "it fails on valid images: RuntimeError: weights are missing",
    TakesAnything: "it scores 16 images with 1 prompt.*\n.*one image without its batch dimension",
    NoVersion: "version None must be a string",
    Backwards: r"range \(1.0, 0.0\) must have its low end first",
}


@pytest.mark.parametrize("name", REWARDS)
def test_the_built_in_rewards_keep_it(name):
    assert check_reward(name).name == name


@pytest.mark.parametrize("reward", [Sound, Sound(), lambda: Sound()], ids=["class", "instance", "factory"])
def test_a_sound_reward_passes_however_it_is_given(reward):
    assert isinstance(check_reward(reward, size=16), Sound)


@pytest.mark.parametrize(("reward", "words"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_reward_is_named_with_its_fault(reward, words):
    with pytest.raises(ContractError, match=rf"(?s)sound.*{words}"):
        check_reward(reward, size=16)


def test_every_broken_clause_is_listed():
    class Wild(DependsOnTheBatch):
        range = (0.5, 0.6)
        differentiable = False

    with pytest.raises(ContractError) as told:
        check_reward(Wild())
    assert [line[:10] for line in str(told.value).splitlines()] == ["the reward", "  - range:", "  - batch "]
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)


def test_a_reward_need_not_be_differentiable():
    class Plain(Detached):
        differentiable = False

    check_reward(Plain())


def test_the_tolerance_is_the_callers():
    with pytest.raises(ContractError, match="batch invariance"):
        check_reward(DependsOnPlaces, size=16)
    check_reward(DependsOnPlaces, size=16, tolerance=0.1)


def test_own_images_are_scored():
    seen = []

    class Keeps(Sound):
        def score(self, images, prompts):
            seen.append((images.shape, tuple(prompts)))
            return super().score(images, prompts)

    images = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    check_reward(Keeps, images=images, prompts=["a", "b", "c"])
    assert ((3, 3, 8, 12), ("a", "b", "c")) in seen
    with pytest.raises(ValueError, match="3 images with 2 prompts"):
        check_reward(Keeps, images=images, prompts=["a", "b"])


def test_the_callers_random_state_stays():
    before = torch.get_rng_state()
    check_reward("alignment")
    assert torch.equal(before, torch.get_rng_state())
