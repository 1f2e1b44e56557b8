"""Rewards of other packages, from real entry points: found by name, never imported unasked, blamed by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugin_packages import CONTRACT, MODULE, MODULE_FILE, README, on_path, put_example, put_package

from blend import rewards
from blend.rewards import RewardError, load_reward, require_known
from blend.rewards.contract import ContractError, check_reward


@pytest.fixture
def site(tmp_path):
    """A directory on the path for packages."""
    with on_path(tmp_path):
        yield tmp_path


@pytest.fixture
def install(site):
    """Put a package with these entry points and this module on the path."""
    return lambda package, points, module: put_package(site, package, points, module)


@pytest.fixture
def symmetry(site):
    put_example(site)
    return site


def variant(**facts: str) -> str:
    """The example's module with other facts."""
    text = MODULE
    for name, value in facts.items():
        text, count = re.subn(rf"^    {name} = .*$", f"    {name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    return text


def test_the_example_is_short_and_works_as_it_stands(symmetry):
    assert len(MODULE.splitlines()) <= 20
    reward = load_reward("symmetry")
    half = torch.zeros(1, 3, 8, 8)
    half[..., :4] = 1
    assert reward(torch.cat([half, torch.full_like(half, 0.3)]), ["", ""]).tolist() == [0, 1]


def test_the_examples_contract_test_passes_and_can_fail(symmetry):
    scope: dict[str, object] = {}
    exec(compile(CONTRACT, "README.md", "exec"), scope)
    [test] = [value for name, value in scope.items() if name.startswith("test_")]
    test()
    (symmetry / MODULE_FILE).write_text(MODULE.replace("mean((1, 2, 3))", "mean().expand(len(images))"))
    sys.modules.pop(Path(MODULE_FILE).stem)
    with pytest.raises(ContractError, match="batch invariance"):
        test()


def test_the_readme_lists_the_built_in_rewards_and_their_ranges():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(rewards.REWARDS)
    for name, told in rows:
        low, high = load_reward(name).range
        assert told == (f"{low:g} to {high:g}" if low > -float("inf") else f"below {high:g}")


def test_a_plugin_is_not_imported_before_it_is_asked_for(symmetry):
    require_known("symmetry")
    load_reward("brightness")
    with pytest.raises(
        RewardError, match=r"choose one of colourfulness, .*; plugins: symmetry \(package symmetry-reward"
    ):
        load_reward("beauty")
    assert "symmetry_reward" not in sys.modules


def test_importing_rewards_looks_nothing_up():
    code = "import blend.rewards, sys, json; print(json.dumps(['blend.rewards.plugins' in sys.modules]))"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code])) == [False]


def test_an_unknown_reward_says_when_there_are_no_plugins():
    with pytest.raises(RewardError, match=r"unknown reward 'beauty'; .*, alignment; plugins: "):
        load_reward("beauty")


def test_the_name_of_a_built_in_reward_is_refused(install):
    install("greedy", {"brightness": "greedy:Symmetry"}, variant(name='"brightness"'))
    expected = "reward 'brightness' of package greedy 1.2 has the name of a built-in reward: rename it"
    for use in (load_reward, require_known):
        with pytest.raises(RewardError, match=expected):
            use("brightness")
    assert load_reward("contrast").name == "contrast"
    with pytest.raises(RewardError) as told:
        load_reward("beauty")
    assert "greedy" not in str(told.value)


def test_two_packages_with_one_name_are_both_named(install):
    for package in ("one", "two"):
        install(package, {"symmetry": f"{package}:Symmetry"}, MODULE)
    with pytest.raises(RewardError, match=r"registered by packages one 1\.2 and two 1\.2: uninstall all but one"):
        load_reward("symmetry")


@pytest.mark.parametrize(
    ("point", "module", "words"),
    [
        (
            "ill:Symmetry",
            "import nowhere_to_be_found",
            "cannot be loaded from ill:Symmetry: ModuleNotFoundError: No mod",
        ),
        ("ill:Symmetry", "raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("ill:Beauty", MODULE, "cannot be loaded from ill:Beauty: AttributeError"),
        ("ill:Symmetry", MODULE + "\n    def __init__(self, path): ...", "TypeError: .*missing 1 required.*'path'"),
        ("ill:Symmetry", "class Symmetry: ...", "is no reward: .*has no name, version, range, differentiable"),
        ("ill:made", f"{MODULE}\nmade = lambda: Symmetry", "is no reward: <class .*Symmetry'> cannot be called"),
        ("ill:Symmetry", variant(name='"beauty"'), "calls itself 'beauty': give both one name"),
        ("ill:Symmetry", variant(name='"Symmetry "'), "name 'Symmetry ' must be"),
        ("ill:Symmetry", variant(version="1"), "version 1 must be a string"),
        ("ill:Symmetry", variant(range="[0, 1]"), r"range \[0, 1\] must be a pair"),
        ("ill:Symmetry", variant(range="(1, 1)"), r"range \(1, 1\) must have its low end first"),
        ("ill:Symmetry", variant(differentiable='"no"'), "differentiable 'no' must be True or False"),
    ],
)
def test_a_broken_plugin_names_itself_and_its_package_in_one_line(install, point, module, words):
    install("ill", {"symmetry": point}, module)
    with pytest.raises(RewardError, match=rf"^reward 'symmetry' of package ill 1\.2 .*{words}") as told:
        load_reward("symmetry")
    assert "\n" not in str(told.value)
    assert load_reward("brightness").name == "brightness"


def test_a_plugin_can_be_checked_by_its_name(install):
    install("loud", {"symmetry": "loud:Symmetry"}, variant(range="(0.0, 0.5)"))
    with pytest.raises(ContractError, match="range: image 0 scores 1, outside"):
        check_reward("symmetry")
