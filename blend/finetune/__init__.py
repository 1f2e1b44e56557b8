"""Reward fine-tuning of one basis adapter: rollouts, advantages, objectives, value network. No cluster."""
