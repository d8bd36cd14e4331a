"""AdamW with its state on the host, for weights on a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_steel.optim.host_adamw import MOMENTS, HostAdamW


@pytest.mark.gpu
def test_moments_stay_on_the_host_and_weights_on_the_gpu() -> None:
    start = torch.randn(64, 33)
    near, far = (torch.nn.Parameter(start.to(where)) for where in ("cpu", "cuda"))
    reference, ours = torch.optim.AdamW([near], lr=0.01, fused=True), HostAdamW([far], lr=0.01)
    for _ in range(3):
        near.grad = torch.randn_like(near)
        far.grad = near.grad.to("cuda")
        reference.step()
        ours.step()
    assert torch.equal(far.detach().cpu(), near.detach()), "both are updated on the host"
    assert {ours.state[far][name].device.type for name in MOMENTS} == {"cpu"}
    again = HostAdamW([far], lr=0.01)
    again.load_state_dict(ours.state_dict())
    assert {value.device.type for value in again.state[far].values()} == {"cpu"}
