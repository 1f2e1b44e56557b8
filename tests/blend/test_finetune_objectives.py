"""Objectives, advantages and the value network against closed forms and finite differences."""

import pytest
import torch

from blend.finetune import advantages
from blend.finetune.objectives import OBJECTIVES, dpok_loss, ppo_clip_loss, regularised_loss, transition_kl
from blend.finetune.value import ValueNetwork


def test_transition_kl_is_the_gaussian_kl_per_element():
    generator = torch.Generator().manual_seed(0)
    mean, base = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    std = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    wide = std.view(-1, 1, 1, 1).expand_as(mean)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, wide), torch.distributions.Normal(base, wide)
    )
    torch.testing.assert_close(transition_kl(mean, base, std), exact.flatten(1).mean(1))


@pytest.mark.parametrize("loss", [dpok_loss, ppo_clip_loss])
def test_policy_gradient_at_ratio_one(loss):
    log_prob = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, -1.5, 0.25], dtype=torch.float64)
    value = loss(log_prob, log_prob.detach(), advantage, 1e-4)
    value.sum().backward()
    torch.testing.assert_close(log_prob.grad, -advantage)


def test_clipping_outside_the_range():
    old = torch.zeros(4, dtype=torch.float64)
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(
        dpok_loss(log_prob, old, advantage, 0.1),
        -advantage * torch.tensor([1.1, 1.1, 0.9, 0.9], dtype=torch.float64),
    )
    ppo = ppo_clip_loss(log_prob, old, advantage, 0.1)
    ppo.sum().backward()
    ratio = log_prob.detach().exp()
    # only steps that would move the ratio further out are cut; PPO pulls the others back
    torch.testing.assert_close(
        ppo.detach(),
        torch.stack([torch.tensor(-1.1).double(), ratio[1], -ratio[2], torch.tensor(0.9).double()]),
    )
    assert log_prob.grad is not None
    assert log_prob.grad[0] == 0
    assert log_prob.grad[3] == 0
    assert log_prob.grad[1] != 0
    assert log_prob.grad[2] != 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_loss_gradient_matches_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    mean, base, drawn = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    mean, std = mean.requires_grad_(), torch.full((4,), 0.7, dtype=torch.float64)
    advantage = torch.randn(4, generator=generator, dtype=torch.float64)

    def loss(mean):
        log_prob = -((drawn - mean) ** 2).flatten(1).mean(1) / (2 * 0.7**2)
        old = torch.full_like(log_prob, -1.0)
        policy = OBJECTIVES[name].policy_loss(log_prob, old, advantage, 10.0)
        return regularised_loss(policy, transition_kl(mean, base, std), 0.3)

    assert torch.autograd.gradcheck(loss, (mean,))


BATCH = 4096


def baseline_of(name, statistics):
    """Rewards [N] of one prompt to advantages, as the objective's own baseline takes them; the value is the mean."""
    if OBJECTIVES[name].baseline == "running":
        return lambda rewards: statistics.advantages(rewards, ["one prompt"] * len(rewards))
    return lambda rewards: advantages.group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.long))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_toy_reward_reaches_the_kl_regularised_optimum(name, alpha):
    """Base N(0, 1), reward b x: the optimum of E[r] - alpha KL is N(b / alpha, 1).

    DDPO's running baseline divides by the prompt's standard deviation, here b: its optimum is N(1 / alpha, 1).
    """
    generator = torch.Generator().manual_seed(2)
    slope, mean = 0.8, torch.zeros(1, dtype=torch.float64, requires_grad=True)
    gain = 1.0 if OBJECTIVES[name].baseline == "running" else slope
    baseline = baseline_of(name, advantages.PromptStatistics(window=BATCH))
    optimizer = torch.optim.SGD([mean], lr=0.1)
    std = torch.ones(BATCH, dtype=torch.float64)
    for _ in range(150):
        drawn = mean.detach() + torch.randn(BATCH, generator=generator, dtype=torch.float64)
        gains = baseline(slope * drawn)
        log_prob = -((drawn - mean) ** 2) / 2
        kl = transition_kl(mean.expand(BATCH, 1), torch.zeros(BATCH, 1, dtype=torch.float64), std)
        policy_loss = OBJECTIVES[name].policy_loss(log_prob, log_prob.detach(), gains, 0.2)
        loss = regularised_loss(policy_loss, kl, alpha).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(gain / alpha, abs=0.05)


def test_group_advantages_are_centred_within_each_group():
    rewards = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    groups = torch.tensor([0, 0, 1, 1, 1])
    assert advantages.group_advantages(rewards, groups).tolist() == [-1.0, 1.0, -10.0, 0.0, 10.0]


def test_prompt_statistics_use_the_batch_until_a_prompt_is_known():
    statistics = advantages.PromptStatistics(window=4, minimum=3)
    first = statistics.advantages(torch.tensor([0.0, 2.0]), ["a", "b"])
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)
    statistics.advantages(torch.tensor([2.0, 4.0]), ["a", "a"])
    # "a" has now seen 0, 2, 4 and then 6: mean 3, std sqrt(5)
    known = statistics.advantages(torch.tensor([6.0]), ["a"])
    torch.testing.assert_close(known, torch.tensor([3.0 / 5**0.5]), atol=1e-5, rtol=0)
    again = advantages.PromptStatistics(window=4, minimum=3)
    again.load_state_dict(statistics.state_dict())
    torch.testing.assert_close(
        again.advantages(torch.tensor([1.0]), ["a"]), statistics.advantages(torch.tensor([1.0]), ["a"])
    )


def test_standardise_and_limit():
    assert advantages.standardise(torch.tensor([1.0, 3.0]), 1.0, 0.5).tolist() == [0.0, 4.0]
    assert advantages.limit(torch.tensor([-9.0, 0.5, 9.0])).tolist() == [-5.0, 0.5, 5.0]


def test_value_network_starts_at_zero_and_learns_from_text():
    network = ValueNetwork(4, 8, seed=0)
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(64, 4, 8, 8, generator=generator), torch.randn(64, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (64,), generator=generator)
    target = text[:, 0]
    assert network(latents, text, timesteps).abs().max() == 0
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(200):
        loss = (network(latents, text, timesteps) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * target.var().item()
