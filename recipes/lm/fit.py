"""One run of `mm train lm`, from settings to a model directory."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.checkpoint.files import write_json
from mm.nn.lora import merge_lora
from mm.spec.schema import require
from mm.tokenizer.tokenizer import Tokenizer, load_tokenizer

from ..data.corpus import open_corpus
from ..data.sampler import Order
from ..train.launch import METRICS, MODEL, conclude, export, facts, lightning_trainer, start
from ..train.shard import strategy
from ..train.watch import Watch
from .data import Batches, Fixed, LmModule
from .module import LmRecipe, losses
from .objectives import SENTINELS, objective_for
from .settings import LmJob, LmLoss
from .start import Model, embed_of, opened, starting_model
from .tokenizer import train_tokenizer

COLUMNS = ("loss", "perplexity", "lr", "gradient", "tokens/s")
TOKENIZER, TOKENS = "tokenizer", "tokens"


def fit(job: LmJob) -> None:
    """Trains, or goes on with what `job.out` holds, and writes the averaged weights to `job.out`/model."""
    out, checkpoint = start(job)
    model, data = prepare(job)
    recipe = LmRecipe(model.spec, job.optim, job.loss, job.trainer.seed, model, job.lora, job.checkpointing,
                      job.compile)
    measure = partial(perplexity, data.evaluation()) if data.validation is not None else None
    watch = Watch(out, job.trainer, measure, COLUMNS, partial(documents, data))
    idle = bool(getattr(model.spec, "ahead", ()))  # layers that predict further tokens are not trained
    trainer = lightning_trainer(job.trainer, watch, strategy(job.shard, job.trainer.devices, idle, job.tensor))
    if trainer.is_global_zero:
        introduce(job, data, recipe.module, checkpoint)
    trainer.fit(recipe, data, ckpt_path=checkpoint, weights_only=True)
    average = recipe.whole_average()
    if trainer.is_global_zero:
        merge_lora(average)
        export(average, out / MODEL, job.export.dtype)
        write_json(out / METRICS, account(job, data, recipe, watch))
        conclude(out, watch)


def prepare(job: LmJob) -> tuple[Model, LmModule]:
    """What trains, and what it trains on: token files are written, unless they are there."""
    given = opened(job)
    tokenizer = tokenizer_for(job, given)
    model = starting_model(job, given, tokenizer)
    objective = objective_for(job.objective, job.data, tokenizer, embed_of(model).vocab)
    data = LmModule(job.data, tokenizer, job.trainer.seed, Path(job.out) / TOKENS, objective)
    data.prepare_data()
    data.setup()
    return model, data


def tokenizer_for(job: LmJob, model: Model | None) -> Tokenizer:
    """That of `data.tokenizer`, of the model, or one that is trained on the corpus and kept in the run's directory.
    Raises InputError."""
    if job.data.tokenizer:
        tokenizer = load_tokenizer(job.data.tokenizer)
        require(tokenizer is not None, f"data.tokenizer {job.data.tokenizer} is no directory with a tokenizer")
        return tokenizer
    if model is not None:
        return model.tokenizer
    kept = Path(job.out) / TOKENIZER
    if not kept.exists():
        corpus = open_corpus(job.data.path, job.data.split)
        train_tokenizer(corpus, job.data.vocab, mask=job.objective == "masked",
                        sentinels=SENTINELS if job.objective == "spans" else 0).save(kept)
    return load_tokenizer(kept)


def perplexity(batches: Fixed, model: nn.Module) -> dict[str, float]:
    """Mean cross-entropy of all targets of the evaluation batches, in nats, and what it is as a perplexity."""
    training, device, total, count = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    try:
        with torch.inference_mode():
            for i in range(len(batches)):
                batch = batches[i]
                batch = type(batch)(*(x.to(device) if isinstance(x, Tensor) else x for x in batch))
                targets = int((batch.targets >= 0).sum())
                total += losses(model, batch, LmLoss())[1].item() * targets
                count += targets
    finally:
        model.train(training)
    entropy = total / max(count, 1)
    return {"cross-entropy": entropy, "perplexity": math.exp(min(entropy, 700.0))}


def documents(data: LmModule, step: int) -> str:
    """What the batch before this step was made of, in words."""
    order = Order(count=len(data.training), batch=data.data.batch_size, seed=data.seed)
    places = data.told(Batches(data.training, data.objective, order)[step - 1].documents)
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    return f"the documents at {'; '.join(places[:5])}{more}"


def introduce(job: LmJob, data: LmModule, model: Model, checkpoint: Path | None) -> None:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    tokens, held = data.training.spans.size, data.validation.spans.size if data.validation else 0
    passes = job.trainer.max_steps * job.data.batch_size / len(data.training)
    lines = [*data.notes, f"{tokens:,} tokens of {model.tokenizer.vocab_size} kinds, {held:,} to evaluate on, "
             f"{parameters:.2f} million parameters, {trained:.2f} trained, {job.trainer.max_steps} steps of "
             f"{job.data.batch_size} x {job.data.length} tokens: {passes:.1f} passes"]
    print("\n".join(lines + ([f"continuing {checkpoint}"] if checkpoint else [])), file=sys.stderr)


def account(job: LmJob, data: LmModule, recipe: LmRecipe, watch: Watch) -> dict[str, Any]:
    """What a run was and came to; times in seconds."""
    done = job.trainer.max_steps * job.data.batch_size * job.data.length
    return facts(job, recipe, watch) | {
        "length": job.data.length, "tokens_per_second": round(done / max(watch.seconds, 1e-9)),
        "tokens": data.training.spans.size, "vocabulary": data.tokenizer.vocab_size, "left_out": data.notes,
        "parameters": sum(p.numel() for p in recipe.module.parameters()),
        "trained": sum(p.numel() for p in recipe.module.parameters() if p.requires_grad)}
