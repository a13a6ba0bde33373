"""Micro-batches give the whole batch's gradients; momentum network and queue do what they say."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.losses import LOSSES, get_loss
from trainer.network import ContrastiveNetwork

BATCH = 12
WITHOUT_BATCH_NORM = nn.Sequential(
    nn.Conv2d(3, 6, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Dropout(0.0), nn.LazyLinear(192)
)


def config_of(**fields: Any) -> TrainConfig:
    base = {"image_size": 16, "batch_size": BATCH, "projector_hidden": 24, "projector_out": 8}
    return TrainConfig.model_validate(base | {"predictor_hidden": 12} | fields)


def network_of(config: TrainConfig, encoder: nn.Module | None = None) -> ContrastiveNetwork:
    """In float64 with an `encoder` given, which takes the place of the configured one."""
    torch.manual_seed(0)
    network = ContrastiveNetwork(config, get_loss(config.loss))
    if encoder is not None:
        network.encoder = copy.deepcopy(encoder)
        network.encoder(torch.zeros(1, 3, 16, 16))  # a lazy layer learns its size
        network.double()
    network.start(torch.device("cpu"))
    if network.queue_QP is not None and encoder is not None:
        network.queue_QP = network.queue_QP.double()
    return network.train()


def views_of(config: TrainConfig, seed: int = 1) -> Tensor:
    size = config.image_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * config.batch_size, 3, size, size, generator=generator)


def step(network: ContrastiveNetwork, config: TrainConfig, views: Tensor) -> Tensor:
    labels = torch.arange(config.batch_size) % 3
    embedded = network.embed(network.encode(views), views, labels)
    loss = get_loss(config.loss).compute(embedded, config)
    loss.backward()
    network.after_step(embedded)
    return loss.detach()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro", [1, 5, 6])
def test_micro_batches_give_the_gradients_of_the_whole_batch(loss: str, micro: int) -> None:
    config = config_of(loss=loss)
    small = config.model_copy(update={"micro_batch_size": micro})
    whole, parts = (network_of(each, WITHOUT_BATCH_NORM) for each in (config, small))
    views = views_of(config).double()
    torch.testing.assert_close(step(parts, small, views), step(whole, config, views))
    expected, found = gradients(whole), gradients(parts)
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.slow
def test_the_same_of_self_attention() -> None:
    config = config_of(encoder="vit_tiny", image_size=8)
    small = config.model_copy(update={"micro_batch_size": 5})
    whole, parts = network_of(config).double(), network_of(small).double()
    views = views_of(config).double()
    step(whole, config, views)
    step(parts, small, views)
    found = gradients(parts)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_a_smaller_batch_is_another_gradient() -> None:
    """What accumulating the gradients of small batches would give is not the same."""
    config = config_of()
    whole, parts = (network_of(config, WITHOUT_BATCH_NORM) for _ in range(2))
    views = views_of(config).double()
    step(whole, config, views)
    first, second = views.chunk(2)
    for rows in (slice(0, 6), slice(6, 12)):
        part = torch.cat([first[rows], second[rows]])
        embedded = parts.embed(parts.encode(part), part)
        (get_loss("nt_xent").compute(embedded, config) / 2).backward()
    expected, found = gradients(whole), gradients(parts)
    name = "encoder.0.weight"
    assert (found[name] - expected[name]).abs().max() > 0.05 * expected[name].abs().max()


def test_batch_norm_counts_a_micro_batch_once() -> None:
    config = config_of(micro_batch_size=4)
    network, plain = network_of(config), network_of(config)
    views = views_of(config)
    step(network, config, views)
    for part in views.split(8):
        plain.encoder(part)
    expected = dict(plain.encoder.named_buffers())
    for name, buffer in network.encoder.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=name)
        if name.endswith("num_batches_tracked"):
            assert buffer == 3


def test_dropout_is_the_same_in_both_passes_of_a_micro_batch() -> None:
    config = config_of(micro_batch_size=4)
    whole = config.model_copy(update={"micro_batch_size": None})
    found = []
    for each in (config, whole):
        network = network_of(each, WITHOUT_BATCH_NORM)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        views = views_of(each).double()
        torch.manual_seed(5)
        if each.micro_batch_size is None:  # the same draws as the parts make
            parts = [network.encoder(part) for part in views.split(8)]
            embedded = network.embed(torch.cat(parts), views)
            get_loss("nt_xent").compute(embedded, each).backward()
        else:
            step(network, each, views)
        found.append(gradients(network))
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_the_micro_batch() -> None:
    sizes = [(16, None), (256, None), (256, 16)]
    code = f"""
