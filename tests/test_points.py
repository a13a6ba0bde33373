"""Given points and grids, against itertools.product and spaces whose combinations are known."""

import itertools
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search.points import check_point, grid, parse_point, read_points, values_of
from spaces import SPACES, Space, default_params, run_space, with_fixed

Trial = optuna.trial.BaseTrial


def suggested(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    ask: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else None
    return (ask or trial.suggest_float)(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def optimisers(trial: Trial) -> dict[str, Any]:
    """Conditions on a choice and on a number, and a range that depends on the branch."""
    optimizer = trial.suggest_categorical("optimizer", ["adamw", "sgd"])
    lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    fields = {"optimizer": optimizer, "lr": lr}
    if optimizer == "sgd":
        fields["momentum"] = trial.suggest_float("momentum", 0.5, 0.9, step=0.2)
        fields["depth"] = trial.suggest_int("depth", 10, 12)
    elif lr > 5e-3:
        fields["depth"] = trial.suggest_int("depth", 1, 2)
    return fields


def of_every_kind(trial: Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 0.5, 2),
        "depth": trial.suggest_int("depth", 2, 8, step=2),
        "loss": trial.suggest_categorical("loss", ["nt_xent", "1e-3", "1"]),
        "decay": trial.suggest_categorical("decay", [None, 0.5, 1.0]),
        "flag": trial.suggest_categorical("flag", [False, True]),
        "width": trial.suggest_categorical("width", [1, 64]),
    }


# ---- values


@st.composite
def numbers(draw: st.DrawFn) -> IntDistribution | FloatDistribution:
    log = draw(st.booleans())
    if draw(st.booleans()):
        low = draw(st.integers(1 if log else -50, 50))
        step = 1 if log else draw(st.integers(1, 4))
        return IntDistribution(low, low + step * draw(st.integers(0, 60)), log=log, step=step)
    low_float = draw(st.sampled_from([1e-4, 0.05, 0.1, 1.0] if log else [-3.3, -0.1, 0.0, 0.7]))
    if log:
        return FloatDistribution(low_float, low_float * draw(st.floats(1, 1e3)), log=True)
    step_float = draw(st.sampled_from([None, 0.1, 0.25, 1e-3]))
    count = draw(st.integers(0, 60))
    return FloatDistribution(
        low_float, round(low_float + (step_float or 0.1) * count, 6), step=step_float
    )


@given(distribution=numbers(), per_range=st.integers(2, 7))
def test_values_are_all_or_spread_over_the_whole_range(
    distribution: IntDistribution | FloatDistribution, per_range: int
) -> None:
    values = values_of(distribution, per_range)
    assert (values[0], values[-1]) == (distribution.low, pytest.approx(distribution.high))
    assert all(distribution._contains(value) for value in values)
    assert all(a < b for a, b in itertools.pairwise(values))
    kind = int if isinstance(distribution, IntDistribution) else float
    assert {type(value) for value in values} == {kind}
    if distribution.step is not None:
        there_are = round((distribution.high - distribution.low) / distribution.step) + 1
        assert len(values) == min(per_range, there_are)
    elif not distribution.single():
        scaled = [math.log(value) for value in values] if distribution.log else values
        gap = (scaled[-1] - scaled[0]) / (len(values) - 1)
        assert [b - a for a, b in itertools.pairwise(scaled)] == pytest.approx(
            [gap] * (len(values) - 1), rel=1e-3, abs=1e-12
        )


def test_values_of_known_ranges() -> None:
    assert values_of(FloatDistribution(1e-4, 1e-2, log=True), 3) == pytest.approx(
        [1e-4, 1e-3, 1e-2]
    )
    assert values_of(IntDistribution(1, 1000, log=True), 4) == [1, 10, 100, 1000]
    assert values_of(IntDistribution(1, 8, log=True), 5) == [1, 2, 3, 5, 8]
    assert values_of(FloatDistribution(0.1, 0.7, step=0.1), 9)[2] == 0.3
    assert values_of(FloatDistribution(0, 1), 1) == [0.5]
    assert values_of(CategoricalDistribution(["a", None, 0.5]), 1) == ["a", None, 0.5]


# ---- grids


@given(
    kinds=st.lists(
        numbers() | st.builds(CategoricalDistribution, st.just(["a", None, 1])), max_size=4
    ),
    per_range=st.integers(1, 3),
)
def test_the_grid_of_a_plain_space_is_the_product(
    kinds: list[BaseDistribution], per_range: int
) -> None:
    named = {f"p{number}": kind for number, kind in enumerate(kinds)}

    def space(trial: Trial) -> dict[str, Any]:
        return {name: suggested(trial, name, kind) for name, kind in named.items()}

    product = itertools.product(*(values_of(kind, per_range) for kind in kinds))
    expected = [dict(zip(named, values, strict=True)) for values in product]
    assert grid(space, per_range, len(expected)) == expected


Branches = dict[str, Any]
"""Name of a parameter, and for each of its choices the tree that is asked for after it."""
trees: st.SearchStrategy[Branches] = st.recursive(
    st.just({}),
    lambda below: st.dictionaries(
        st.sampled_from("abcd"), st.lists(below, min_size=1, max_size=3), max_size=1
    ),
    max_leaves=12,
)


@given(tree=trees)
def test_the_grid_of_a_tree_is_its_leaves(tree: Branches) -> None:
    def space(trial: Trial) -> dict[str, Any]:
        depth, below, fields = 0, tree, {}
        while below:
            ((name, branches),) = below.items()
            name = f"{name}{depth}"
            fields[name] = trial.suggest_int(name, 0, len(branches) - 1)
            depth, below = depth + 1, branches[fields[name]]
        return fields

    def leaves(below: Branches, depth: int) -> list[dict[str, int]]:
        if not below:
            return [{}]
        ((name, branches),) = below.items()
        return [
            {f"{name}{depth}": at, **leaf}
            for at, branch in enumerate(branches)
            for leaf in leaves(branch, depth + 1)
        ]

    expected = leaves(tree, 0)
    assert grid(space, 3, len(expected)) == expected


def test_the_grid_of_a_conditional_space() -> None:
    points = grid(optimisers, 3, 100)
    lrs = values_of(FloatDistribution(1e-4, 1e-2, log=True), 3)
    adamw = [{"optimizer": "adamw", "lr": lr} for lr in lrs[:2]]
    adamw += [{"optimizer": "adamw", "lr": lrs[2], "depth": depth} for depth in (1, 2)]
    sgd = [
        {"optimizer": "sgd", "lr": lr, "momentum": momentum, "depth": depth}
        for lr, momentum, depth in itertools.product(lrs, (0.5, 0.7, 0.9), (10, 11, 12))
    ]
    assert points == adamw + sgd
    assert all(check_point(optimisers, point) == point for point in points)


def test_a_grid_that_is_too_large_says_how_large() -> None:
    with pytest.raises(ValueError, match=r"has 81 combinations, but 80 trials.*--grid-points"):
        grid(SPACES["quick"], 3, 80)
    assert len(grid(SPACES["quick"], 3, 81)) == 81
    with pytest.raises(ValueError, match="has more than 10,000 combinations"):
        grid(SPACES["full"], 2, 32)
    fixed = with_fixed(SPACES["quick"], {"lr": 1e-3})
    assert all("lr" not in point for point in grid(fixed, 3, 27))


def test_a_space_that_does_not_ask_the_same_again_has_no_grid() -> None:
    calls = itertools.count()

    def fickle(trial: Trial) -> dict[str, Any]:
        trial.suggest_categorical("a", [1, 2])
        return {"b": trial.suggest_int("b" if next(calls) % 2 else "c", 0, 1)}

    def shrinking(trial: Trial) -> dict[str, Any]:
        trial.suggest_int("a", 0, 1)
        return {"b": trial.suggest_int("b", 0, 1)} if next(calls) % 2 else {}

    for space in (fickle, shrinking):
        with pytest.raises(ValueError, match="depends on its trial's values alone"):
            grid(space, 2, 100)


# ---- points


@pytest.mark.parametrize("name", SPACES)
def test_what_a_space_draws_passes_whole_in_part_and_as_text(name: str) -> None:
    space = SPACES[name]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(15):
        trial = study.ask()
        run_space(space, trial)
        point = trial.params
        checked = check_point(space, point)
        assert repr(checked) == repr(point)
        some = dict(itertools.islice(point.items(), number % len(point) + 1))
        assert check_point(space, some) == some
        texts = {key: str(value) for key, value in point.items()}
        assert repr(parse_point(space, texts)) == repr(point)
    defaults = default_params(space, {})
    assert check_point(space, defaults) == defaults


def test_values_become_those_of_the_space() -> None:
    point = {"lr": 1, "depth": 4.0, "loss": "1", "decay": 1, "flag": True, "width": 1}
    checked = check_point(of_every_kind, point)
    expected = {"lr": 1.0, "depth": 4, "loss": "1", "decay": 1.0, "flag": True, "width": 1}
    assert repr(checked) == repr(expected)
    texts = {"lr": "1e0", "depth": "4", "loss": "1e-3", "decay": "none", "flag": "true"}
    expected = {"lr": 1.0, "depth": 4, "loss": "1e-3", "decay": None, "flag": True}
    assert repr(parse_point(of_every_kind, texts)) == repr(expected)
    assert parse_point(of_every_kind, {"decay": "1"}) == {"decay": 1.0}
    assert check_point(of_every_kind, {}) == {}


WRONG: dict[str, tuple[Space, dict[str, Any], str]] = {
    "above": (of_every_kind, {"lr": 2.1}, r"lr must be a number in \[0.5, 2\], got 2.1"),
    "off the grid": (of_every_kind, {"depth": 3}, r"whole number in \[2, 8\] in steps of 2, got 3"),
    "a fraction": (of_every_kind, {"depth": 4.5}, "depth must be a whole number"),
    "a word": (of_every_kind, {"lr": "fast"}, "lr must be a number.*got 'fast'"),
    "nothing": (of_every_kind, {"lr": None}, "got None"),
    "true for 1": (of_every_kind, {"lr": True}, "lr must be a number.*got True"),
    "not finite": (of_every_kind, {"lr": math.nan}, "got nan"),
    "beyond floats": (of_every_kind, {"depth": 10**400}, r"depth must be .*\.\.\.$"),
    "a list": (of_every_kind, {"loss": ["nt_xent"]}, "got a list"),
    "a choice of another type": (of_every_kind, {"width": True}, "one of 1, 64, got True"),
    "text for a number": (of_every_kind, {"width": "64"}, "one of 1, 64, got '64'"),
    "a number for truth": (of_every_kind, {"flag": 1}, "one of False, True, got 1"),
    "an unknown name": (
        optimisers,
        {"nope": 1},
        "nope is not searched; searched there: optimizer, lr, ",
    ),
    "of another branch": (
        optimisers,
        {"optimizer": "adamw", "momentum": 0.7},
        "momentum is not searched where optimizer=adamw; searched there: optimizer, lr",
    ),
    "by a number's branch": (optimisers, {"optimizer": "adamw", "lr": 1e-4, "depth": 1}, "depth"),
    "in one branch only": (optimisers, {"depth": 11}, "set what decides the branch"),
    "in another's range": (optimisers, {"optimizer": "sgd", "depth": 1}, r"\[10, 12\], got 1$"),
    "fixed": (with_fixed(optimisers, {"lr": 0.5}), {"lr": 1e-3}, "it is fixed at 0.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_point_is_told_in_one_line(name: str) -> None:
    space, point, expected = WRONG[name]
    with pytest.raises(ValueError, match=expected) as told:
        check_point(space, point)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 250


def test_conditions_may_depend_on_what_the_point_fixes() -> None:
    assert check_point(optimisers, {"optimizer": "sgd", "depth": 11})["depth"] == 11
    assert check_point(optimisers, {"optimizer": "adamw", "depth": 1})["depth"] == 1
    fixed = with_fixed(optimisers, {"optimizer": "sgd"})
    assert check_point(fixed, {"depth": 11}) == {"depth": 11}
    assert check_point(SPACES["full"], {"sigmoid_bias": -3, "cooldown": 0.1}) == {
        "sigmoid_bias": -3.0,
        "cooldown": 0.1,
    }


def test_a_space_that_fails_fails_only_where_it_does() -> None:
    def space(trial: Trial) -> dict[str, Any]:
        x = trial.suggest_int("x", 0, 1)
        return {"y": 1 / x, "z": trial.suggest_int("z", 0, 1)}

    assert check_point(space, {"z": 1}) == {"z": 1}
    with pytest.raises(ValueError, match="fails at this point: ZeroDivisionError"):
        check_point(space, {"x": 0})


@settings(max_examples=20)
@given(data=st.data())
def test_a_checked_point_is_what_a_study_then_tries(data: st.DataObject) -> None:
    point = data.draw(st.sampled_from(grid(optimisers, 3, 100)))
    names = data.draw(st.sets(st.sampled_from(sorted(point))) | st.just(set(point)))
    part = {name: point[name] for name in point if name in names or name == "optimizer"}
    if "depth" in part:
        part["lr"] = point["lr"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(check_point(optimisers, part))
    trial = study.ask()
    run_space(optimisers, trial)
    assert {name: trial.params[name] for name in part} == part


# ---- files


def test_points_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "points.yaml"
    path.write_text("- {optimizer: sgd, lr: 1e-3, momentum: 0.7}\n- optimizer: adamw\n")
    expected = [{"optimizer": "sgd", "lr": 1e-3, "momentum": 0.7}, {"optimizer": "adamw"}]
    assert read_points(path, optimisers) == expected
    path.write_text("points:\n" + path.read_text())
    assert read_points(path, optimisers) == expected


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must hold a list of points"),
    "no points": (b"[]", "holds no points"),
    "a mapping of another kind": (b"lr: 0.1", "'points' alone; it holds a dict"),
    "points and more": (b"points: []\ntrials: 3", "'points' alone"),
    "a word": (b"lr", "it holds 'lr'"),
    "not a mapping": (b"- {lr: 1e-3}\n- lr", "point 2: must be a mapping.*got 'lr'"),
    "a name that is none": (b"- {1: 2}", "point 1: must be a mapping"),
    "a wrong value": (b"- {lr: 1e-3}\n- {lr: 7}", r"point 2: lr must be .*\[0.0001, 0.01\], got 7"),
    "an unknown name": (b"- {rate: 7}", "point 1: rate is not searched; searched there: opt"),
    "not YAML": (b"a: [1\n", "is not a YAML file"),
    "not text": (b"\xff\xfe\x00", "is not a YAML file"),
    "a python tag": (b"- !!python/object/apply:os.mkdir [made]", "python/object/apply:os.mkdir"),
    "a python name": (b"- {lr: !!python/name:os.system ''}", "python/name:os.system"),
    "too deep": (b"[" * 20_000, "is not a YAML file"),
    "a number of 5,000 digits": (b"- {lr: " + b"9" * 5000 + b"}", "is not a YAML file"),
    "a billion laughs": (
        b"- &a {x: [1, 1]}\n"
        + b"".join(
            b"- &%c {x: [*%c, *%c, *%c, *%c]}\n" % (n, *[n - 1] * 4) for n in range(98, 115)
        ),
        "point 1: x is not searched",
    ),
    "a point within itself": (b"- &a {lr: *a}", "point 1: lr must be a number.*got a dict"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "points.yaml"
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=expected) as told:
        read_points(path, optimisers)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ValueError, match=f"cannot read {path}: "):
            read_points(path, optimisers)
