"""The plain PyTorch peer: the loop one would write around ``scripts.plain_decoder``."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from kernels.bench.timing import Clock
from scripts.bench.turns import GlobalSettings, state_tensors
from scripts.plain_decoder import PlainDecoder, check_plain
from train.config import RunConfig
from train.data import data_of
from train.optimizers import build_optimizer
from train.schedules import check_schedule

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""By the word that the names of their kernels have."""

TRIAL_STEPS = 5
"""Steps by which the faster backend is told."""


class PlainRun:
    """Plain training steps from given weights on the batches of a config's stream.

    bf16: autocast, as Lightning's mixed precision. compiled: by ``torch.compile``, the whole graph.
    Raises ``UserError`` for settings that the plain decoder can't express.
    """

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        weights: Mapping[str, Tensor],
        device: torch.device,
        *,
        bf16: bool,
        compiled: bool,
    ):
        check_plain(config)
        self.global_settings = GlobalSettings.now()
        start = time.perf_counter()
        self.config, self.weights, self.device = config, weights, device
        self.bf16 = bf16
        self.model = PlainDecoder(config.model, vocab_size, config.packing.context).to(device)
        self.loss = self.model
        if compiled:
            self.loss = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.micro_batches = config.packing.micro_batches(1)
        self.data = data_of(config)
        self.data.setup()
        self.restart()
        # Building; the first step is for whoever makes it to add.
        self.seconds_to_first_step = time.perf_counter() - start

    def restart(self) -> None:
        """Go back to the weights and the batch of the first step."""
        self.model.load_state_dict(self.weights)
        self.model.zero_grad()
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        schedule = self.config.schedule
        total_steps = check_schedule(schedule, self.config.trainer.max_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule.factor(step, total_steps)
        )
        self.batches = iter(self.data.train_dataloader())

    def step(self) -> Tensor:
        """One optimizer step; its loss in nats a label, a scalar on the device."""
        total = torch.zeros((), device=self.device)
        for _ in range(self.micro_batches):
            batch = next(self.batches)
            tokens_BT = batch.tokens_BT.to(self.device, non_blocking=True)
            labels_BT = batch.labels_BT.to(self.device, non_blocking=True)
            num_labels = batch.num_labels.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(tokens_BT, labels_BT) / num_labels
            loss.backward()
            total += loss.detach()
        if self.config.optimizer.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def steps(self, number: int = 1) -> None:
        """Make this many optimizer steps."""
        for _ in range(number):
            self.step()

    def losses(self, number: int) -> list[float]:
        """Make steps and return the loss of each."""
        return torch.stack([self.step() for _ in range(number)]).tolist()

    def tensors(self) -> list[Tensor]:
        """All that is on the device from step to step."""
        return [*self.model.parameters(), *state_tensors(self.optimizer)]

    def choose_backend(self, clock: Clock) -> dict[str, float]:
        """Take the faster attention kernel and start anew; milliseconds a step of each.

        A backend that can't do it, or whose kernels didn't run though asked for, is left out; if
        both are, the choice is PyTorch's.
        """
        milliseconds, first_step = {}, {}
        for name, backend in BACKENDS.items():
            self.model.backend = backend
            before = time.perf_counter()
            try:
                self.losses(1)
                first_step[name] = time.perf_counter() - before
                self.steps(1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"plain: no {name} attention: {str(error).splitlines()[0]}", flush=True)
                self.restart()
                continue
            # cuDNN's kernels call themselves flash too.
            kernels = {k for k in self.kernel_names() if ("cudnn" in k) == (name == "cudnn")}
            if not any(name in kernel for kernel in kernels):
                print(f"plain: {name} was asked for, but no kernel of a step is its", flush=True)
                continue
            start = clock.mark()
            self.steps(TRIAL_STEPS)
            milliseconds[name] = clock.milliseconds(start, clock.mark()) / TRIAL_STEPS
        if not milliseconds:
            print("plain: attention by whatever kernel PyTorch takes", flush=True)
            self.model.backend = None
            self.restart()
            return {}
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        self.model.backend = BACKENDS[fastest]
        # What compiling took; the step itself is made again.
        self.seconds_to_first_step += first_step[fastest] - milliseconds[fastest] / 1000
        self.restart()
        return milliseconds

    def kernel_names(self) -> set[str]:
        """Names, in lower case, of the kernels that one step runs on the GPU."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            self.steps(1)
            torch.cuda.synchronize(self.device)
        events = profiled.key_averages()
        return {event.key.lower() for event in events if event.device_type.name == "CUDA"}