import os
import torch
from torch.utils.checkpoint import checkpoint
from trainer.config import TrainConfig
from trainer.losses import get_loss
from trainer.network import ContrastiveNetwork
torch.set_num_threads(1)
checkpoint(lambda x: x, torch.ones(1), use_reentrant=False)  # its first call imports much
def high_water_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
def measure(batch, micro):
    config = TrainConfig(batch_size=batch, micro_batch_size=micro, encoder="conv_small")
    network = ContrastiveNetwork(config, get_loss(config.loss))
    network.start(torch.device("cpu"))
    network.train()
    views = torch.randn(2 * batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with open("/proc/self/clear_refs", "w") as marks:  # what the parent's size left behind
        marks.write("5")
    before = high_water_kb()
    embedded = network.embed(network.encode(views), views)
    get_loss(config.loss).compute(embedded, config).backward()
    print((high_water_kb() - before) / 1024, flush=True)
for batch, micro in {sizes}:
    child = os.fork()  # each in a process that has measured nothing before
    if not child:
        measure(batch, micro)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, whole, parts = map(float, done.stdout.split())
    assert whole > 3 * small  # else nothing is being measured
    assert parts < small + 0.25 * (whole - small)


# ---------------------------------------------------------------------- momentum and queue


def test_only_what_a_loss_needs_is_there() -> None:
    for name, loss in LOSSES.items():
        network = network_of(config_of(loss=name))
        assert (network.predictor is not None) == ("predictor" in loss.needs)
        assert (network.momentum is not None) == ("target" in loss.needs)
        assert (network.queue_QP is not None) == ("queue" in loss.needs)


@pytest.mark.parametrize("loss", ["byol", "info_nce"])
def test_the_momentum_network_follows_slowly_and_has_no_gradient(loss: str) -> None:
    config = config_of(loss=loss, target_momentum=0.75)
    network = network_of(config)
    assert network.momentum is not None
    online = nn.Sequential(network.encoder, network.head)
    before = [p.clone() for p in network.momentum.module.parameters()]
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    step(network, config, views_of(config))
    for old, new, target in zip(
        before, online.parameters(), network.momentum.module.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new)
        assert target.grad is None
        assert not target.requires_grad
    trained = {id(p) for p in network.parameters()}
    assert not trained & {id(p) for p in network.momentum.module.parameters()}


def test_the_target_is_that_of_the_momentum_network_in_training_mode() -> None:
    config = config_of(loss="byol")
    network = network_of(config)
    views = views_of(config)
    embedded = network.embed(network.encode(views), views)
    assert embedded.target0_BD is not None
    # equal at first: the same weights, and the batch's own statistics in both
    torch.testing.assert_close(embedded.target0_BD, embedded.z0_BD.detach())


def test_the_queue_fills_and_forgets_the_oldest() -> None:
    config = config_of(loss="info_nce", queue_size=40)
    network = network_of(config)
    assert network.queue_QP is not None
    sizes, keys = [], []
    for number in range(3):
        views = views_of(config, seed=number)
        embedded = network.embed(network.encode(views), views)
        assert embedded.queue_QD is not None
        sizes.append(len(embedded.queue_QD))  # what the loss sees: earlier batches only
        assert embedded.target0_BD is not None
        assert embedded.target1_BD is not None
        keys += [embedded.target0_BD, embedded.target1_BD]
        network.after_step(embedded)
    assert sizes == [0, 24, 40]
    expected = nn.functional.normalize(torch.cat(keys), dim=1)[-40:]
    torch.testing.assert_close(network.queue_QP, expected)
    assert not network.queue_QP.requires_grad


def test_the_memory_goes_round() -> None:
    config = config_of(loss="info_nce", queue_size=40)
    network, other = network_of(config), network_of(config)
    step(network, config, views_of(config))
    other.load_state_dict(network.state_dict())
    other.load_memory(network.memory())
    views = views_of(config, seed=7)
    assert torch.equal(step(network, config, views), step(other, config, views))
