"""How a user's own loss is found, and what is refused.

Shapes: B images, D width of an embedding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.device import is_out_of_memory
from trainer.losses import Embedded, Loss, get_loss, loss_file
from trainer.pair_losses import nt_xent
from trainer.user_losses import load_function

CONFIG = TrainConfig(temperature=0.3)


def views(batch: int = 6, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(batch, width, generator=generator)
    return z0, z0 + 0.5 * torch.randn(batch, width, generator=generator)


MINE = '''
"""A module's docstring."""
from dataclasses import dataclass

import torch


@dataclass
class Weights:
    near: float = 2.0


def mine(z0_BD, z1_BD, config):
    """distances of the views, warmed

    More of it.
    """
    assert z0_BD.dtype == torch.float32
    return Weights().near * (z0_BD - z1_BD).square().mean() / config.temperature
'''


def written(folder: Path, body: str, name: str = "own.py") -> str:
    (folder / name).write_text(body)
    return f"{folder / name}:mine"


def test_a_function_of_a_file_is_a_loss(tmp_path: Path) -> None:
    ref = written(tmp_path, MINE)
    own = get_loss(ref)
    assert isinstance(own, Loss)
    assert own.description == "distances of the views, warmed"
    assert own.needs == frozenset()
    assert set(own.fields) == set(TrainConfig.model_fields)  # it may read any
    z0, z1 = views()
    found = own.compute(Embedded(z0.bfloat16(), z1.bfloat16()), CONFIG)
    expected = 2 * (z0.bfloat16().float() - z1.bfloat16().float()).square().mean() / 0.3
    torch.testing.assert_close(found, expected)
    assert loss_file(ref) == tmp_path / "own.py"


def test_an_edited_file_is_read_anew_and_files_of_one_name_do_not_clash(tmp_path: Path) -> None:
    batch = Embedded(*views())
    values = []
    (tmp_path / "other").mkdir()
    for folder, factor in ((tmp_path, "2.0"), (tmp_path, "3.0"), (tmp_path / "other", "4.0")):
        ref = written(folder, MINE.replace("2.0", factor))
        values.append(get_loss(ref).compute(batch, CONFIG).item())
    assert values == pytest.approx([values[0], values[0] * 1.5, values[0] * 2])


def test_a_relative_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, MINE)
    monkeypatch.chdir(tmp_path)
    assert get_loss("own.py:mine").description == "distances of the views, warmed"
    assert loss_file("own.py:mine") == tmp_path / "own.py"


def test_a_function_of_a_module_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, MINE.replace('"""distances of the views, warmed', '"""'), "some_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    own = get_loss("some_module:mine")
    assert own.description == "More of it."
    assert loss_file("some_module:mine") is None
    assert loss_file("nt_xent") is None


def test_looking_a_loss_up_leaves_the_generators_as_they_were(tmp_path: Path) -> None:
    body = "import torch\ndef mine(a, b, c):\n    return ((a - b) * torch.rand(8, 1)).mean()\n"
    before = torch.get_rng_state()
    get_loss(written(tmp_path, body))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_of_ours_can_be_named_within_a_user_s(tmp_path: Path) -> None:
    body = (
        "from trainer.pair_losses import nt_xent\n"
        "def mine(a, b, config):\n    return nt_xent(a, b, config.temperature) / 2\n"
    )
    z0, z1 = views()
    found = get_loss(written(tmp_path, body)).compute(Embedded(z0, z1), CONFIG)
    assert found == nt_xent(z0, z1, 0.3) / 2


def returning(value: str) -> str:
    return f"import torch\n\ndef mine(z0, z1, config):\n    return {value}\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(): pass", r"own\.py has no function 'mine'"),
        ("mine = 3", "is of type int, not a function of two views and config"),
        ("def mine(:", r"fails to import: SyntaxError: .*own\.py, line 1"),
        ("\nimport nothing_of_the_kind", r"fails to import: ModuleNotFound.*own\.py, line 2\)"),
        ("raise SystemExit(3)", r"fails to import: SystemExit: 3 \(.*own\.py, line 1\)"),
        ("def mine(z0, z1): return 0", r"fails on embeddings of \[8, 16\]: TypeError: mine\(\)"),
        (
            returning("z0 @ z1"),
            r"RuntimeError: .*mat1 and mat2 .* \(.*own\.py, line 4\)",
        ),
        (returning("torch.nn.functional.mse_loss(z0, 'x')"), r"\(.*own\.py, line 4\)"),
        (returning("(z0 - z1).square().sum(dim=1)"), r"scalar tensor, got a Tensor of \(8,\)"),
        (returning("1.5"), "scalar tensor, got a float"),
        (returning("None"), "scalar tensor, got a NoneType"),
        (returning("(z0 * z1).sum() / 0"), "must be finite on random embeddings, got -?inf"),
        (returning("(z0 * z1.detach()).sum()"), "must give a gradient to z1_BD, got no"),
        (returning("z0.detach().sum()"), "must give a gradient to z0_BD, got no"),
        (
            returning("(z0 * z1).sum() + (z0 - z0).norm(dim=1).pow(0.5).sum()"),
            "gradient to z0_BD, got a gradient that is not finite",
        ),
    ],
)
def test_what_is_no_loss_is_refused_in_one_line(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        get_loss(written(tmp_path, body))
    assert "\n" not in str(error.value)
    assert "own.py" in str(error.value)


def test_missing_files_and_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss file '.*none\.py' does not exist"):
        get_loss(f"{tmp_path / 'none.py'}:mine")
    with pytest.raises(ValueError, match=r"loss module 'no\.such' fails to import: ModuleNotFound"):
        get_loss("no.such:mine")


def test_what_a_loss_raises_in_training_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "def mine(z0, z1, config):\n"
        "    if len(z0) == 3: raise torch.OutOfMemoryError('full')\n"
        "    if len(z0) == 4: torch.empty(1 << 50)\n"
        "    if len(z0) == 5: raise torch.linalg.LinAlgError('singular')\n"
        "    return (z0[:8] - z1).square().mean()\n"
    )
    function, _ = load_function(f"{path}:mine")
    with pytest.raises(
        ValueError, match=r"fails on \[32, 16\]: RuntimeError: .*line 6\)$"
    ) as caught:
        function(torch.ones(32, 16), torch.ones(32, 16), TrainConfig())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="LinAlgError: singular"):
        function(torch.ones(5, 16), torch.ones(5, 16), TrainConfig())
    for rows in (3, 4):  # no fault of the loss
        with pytest.raises(RuntimeError) as failed:
            function(torch.ones(rows, 16), torch.ones(rows, 16), TrainConfig())
        assert is_out_of_memory(failed.value)
