"""Learned rounding by `brevitas_examples`, whose trainer runs blocks outside of the model."""

import torch
from brevitas_examples.common.learned_round.learned_round_args import (
    HandlerSpec,
    LearnedRoundArgs,
    LossArgs,
    OptimizerArgs,
    TrainerConfig,
    TrainingArgs,
)
from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer
from brevitas_examples.common.learned_round.learned_round_utils import Cache
from contract.networks import BATCHES
from torch.utils.data import DataLoader

from tdq_plugin.hooks import at_timestep


class BlockCache(Cache):
    """Inputs, timesteps and outputs of a block, one entry per batch."""

    def __init__(self):
        self.timestep = None
        self.reset_cache()

    def reset_cache(self):
        self.inputs, self.outputs = [], []

    def store_inputs(self, args, kwargs):
        self.inputs.append((args[0], self.timestep))

    def store_output(self, output):
        self.outputs.append(output)

    def collate_fn(self, batch):
        ((inputs, output),) = batch
        return inputs, output

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.outputs[index]


def test_blocks_are_trained_at_the_timesteps_of_their_inputs(calibrated):
    model = calibrated(activation_bits=8, weight_bits=3, first_last_bits=None)
    block, cache = model.conv_down, BlockCache()

    def run_model(model, batch):
        cache.timestep = batch[1]
        model(*batch)

    def run_block(block, inputs):
        x, timesteps = inputs
        with at_timestep(model, timesteps):
            return block(x)

    def loss():
        errors = [(run_block(block, x) - y).square().mean() for x, y in cache]
        return float(sum(errors).detach())

    shape = {"learned_round_zeta": 1.1, "learned_round_gamma": -0.1}
    rounding = HandlerSpec("learned_round", LearnedRoundArgs("hard_sigmoid", shape))
    optimizer = OptimizerArgs("learned_round", torch.optim.Adam, lr=3e-2, optimizer_kwargs={})
    training = TrainingArgs(
        [optimizer], batch_size=1, iters=60, losses_args=[LossArgs("mse", {})], use_amp=False
    )
    trainer = LearnedRoundTrainer(TrainerConfig(training, [rounding]))
    trainer._populate_cache(cache, model, run_model, block, BATCHES)
    before = loss()
    loader = DataLoader(BATCHES, batch_size=None)
    trainer.train(model, run_model, run_block, loader, cache, lambda model: [block])
    assert loss() < 0.8 * before
