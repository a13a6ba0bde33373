"""Every space of `SPACES`, loading of users' spaces, fixed fields and the default configuration."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import BaseTrial

from spaces import SPACES, Space, default_params, load_space, run_space, with_fixed
from spaces.describe import describe
from spaces.losses import OWN, losses
from spaces.quick import quick
from spaces.simclr import simclr
from tests.extent import times
from trainer.config import TrainConfig, parse_config
from trainer.losses import LOSSES
from trainer.unread import unread_fields

REPOSITORY = Path(__file__).parents[1]
ALIASES = {"lr_sgd": "lr", "lr_lars": "lr", "l2": "weight_decay"}
"""Parameters of `optim` with ranges of their own -> the field that they give."""
DEFAULTS = {name: field.default for name, field in TrainConfig.model_fields.items()}


def random_study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def conditional(trial: BaseTrial) -> dict[str, Any]:
    """What a user's space looks like: a condition, an integer, a flag, a helper parameter."""
    fields: dict[str, Any] = {
        "loss": trial.suggest_categorical("loss", ["nt_xent", "margin"]),
        "projector_hidden": trial.suggest_int("projector_hidden", 64, 256, step=64),
    }
    if fields["loss"] == "nt_xent":
        fields["temperature"] = trial.suggest_float("temperature", 0.5, 1.0, log=True)
    else:
        fields["margin"] = trial.suggest_float("margin", 0.25, 0.75, step=0.25)
    fields["hue"] = 0.2 if trial.suggest_categorical("colour", [False, True]) else 0.0
    return fields


ALL: dict[str, Space] = {**SPACES, "conditional": conditional}


@pytest.mark.parametrize("name", ALL)
def test_draws_build_configurations_and_stay_in_range(name: str) -> None:
    study = random_study()
    for _ in range(times(60, 200)):
        trial = study.ask()
        fields = run_space(ALL[name], trial)
        config = parse_config(fields)
        for parameter, value in trial.params.items():
            distribution = trial.distributions[parameter]
            if isinstance(distribution, optuna.distributions.CategoricalDistribution):
                assert value in distribution.choices
            else:
                assert isinstance(
                    distribution,
                    optuna.distributions.FloatDistribution | optuna.distributions.IntDistribution,
                )
                assert distribution.low <= value <= distribution.high
            if parameter in TrainConfig.model_fields:
                assert getattr(config, parameter) == value


@pytest.mark.parametrize("name", SPACES)
def test_parameters_are_fields_that_count_and_reach_their_bounds(name: str) -> None:
    study = random_study()
    seen: dict[str, set[Any]] = {}
    choices: dict[str, int] = {}
    for _ in range(400):
        trial = study.ask()
        fields = run_space(SPACES[name], trial)
        own = {key: value for key, value in trial.params.items() if key not in ALIASES}
        assert {key: fields[key] for key in own} == own
        assert all(fields[ALIASES[key]] == trial.params[key] for key in trial.params.keys() - own)
        assert not set(own) & set(unread_fields(parse_config(fields)))
        for key, distribution in trial.distributions.items():
            seen.setdefault(key, set()).add(trial.params[key])
            if isinstance(distribution, optuna.distributions.CategoricalDistribution):
                choices[key] = len(distribution.choices)
    assert set(seen) - set(ALIASES) <= set(TrainConfig.model_fields)
    assert len(seen) >= 4
    assert all(len(values) >= choices.get(key, 4) for key, values in seen.items())
    assert (SPACES[name].__doc__ or "").strip()


def test_every_loss_without_labels_is_in_the_space_of_losses() -> None:
    assert set(OWN) == {name for name, loss in LOSSES.items() if "labels" not in loss.needs}
    for name in OWN:  # of what it alone reads, the weights that only scale it aside
        trial = random_study().ask()
        fields = with_fixed(losses, {"loss": name})(trial)
        assert "loss" not in trial.params
        assert set(LOSSES[name].own_fields) - set(fields) <= {
            "vicreg_invariance",
            "vicreg_variance",
        }
    assert set(with_fixed(losses, {"loss": "sup_con"})(random_study().ask())) == {
        *("loss", "strength", "crop_min_scale", "optimizer", "lr")
    }


def test_the_simclr_space_has_the_published_ranges() -> None:
    trial = random_study().ask()
    fields = simclr(trial)
    ranges = {
        name: (d.low, d.high, d.log)
        for name, d in trial.distributions.items()
        if isinstance(d, optuna.distributions.FloatDistribution)
    }
    assert ranges == {
        "temperature": (0.05, 1.0, True),
        "strength": (0.1, 1.5, False),
        "crop_min_scale": (0.05, 0.5, True),
        "lr": (1e-4, 5e-3, True),
        "weight_decay": (1e-4, 0.1, True),
    }
    assert fields["lr_scaling"] == "sqrt"


# The default configuration


@pytest.mark.parametrize("name", ALL)
def test_default_parameters_can_be_enqueued_and_come_back(name: str) -> None:
    params = default_params(ALL[name], DEFAULTS)
    study = random_study()
    study.enqueue_trial(params)
    trial = study.ask()
    parse_config(run_space(ALL[name], trial))
    assert trial.params == params
    if name in SPACES:
        for key, value in params.items():
            assert type(value) is type(DEFAULTS[key]), key


