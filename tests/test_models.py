"""One conformance suite over all encoders; heads; weights from files."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tests.extent import ALL, long
from trainer.models import (
    ENCODERS,
    Predictor,
    ProjectionHead,
    build_encoder,
    check_encoder,
    load_encoder_weights,
)
from trainer.torchvision_models import RemovedHead

# At 32 pixels, by hand from the papers' tables: without class layer, with the small stem.
PARAMETERS = {
    "conv_small": 153_600,
    "resnet18": 11_168_832,
    "resnet34": 21_276_992,
    "resnet50": 23_500_352,
    "vgg11": 9_225_984,
    "vgg16": 14_723_136,
    "vit_tiny": 5_360_832,
    "vit_small": 21_338_496,
}
SMALLEST = {"vgg11": 32, "vgg16": 32}

# One of each family of torchvision's, and a size that it takes.
FAMILIES = {
    "torchvision:alexnet": 64,
    "torchvision:convnext_tiny": 32,
    "torchvision:densenet121": 32,
    "torchvision:efficientnet_b0": 32,
    "torchvision:googlenet": 32,
    "torchvision:inception_v3": 75,
    "torchvision:maxvit_t": 224,
    "torchvision:mnasnet0_5": 32,
    "torchvision:mobilenet_v2": 32,
    "torchvision:mobilenet_v3_small": 32,
    "torchvision:regnet_y_400mf": 32,
    "torchvision:resnet18": 32,
    "torchvision:shufflenet_v2_x0_5": 32,
    "torchvision:squeezenet1_1": 32,
    "torchvision:swin_t": 32,
    "torchvision:swin_v2_t": 32,
    "torchvision:vgg11": 32,
    "torchvision:vit_b_16": 32,
}
QUICK = ("conv_small", "resnet18", "vgg11", "vit_tiny", "torchvision:squeezenet1_1")


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def marked(name: str, *values: Any) -> Any:
    return pytest.param(name, *values, id=name, marks=() if name in QUICK else pytest.mark.slow)


encoders = pytest.mark.parametrize("name", [marked(name) for name in ENCODERS])
each_family = pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, id=name, marks=() if name in QUICK else long)
        for name, size in [*((name, 32) for name in ENCODERS), *FAMILIES.items()]
    ],
)
"""By default one of each kind of ours and one of torchvision's."""


def seeded(name: str, size: int, seed: int = 0) -> tuple[nn.Module, int]:
    torch.manual_seed(seed)
    return build_encoder(name, size)


def images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


# ---------------------------------------------------------------------- all encoders


