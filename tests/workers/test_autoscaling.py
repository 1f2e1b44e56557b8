"""How many replicas a backlog asks for, and that Serve takes the configuration."""

from types import SimpleNamespace

import pytest
from ray.serve.config import AutoscalingConfig

from workers.autoscaling import BACKLOG, BacklogPolicy, autoscaling
from workers.engine_args import ServeArgs
from workers.serving import build_app


@pytest.mark.parametrize(
    ("backlogs", "replicas"), [([0.0], 1), ([4.9], 1), ([5.1], 2), ([12.0, 9.0], 5), ([0.0, 0.0, 0.0], 1)]
)
def test_one_replica_for_each_slice_of_waiting_work(backlogs, replicas):
    told = SimpleNamespace(aggregated_metrics={BACKLOG: dict(enumerate(backlogs))}, target_num_replicas=3)
    assert BacklogPolicy(5.0)(told)[0] == replicas


def test_without_figures_nothing_changes():
    for told in ({}, None, {BACKLOG: {}}):
        assert BacklogPolicy(5.0)(SimpleNamespace(aggregated_metrics=told, target_num_replicas=3))[0] == 3


def test_serve_takes_the_configuration_and_finds_the_policy():
    config = AutoscalingConfig(**autoscaling(1, 4, 2.5))
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert config.policy.policy_kwargs == {"target_backlog_s": 2.5}
    assert config.policy.policy_function == "workers.autoscaling:BacklogPolicy"


@pytest.mark.parametrize(("most", "scales"), [(None, False), (1, False), (3, True)])
def test_replicas_are_added_only_where_that_was_asked_for(most, scales):
    app = build_app(ServeArgs(max_replicas=most))
    [engine] = app._bound_deployment.init_args[:1]
    config = engine._bound_deployment._deployment_config
    assert (config.autoscaling_config is not None) == scales
    assert config.user_config == {"bundle": "sprites@champion"}