def test_defaults_of_quick_and_simclr() -> None:
    assert default_params(quick, DEFAULTS) == {
        "temperature": 0.2,
        "crop_min_scale": 0.2,
        "strength": 0.5,
        "lr": 1e-3,
    }
    assert default_params(simclr, DEFAULTS)["batch_size"] == 256


def test_defaults_are_clipped_put_on_the_grid_and_follow_conditions() -> None:
    assert default_params(conditional, DEFAULTS) == {
        "loss": "nt_xent",
        "projector_hidden": 256,  # 512 is above the range
        "temperature": 0.5,  # 0.2 is below
        "colour": False,  # no field of that name: the first choice
    }
    margin = default_params(conditional, {**DEFAULTS, "loss": "margin", "projector_hidden": 100})
    assert margin["margin"] == 0.75  # 1.0 is above the grid 0.25, 0.5, 0.75
    assert margin["projector_hidden"] == 128
    assert "temperature" not in margin


def test_numbers_without_a_default_take_the_middle() -> None:
    def space(trial: BaseTrial) -> dict[str, Any]:
        trial.set_user_attr("seen", True)
        return {
            "a": trial.suggest_float("a", 0.01, 1.0, log=True),
            "b": trial.suggest_float("b", 0.0, 1.0),
            "c": trial.suggest_int("c", 1, 100, log=True),
            "d": trial.suggest_categorical("d", [1, True, "x"]),
        }

    assert default_params(space, {"d": True, "b": None}) == {
        "a": pytest.approx(0.1),
        "b": 0.5,
        "c": 10,
        "d": True,
    }
    assert default_params(space, {"b": True})["b"] == 0.5  # a flag is no number
    assert default_params(space, {"d": "y"})["d"] == 1


@pytest.mark.filterwarnings("ignore:The distribution is specified by")
@given(
    low=st.floats(0.001, 10),
    width=st.floats(0, 10),
    default=st.floats(allow_nan=False),
    step=st.none() | st.floats(0.01, 3),
)
def test_any_default_gives_a_value_that_optuna_accepts(
    low: float, width: float, default: float, step: float | None
) -> None:
    def space(trial: BaseTrial) -> dict[str, Any]:
        return {"x": trial.suggest_float("x", low, low + width, step=step)}

    params = default_params(space, {"x": default})
    study = random_study()
    study.enqueue_trial(params)
    trial = study.ask()
    space(trial)
    assert trial.params == params


# Fixed fields


def test_fixed_fields_are_not_suggested_and_are_returned() -> None:
    space = with_fixed(quick, {"temperature": 5.0, "epochs": 3.0})
    study = random_study()
    for _ in range(20):
        trial = study.ask()
        fields = run_space(space, trial)
        assert fields["temperature"] == 5.0  # outside the space's range: the user's word counts
        assert fields["epochs"] == 3.0
        assert set(trial.params) == {"crop_min_scale", "strength", "lr"}
        assert set(trial.distributions) == {"crop_min_scale", "strength", "lr"}
        assert fields["lr"] == trial.params["lr"]
    assert "temperature" not in default_params(space, DEFAULTS)


def test_conditions_see_fixed_fields() -> None:
    trial = random_study().ask()
    fields = with_fixed(conditional, {"loss": "margin"})(trial)
    assert "margin" in trial.params
    assert "temperature" not in fields
    assert "loss" not in trial.params


def test_fixed_fields_override_constants_of_the_space() -> None:
    assert with_fixed(quick, {"flip_p": 0.5})(random_study().ask())["flip_p"] == 0.5


def test_nothing_fixed_is_the_space_itself() -> None:
    assert with_fixed(quick, {}) is quick


def test_the_wrapped_trial_still_is_a_trial() -> None:
    def space(trial: BaseTrial) -> dict[str, Any]:
        trial.set_user_attr("note", trial.number)
        return {"seed": trial.number, "lr": trial.suggest_float("lr", 0.1, 0.2)}

    trial = random_study().ask()
    assert with_fixed(space, {"lr": 1.0})(trial) == {"seed": 0, "lr": 1.0}
    assert trial.user_attrs == {"note": 0}


def test_a_fixed_space_can_be_pickled() -> None:
    space = pickle.loads(pickle.dumps(with_fixed(quick, {"lr": 1e-3})))
    assert space(random_study().ask())["lr"] == 1e-3


# What a space may return


def test_a_space_that_returns_no_fields_is_refused() -> None:
    def nothing(trial: BaseTrial) -> None:
        trial.suggest_float("lr", 0.1, 0.2)

    def a_list(trial: BaseTrial) -> list[float]:
        return [1.0]

    def numbered(trial: BaseTrial) -> dict[int, float]:
        return {3: 1.0}

    cases = {
        nothing: "space 'nothing' returned None; it must return a dict",
        a_list: "space 'a_list' returned a list; it must return a dict",
        numbered: "space 'numbered' returned the key 3",
    }
    for space, message in cases.items():
        for checked in (space, with_fixed(space, {"epochs": 1.0})):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=message) as caught:
                run_space(checked, random_study().ask())  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=message):
            default_params(space, DEFAULTS)  # type: ignore[arg-type]


