"""Adapters through secure aggregation: a frozen A and summed B give FFA-LoRA's exact mean."""

import numpy as np
import pytest

from support.lora_states import LAYERS, dense_mean, frozen_A_updates
from support.secagg_rounds import Round, make_plan, names
from tightbeam.common.errors import UpdateRefusedError
from tightbeam.federation.math import FedIT, FfaLora, Update, parse_adapter
from tightbeam.federation.secagg import FixedPoint, Layout

SCALE = 2.0


def trainable(update: Update) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """What FFA-LoRA trains and sends: everything but A."""
    return {name: t.astype(np.float32) for name, t in update.adapter.items() if "lora_A" not in name}


def test_the_mean_through_the_masks_is_ffa_loras() -> None:
    updates = frozen_A_updates([8, 8, 8])
    frozen = {name: tensor for name, tensor in updates[0].adapter.items() if "lora_A" in name}
    layout = Layout.of(trainable(updates[0]))
    encoding = FixedPoint.fitting(clip=8.0, max_weight=10, max_clients=3, ring_bits=32)
    trial = Round(make_plan(3, size=layout.size, encoding=encoding))
    flat = {
        name: layout.flatten(trainable(update), name) for name, update in zip(names(3), updates, strict=True)
    }
    total = trial.run(inputs=flat).finish()  # weights 1, 2, 3, as the updates'
    state = frozen | layout.unflatten(total.mean)

    in_the_open = FfaLora().aggregate(updates)
    opened = in_the_open.state(updates[0].scale)
    for name, tensor in opened.items():
        np.testing.assert_allclose(state[name], tensor, atol=2 * encoding.error_bound)
    assert encoding.error_bound < 1e-6
    adapter, mean = parse_adapter(state, updates[0].scale, "global"), dense_mean(updates)
    for layer in LAYERS:
        error = np.linalg.norm(adapter.modules[layer].delta_w() - mean[layer])
        assert error < 1e-5 * np.linalg.norm(mean[layer])


def test_summing_both_factors_is_fedit_with_its_bias() -> None:
    """The masks add what they are given: the sum of A and the sum of B, not the sum of B @ A."""
    updates = frozen_A_updates([8, 8, 8])
    moved = []
    for number, update in enumerate(updates):
        adapter = {name: t + np.float32(number) * ("lora_A" in name) for name, t in update.adapter.items()}
        moved.append(Update(update.client, update.weight, adapter, SCALE))
    layout = Layout.of(dict(moved[0].adapter))
    encoding = FixedPoint.fitting(clip=16.0, max_weight=10, max_clients=3)
    trial = Round(make_plan(3, size=layout.size, encoding=encoding))
    flat = {name: layout.flatten(u.adapter, name) for name, u in zip(names(3), moved, strict=True)}
    state = layout.unflatten(trial.run(inputs=flat).finish().mean)
    fedit = FedIT().aggregate(moved)
    for name, tensor in fedit.state(SCALE).items():
        np.testing.assert_allclose(state[name], tensor, atol=1e-6)
    assert fedit.relative_error() > 0.01


def test_mixed_ranks_do_not_fit_one_vector() -> None:
    small, large = frozen_A_updates([4, 8])
    with pytest.raises(UpdateRefusedError, match="the same adapter config and rank"):
        Layout.of(trainable(small)).flatten(trainable(large), "client-1")