@each_family
def test_shape_gradient_and_mode(name: str, size: int) -> None:
    encoder, feature_dim = seeded(name, size)
    features = encoder(images(4, size))
    assert features.shape == (4, feature_dim)
    assert features.dtype == torch.float32
    features.square().mean().backward()
    without = [key for key, value in encoder.named_parameters() if value.grad is None]
    assert not without
    gradients = {key: value.grad for key, value in encoder.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if name in ENCODERS:  # one pixel deep, some of torchvision's have kernels that see no pixel
        matrices = {key: gradient for key, gradient in gradients.items() if gradient.ndim > 1}
        assert matrices
        assert not [key for key, gradient in matrices.items() if not gradient.any()]


@each_family
def test_evaluation_is_deterministic_and_ignores_the_rest_of_the_batch(
    name: str, size: int
) -> None:
    encoder, _ = seeded(name, size)
    batch = images(6, size)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The batch's own statistics: with those of the start, deep networks let hardly
            # anything of an image through.
            module.momentum = None
    with torch.no_grad():
        encoder(batch)
    encoder.eval()
    with torch.inference_mode():
        together = encoder(batch)
        assert torch.equal(together, encoder(batch))
        scale = float(together.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            encoder(batch[:2]) / scale, together[:2] / scale, rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(together[0] / scale, together[1] / scale, rtol=0, atol=1e-6)


@each_family
def test_weights_follow_the_generator_and_the_state_is_everything(name: str, size: int) -> None:
    first, _ = seeded(name, size, seed=1)
    again, _ = seeded(name, size, seed=1)
    other, _ = seeded(name, size, seed=2)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
    batch = images(4, size)
    with torch.no_grad():
        first(batch)
        other.load_state_dict(first.state_dict())
        assert torch.equal(first.eval()(batch), other.eval()(batch))


@pytest.mark.parametrize("size", [8, 64])
@encoders
def test_other_sizes_give_the_same_number_of_features(name: str, size: int) -> None:
    if size < SMALLEST.get(name, 0):
        with pytest.raises(ValueError, match=f"{name} cannot take images of {size} pixels"):
            build_encoder(name, size)
        return
    encoder, feature_dim = build_encoder(name, size)
    with torch.no_grad():
        assert encoder(images(2, size)).shape == (2, feature_dim)
    assert feature_dim == ENCODERS[name].feature_dim


@encoders
def test_parameters_are_as_many_as_the_papers_and_laid_out_channels_last(name: str) -> None:
    encoder, _ = build_encoder(name, 32)
    assert parameter_count(encoder) == PARAMETERS[name]
    kernels = [value for value in encoder.parameters() if value.ndim == 4]
    assert kernels
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in kernels)


def test_entries_say_what_they_are() -> None:
    assert all(entry[0] and "\n" not in entry[0] for entry in ENCODERS.values())


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", [marked("resnet18"), marked("resnet50")])
def test_resnet_keeps_the_resolution_of_small_images(name: str, size: int) -> None:
    encoder, _ = build_encoder(name, size)
    maps: list[torch.Tensor] = []
    encoder.layer1.register_forward_hook(lambda module, args, out: maps.append(out))
    with torch.no_grad():
        encoder(images(2, size))
    assert maps[0].shape[-1] == (32 if size == 32 else 16)


def test_torchvision_is_not_imported_for_the_small_encoder() -> None:
    code = (
        "import sys; from trainer.models import build_encoder; build_encoder('conv_small', 32);"
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------- self-attention


def vit(size: int = 32) -> nn.Module:
    return seeded("vit_tiny", size)[0].eval()


@pytest.mark.parametrize(("size", "patch"), [(8, 4), (32, 4), (48, 4), (64, 8), (128, 16)])
def test_vit_cuts_patches_that_suit_the_size(size: int, patch: int) -> None:
    encoder = vit(size)
    assert encoder.conv_proj.kernel_size == (patch, patch)
    assert encoder.encoder.pos_embedding.shape == (1, (size // patch) ** 2 + 1, 192)


def test_vit_knows_where_a_patch_is() -> None:
    encoder, batch = vit(), images(2, 32)
    moved = batch.roll((8, 12), dims=(2, 3))  # by whole patches: the same ones elsewhere
    with torch.inference_mode():
        still, there = encoder(batch), encoder(moved)
        assert float((still - there).abs().max()) > 1e-3
        encoder.encoder.pos_embedding.zero_()  # without it a transformer sees a set of patches
        torch.testing.assert_close(encoder(batch), encoder(moved), rtol=1e-4, atol=1e-5)


def test_vit_attends_to_every_patch() -> None:
    encoder = vit()
    batch = images(2, 32).requires_grad_()
    encoder(batch)[0].square().sum().backward()
    assert batch.grad is not None
    per_patch = batch.grad[0].abs().sum(0).unfold(0, 4, 4).unfold(1, 4, 4).sum((-1, -2))
    assert per_patch.shape == (8, 8)
    assert float(per_patch.min()) > 0.01 * float(per_patch.max())
    assert not batch.grad[1].any()  # and to no other image


# ---------------------------------------------------------------------- what cannot be had


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit", 32, "encoder must be one of conv_small, .*, torchvision:NAME; got 'vit'$"),
        ("vgg11", 31, "vgg11 cannot take images of 31 pixels: needs at least 32 pixels; raise"),
        ("vit_tiny", 30, "30 pixels: cuts them into patches of 4; set image_size to 28 or 32$"),
        ("vit_small", 100, "100 pixels: cuts them into patches of 8; set image_size to 96 or 104$"),
        ("torchvision:resnet", 32, "must name one of alexnet, .*, wide_resnet50_2; got 'resnet'$"),
        ("torchvision:", 32, "must name one of alexnet, .*; got ''$"),
        ("torchvision:inception_v3", 64, r"take images of 64 pixels: .*; set image_size to 96$"),
        ("torchvision:vgg11", 16, r"take images of 16 pixels: .*; set image_size to 32$"),
        ("torchvision:vit_b_16", 40, r"take images of 40 pixels: .*; set image_size to 64$"),
        ("torchvision:maxvit_t", 160, r"take images of 160 pixels: .*; set image_size to 224$"),
        ("torchvision:vit_h_14", 1000, r"1000 pixels: .*; choose another encoder$"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(name: str, size: int, message: str) -> None:
    for attempt in (check_encoder, build_encoder):
        with pytest.raises(ValueError, match=message) as caught:
            attempt(name, size)
        assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["conv_small", "vgg11", "vit_tiny", "torchvision:squeezenet1_1"]),
    size=st.integers(8, 70),
)
def test_the_check_says_what_building_and_encoding_find(name: str, size: int) -> None:
    before = torch.get_rng_state()
    try:
        check_encoder(name, size)
    except ValueError:
        with pytest.raises(ValueError, match="cannot take images"):
            build_encoder(name, size)
    else:
        assert torch.equal(before, torch.get_rng_state())
        encoder, feature_dim = build_encoder(name, size)
        with torch.no_grad():
            assert encoder(torch.rand(2, 3, size, size)).shape == (2, feature_dim)


def test_smallest_size_of_inception_is_its_own() -> None:
    check_encoder("torchvision:inception_v3", 75)
    with pytest.raises(ValueError, match="74 pixels"):
        check_encoder("torchvision:inception_v3", 74)


PUBLISHED = {
    "alexnet": 4096,
    "convnext_base": 1024,
    "densenet121": 1024,
    "efficientnet_b7": 2560,
    "googlenet": 1024,
    "inception_v3": 2048,
    "maxvit_t": 512,
    "mnasnet1_0": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_large": 1280,
    "regnet_y_128gf": 7392,
    "resnet152": 2048,
    "shufflenet_v2_x1_0": 1024,
    "squeezenet1_1": 512,
    "swin_b": 1024,
    "vgg16": 4096,
    "vit_h_14": 1280,
}
"""Features before the class layer, a model of each family."""


@pytest.mark.slow
def test_every_model_of_torchvision_loses_its_head() -> None:
    """By default one of each family; its other models differ in depth and width."""
    import torchvision

    from trainer.torchvision_models import feature_dim

    known = torchvision.models.list_models(module=torchvision.models)
    assert len(known) >= 80
    names = known if ALL else list(PUBLISHED)
    before = torch.get_rng_state()
    for name in names:
        check_encoder(f"torchvision:{name}", 224)
    assert torch.equal(before, torch.get_rng_state())
    found = {name: feature_dim(name, 224) for name in names}
    assert 1000 not in found.values()
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


CHECK_A_GIANT = """
import resource
import torch, torch._dynamo, torchvision, sympy
from trainer.models import check_encoder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
check_encoder("torchvision:resnet18", 32)
before = peak()
check_encoder("torchvision:regnet_y_128gf", 224)
print(peak() - before)
"""


@long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_the_check_takes_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK_A_GIANT], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100  # megabytes; the weights are 2,500


# ---------------------------------------------------------------------- heads


def test_projection_head_shape_and_norm() -> None:
    head = ProjectionHead(8, 32, 5)
    assert head(torch.rand(7, 8)).shape == (7, 5)
    assert parameter_count(head) == 8 * 32 + 2 * 32 + 32 * 5 + 5
    assert [type(module).__name__ for module in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_projection_head_has_the_layers_asked_for(layers: int) -> None:
    head = ProjectionHead(8, 32, 5, layers)
    linear = [module for module in head if isinstance(module, nn.Linear)]
    widths = [8, *[32] * (layers - 1), 5]
    found = [(module.in_features, module.out_features) for module in linear]
    assert found == list(itertools.pairwise(widths))
    assert [module.bias is not None for module in linear] == [False] * (layers - 1) + [True]
    assert sum(isinstance(module, nn.BatchNorm1d) for module in head) == layers - 1
    assert isinstance(head[-1], nn.Linear)
    assert head(torch.rand(7, 8)).shape == (7, 5)


def test_a_norm_after_the_last_layer_centres_and_scales_every_output() -> None:
    head = ProjectionHead(8, 32, 5, norm=True)
    out = head(10 + torch.rand(64, 8))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(dim=0, correction=0), torch.ones(5), atol=0.1, rtol=0)
    assert parameter_count(head) == parameter_count(ProjectionHead(8, 32, 5))


def test_predictor_gives_back_the_width_it_takes() -> None:
    predictor = Predictor(6, 16)
    assert predictor(torch.rand(7, 6)).shape == (7, 6)
    names = [type(module).__name__ for module in predictor]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert parameter_count(predictor) == 6 * 16 + 2 * 16 + 16 * 6 + 6


# ---------------------------------------------------------------------- weights from a file

State = dict[str, Any]


def written(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


def untouched(encoder: nn.Module, before: State) -> bool:
    return all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def copied(encoder: nn.Module) -> State:
    return {key: value.clone() for key, value in encoder.state_dict().items()}


def behind(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}},
    "module.": behind("module."),
    "encoder.": behind("encoder."),
    "module.backbone.": behind("module.backbone."),
    "beside a projection head": lambda state: {
        "state_dict": {**behind("backbone.")(state), "projection.0.weight": torch.ones(2, 2)}
    },
    "half precision": lambda state: {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    },
    "no counts": lambda state: {
        key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize(
    ("name", "wrapping"),
    [
        *(("conv_small", wrapping) for wrapping in WRAPPINGS),
        ("vit_tiny", "bare"),  # has an "encoder." of its own
        ("vit_tiny", "encoder."),
    ],
)
def test_weights_are_found_however_they_are_wrapped(
    tmp_path: Path, name: str, wrapping: str
) -> None:
    source, _ = seeded(name, 32, seed=1)
    target, _ = seeded(name, 32, seed=2)
    with torch.no_grad():
        source(images(4, 32))
    load_encoder_weights(target, written(tmp_path, WRAPPINGS[wrapping](source.state_dict())))
    tolerance = 1e-3 if wrapping == "half precision" else 0
    for key, value in source.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(
                target.state_dict()[key], value, rtol=tolerance, atol=tolerance
            )


def test_weights_are_read_from_safetensors(tmp_path: Path) -> None:
    source, _ = seeded("conv_small", 32, seed=1)
    target, _ = seeded("conv_small", 32, seed=2)
    path = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, path)
    load_encoder_weights(target, path)
    assert untouched(target, source.state_dict())
    assert next(target.parameters()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "model", "size"),
    [
        ("resnet18", "resnet18", 64),
        ("vgg11", "vgg11_bn", 32),
        ("torchvision:squeezenet1_1", "squeezenet1_1", 32),
        ("torchvision:googlenet", "googlenet", 32),
    ],
)
def test_a_whole_classifier_gives_its_encoder(
    tmp_path: Path, name: str, model: str, size: int
) -> None:
    import torchvision

    options = {"init_weights": False} if model == "googlenet" else {}
    if model == "googlenet":
        options["aux_logits"] = True
    whole = torchvision.models.get_model(model, weights=None, **options)
    encoder, _ = build_encoder(name, size)
    load_encoder_weights(encoder, written(tmp_path, whole.state_dict()))
    state = whole.state_dict()
    assert untouched(encoder, state)
    heads = [path for path, module in encoder.named_modules() if isinstance(module, RemovedHead)]
    assert heads
    left = set(state) - set(encoder.state_dict())
    assert left
    assert all(any(key.startswith(f"{head}.") for head in heads) for key in left)


def test_a_classifiers_features_are_those_before_its_last_layer(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(3)
    whole = torchvision.models.squeezenet1_1(weights=None).eval()
    encoder, _ = build_encoder("torchvision:squeezenet1_1", 64)
    load_encoder_weights(encoder, written(tmp_path, whole.state_dict()))
    batch = images(2, 64)
    with torch.inference_mode():
        before = nn.functional.adaptive_avg_pool2d(whole.features(batch), 1).flatten(1)
        torch.testing.assert_close(encoder.eval()(batch), before, rtol=1e-5, atol=1e-6)


def wrong_states() -> dict[str, tuple[Callable[[State], Any], str]]:
    def without(state: State) -> State:
        return {key: value for key, value in state.items() if not key.startswith("3.")}

    def reshaped(state: State) -> State:
        return state | {"0.0.weight": torch.zeros(32, 3, 7, 7)}

    return {
        "missing": (without, r"5 missing|4 missing"),
        "shape": (reshaped, r"1 of another shape \(0\.0\.weight \[32, 3, 7, 7\] in place of"),
        "left over": (lambda state: state | {"7.weight": torch.ones(1)}, r"1 left over \(7\.w"),
        "left over behind": (
            lambda state: behind("encoder.")(state | {"9.weight": torch.ones(1)}),
            r"1 left over \(9\.weight\)",
        ),
        "integers": (
            lambda state: state | {"0.0.weight": torch.zeros(32, 3, 3, 3, dtype=torch.int8)},
            r"0\.0\.weight torch\.int8 in place of torch\.float32",
        ),
        "no tensor": (lambda state: state | {"0.0.weight": "text"}, r"0\.0\.weight is no tensor"),
        "two": (
            lambda state: behind("online.")(state) | behind("target.")(state),
            r"hold several encoders, online\., target\.; keep one",
        ),
        "another": (lambda state: {"conv1.weight": torch.ones(3)}, r"missing .*, \.\.\.\), 1 left"),
        "empty": (lambda state: {}, "missing"),
        "list": (lambda state: [1, 2], "hold no names"),
    }


@pytest.mark.parametrize("case", wrong_states())
def test_weights_that_do_not_fit_change_nothing(tmp_path: Path, case: str) -> None:
    change, message = wrong_states()[case]
    source, _ = seeded("conv_small", 32, seed=1)
    target, _ = seeded("conv_small", 32, seed=2)
    before = copied(target)
    path = written(tmp_path, change(dict(source.state_dict())))
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder_weights(target, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert untouched(target, before)


@pytest.mark.parametrize(
    ("source", "target", "sizes"),
    [
        ("resnet34", "resnet18", (32, 32)),  # holds all of the smaller one's names
        ("resnet18", "resnet34", (32, 32)),
        ("resnet18", "resnet18", (64, 32)),  # the other stem
        ("vit_tiny", "vit_tiny", (64, 32)),  # other patches
        ("vit_tiny", "vit_tiny", (64, 96)),  # other positions only
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, source: str, target: str, sizes: tuple[int, int]
) -> None:
    path = written(tmp_path, build_encoder(source, sizes[0])[0].state_dict())
    encoder, _ = build_encoder(target, sizes[1])
    before = copied(encoder)
    with pytest.raises(ValueError, match=r"do not fit: .*; use weights of the same encoder"):
        load_encoder_weights(encoder, path)
    assert untouched(encoder, before)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x04N.", None])
def test_unreadable_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    encoder, _ = build_encoder("conv_small", 32)
    message = "do not exist" if content is None else "cannot be read|hold no names"
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder_weights(encoder, path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.mkdir, (tmp_path / "made",)

    path = written(tmp_path, {"0.0.weight": Hostile()})
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder_weights(build_encoder("conv_small", 32)[0], path)
    assert not (tmp_path / "made").exists()