def test_an_unknown_field_is_the_configurations_to_refuse() -> None:
    fields = run_space(lambda trial: {"temprature": 1.0}, random_study().ask())
    with pytest.raises(ValueError, match=r"unknown field 'temprature'; did you mean temperature\?"):
        parse_config(fields)


# What is told of a space


def test_ranges_scales_and_conditions_are_told() -> None:
    parameters, samples = describe(conditional)
    told = {each.name: (each.values, each.condition) for each in parameters}
    assert told == {
        "loss": ("nt_xent, margin", ""),
        "projector_hidden": ("64 to 256 (whole), in steps of 64", ""),
        "temperature": ("0.5 to 1, log", "loss: nt_xent"),
        "margin": ("0.25 to 0.75, in steps of 0.25", "loss: margin"),
        "colour": ("False, True", ""),
    }
    assert len(samples) == 10
    assert all(("margin" in sample) == (sample["loss"] == "margin") for sample in samples)
    assert describe(conditional) == (parameters, samples)


def test_a_condition_of_several_choices_is_a_share_of_the_draws() -> None:
    def space(trial: BaseTrial) -> dict[str, Any]:
        flags = [trial.suggest_categorical(name, [None, "on"]) for name in ("a", "b")]
        return {"x": trial.suggest_float("x", 0.0, 1.0)} if any(flags) else {}

    told = {each.name: each for each in describe(space)[0]}
    assert told["a"].values == "none, on"
    assert told["x"].condition in {f"in {share} % of the draws" for share in range(68, 83)}


# References


USER_SPACE = """
from dataclasses import dataclass

@dataclass
class Range:
    low: float = 0.1

def space(trial):
    return {"lr": trial.suggest_float("lr", Range().low, 0.2)}

number = 3
"""


def test_names_and_modules_are_found() -> None:
    assert load_space("quick") is quick
    assert load_space("simclr") is simclr
    assert load_space("spaces.quick:quick") is quick


def test_a_file_is_imported_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "my space.py"
    path.write_text(USER_SPACE)
    before = list(sys.path)
    space = load_space(f"{path}:space")
    assert sys.path == before
    assert 0.1 <= run_space(space, random_study().ask())["lr"] <= 0.2
    assert load_space(f"{path}:space") is space
    # Another file of the same name, and the same file after an edit, are other spaces.
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_text(USER_SPACE.replace("0.1", "0.15"))
    assert run_space(load_space(f"{other}:space"), random_study().ask())["lr"] >= 0.15
    path.write_text(USER_SPACE.replace("0.1", "0.19"))
    assert run_space(load_space(f"{path}:space"), random_study().ask())["lr"] >= 0.19
    assert run_space(space, random_study().ask())["lr"] <= 0.2
    assert not (tmp_path / "__pycache__").exists()


def test_a_relative_path_is_found_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(USER_SPACE)
    monkeypatch.chdir(tmp_path)
    assert callable(load_space("mine.py:space"))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("quik", r"unknown space 'quik'; known: quick, simclr, losses, "),
        ("", r"unknown space ''; known: quick, simclr, losses, "),
        ("mine.py", r"unknown space 'mine.py'; .* give mine.py:FUNCTION"),
        (":f", r"unknown space ':f'"),
        ("absent.py:space", r"space file '.*absent.py' does not exist"),
        ("mine.py:sapce", r"mine.py has no function 'sapce'"),
        ("mine.py:number", r"space 'mine.py:number' is a int, not a function"),
        ("broken.py:space", r"broken.py' fails to import: SyntaxError: "),
        ("raising.py:space", r"raising.py' fails to import: RuntimeError: two lines"),
        ("leaving.py:space", r"leaving.py' fails to import: SystemExit: 1"),
        ("needy.py:space", r"needy.py' fails to import: ModuleNotFoundError: .*no_such_thing"),
        ("no_such_module:space", r"module 'no_such_module' fails to import: ModuleNotFoundError"),
        ("spaces.quick:absent", r"spaces.quick has no function 'absent'"),
    ],
)
def test_a_bad_reference_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(USER_SPACE)
    (tmp_path / "broken.py").write_text("def space(:\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('two\\nlines')\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(1)\n")
    (tmp_path / "needy.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    with pytest.raises(ValueError, match=message) as caught:
        load_space(ref)
    assert "\n" not in str(caught.value)
    left = {name for name in set(sys.modules) - modules if name.startswith("contrasweep_space_")}
    assert len(left) == (1 if "mine.py:" in ref else 0)
    for name in left:
        del sys.modules[name]


def test_spaces_import_optuna_and_nothing_of_ours() -> None:
    code = (
        "import sys, spaces;"
        "own = {'trainer', 'search', 'analysis', 'torch', 'torchvision', 'ray', 'mlflow'};"
        "print(sorted(own & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
