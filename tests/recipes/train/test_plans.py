"""Two processes over gloo give the losses and the model of one: a copy on each (DDP), spread weights (FSDP2), and split
layers."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fits import WORLD, process
from safetensors.torch import load_file

from mm import spec
from mm.errors import InputError
from mm.recipes.lm.fit import fit
from mm.recipes.lm.module import LmRecipe
from mm.recipes.lm.settings import LmData, LmJob, LmLoss, LmOptim, LmShape
from mm.recipes.lm.start import new_decoder
from mm.recipes.train.plans import check
from mm.recipes.train.run import read_log
from mm.recipes.train.settings import Trainer

WAYS = {"ddp": {}, "fsdp2": {"shard": True}, "tensor": {"tensor": WORLD}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The directory with a run of one process and of two, each way."""
    folder = tmp_path_factory.mktemp("plans")
    lines = [f"the {['cat', 'dog', 'hen'][i % 3]} sees number {i * i % 17}" for i in range(200)]
    (folder / "texts.txt").write_text("\n".join(lines))
    job = LmJob(
        data=LmData(path=str(folder / "texts.txt"), split="line", vocab=300, length=16, batch_size=4,
                    cache=str(folder / "tokens")),
        out=str(folder / "one"), shape=LmShape(width=32, depth=2, heads=4, kv_heads=2, qk_norm=True),
        loss=LmLoss(z_loss=0.001), optim=LmOptim(kind="muon", lr=0.01, warmup=2, clip=0.5, ema=0.5),
        trainer=Trainer(max_steps=6, evaluate=3, save=3, log=2, threads=1, accelerator="cpu"))
    fit(job)
    two = replace(job, trainer=replace(job.trainer, devices=WORLD),
                  data=replace(job.data, tokenizer=str(folder / "one" / "tokenizer")))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [replace(two, out=str(folder / way), **flags) for way, flags in WAYS.items()]
    torch.multiprocessing.spawn(process, (port, jobs), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_losses_and_the_model_of_one(way, runs):
    for name, column in (("train.csv", "loss"), ("train.csv", "gradient"), ("validation.csv", "perplexity")):
        one, two = (read_log(runs / run / name)[column] for run in ("one", way))
        assert two == pytest.approx(one, rel=1e-4)
    one, two = (load_file(runs / run / "model" / "model.safetensors") for run in ("one", way))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-3)


def test_the_checkpoint_of_split_layers_is_not_taken_for_a_whole_one(runs):
    with pytest.raises(InputError, match="of a run that splits layers over 2 processes, not 1"):
        LmRecipe.load_from_checkpoint(runs / "tensor" / "last.ckpt", weights_only=True)
    LmRecipe.load_from_checkpoint(runs / "fsdp2" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("mixer", "says"), [
    ({"heads": 3, "kv_heads": 3}, "3 heads with 3 of keys and 96 channels cannot be shared evenly by 2 processes"),
    ({"sinks": True}, "plain attention"), ({"k_bias": True}, "plain attention"),
    ({"qk_norm": spec.QKNorm(norm=spec.RMSNorm(), over="flat")}, "plain attention")])
def test_what_cannot_be_split_is_refused(mixer, says):
    stack = new_decoder(LmShape(width=32, depth=1, heads=4), 50, 8).stack
    layer = replace(stack.layers[0], mixer=replace(stack.layers[0].mixer, **mixer))
    with pytest.raises(InputError, match=says):
        check(replace(stack, layers=(layer,)), 2)
