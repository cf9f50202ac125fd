"""What goes wrong while a run trains costs nothing that was kept."""

import pytest
import torch
from safetensors.torch import load_file

from train.callbacks.finite import FiniteCheck
from train.module import PretrainModule


@pytest.mark.parametrize(
    ("bad", "optimizer"),
    [
        (float("nan"), "adamw"),
        pytest.param(float("nan"), "muon", marks=pytest.mark.slow),
        pytest.param(float("inf"), "sgd", marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run(
    train, tmp_path, monkeypatch, capsys, bad, optimizer
):
    step = PretrainModule.training_step

    def breaks(self, batch, batch_idx):
        module[:] = [self.decoder]
        loss = step(self, batch, batch_idx)
        return loss * bad if self.trainer.global_step >= 4 else loss

    def keep_weights(self, bad_step):
        if bad_step:
            seen.append({name: p.detach().clone() for name, p in module[0].named_parameters()})
        check(self, bad_step)

    seen, module, check = [], [], FiniteCheck.check
    monkeypatch.setattr(FiniteCheck, "check", keep_weights)
    monkeypatch.setattr(PretrainModule, "training_step", breaks)
    # Step 5 keeps nothing; step 6 does, and would log too.
    often = ("tracking.log_every=3", "tracking.sinks_every=3", "tracking.last_every=3")
    settings = (*often, "tracking.per_octave=1", "tracking.validate_every=100")
    assert train("trainer.max_steps=20", f"optimizer={optimizer}", *settings) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "NaN or infinity in the loss or gradients of step 5, rows 32 to 39" in line
    run = tmp_path / "run"
    # A resumed run must keep its rate, so the way forward is another run.
    way_on = "can't change when a run is resumed: start a new run (init_from="
    assert way_on in line and f"init_from={run}@STEP" in line
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept[-1] == "step_00000004" and kept[-1] in line
    weights = load_file(run / "checkpoints" / kept[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    if optimizer == "adamw":
        # Updates were skipped: the weights in memory are still those of step 4.
        (last,) = seen
        assert all(torch.equal(last[name], tensor) for name, tensor in weights.items())
    monkeypatch.undo()
    assert train("trainer.max_steps=20", f"optimizer={optimizer}", *settings, "resume=true") == 0


def test_every_step_that_keeps_something_is_checked():
    from train.tracking import TrackingConfig

    config = TrackingConfig(log_every=10, sinks_every=7, validate_every=100, last_every=15)
    check = FiniteCheck(config, None, max_steps=33, rows_per_step=4)
    due = {step for step in range(1, 34) if check._is_due(step)}
    assert {7, 10, 14, 15, 16, 20, 21, 28, 30, 32, 33} <= due
    assert {18, 22, 25} & due == check.steps & {18, 22, 25}
