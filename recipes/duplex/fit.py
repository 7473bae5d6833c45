"""One run of `mm train duplex`, from settings to a model directory."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mm import spec
from mm.checkpoint.files import write_json
from mm.nn.lora import merge_lora
from mm.spec.schema import require
from mm.speech.duplex import DuplexLM
from mm.tokenizer.tokenizer import Tokenizer, load_tokenizer

from ...codecs.file import Header, Reader
from ...codecs.mimi import Mimi
from ..data.dialogues import Codes, read_manifest
from ..talk.codec_of import CODEC, Note
from ..talk.partner import SPEAKING
from ..train.launch import METRICS, MODEL, conclude, export, facts, lightning_trainer, start
from ..train.shard import strategy
from ..train.watch import Watch
from .data import DuplexModule
from .evaluation import exam
from .module import DuplexRecipe, hear_codes, hear_vectors
from .settings import DuplexJob, DuplexShape

COLUMNS = ("loss", "text", "audio", "perplexity", "right", "lr", "gradient", "frames/s")
CODES = "codes"
NORM = spec.RMSNorm(eps=1e-8, order="scale_then_cast")


def fit(job: DuplexJob) -> None:
    """Trains, or goes on with what `job.out` holds, and writes the averaged weights to `job.out`/model."""
    out, checkpoint = start(job)
    model, data = prepare(job)
    recipe = DuplexRecipe(model.spec, job.optim, job.loss, job.trainer.seed, model, job.lora, job.checkpointing,
                           job.compile)
    measure = exam(job, data) if data.validation is not None else None
    watch = Watch(out, job.trainer, measure, COLUMNS, partial(conversations, data))
    trainer = lightning_trainer(job.trainer, watch, strategy(job.shard, job.trainer.devices))
    if trainer.is_global_zero:
        introduce(job, data, recipe.module, checkpoint)
    trainer.fit(recipe, data, ckpt_path=checkpoint, weights_only=True)
    average = recipe.whole_average()
    if trainer.is_global_zero:
        merge_lora(average)
        hear_codes(average)
        export(average, out / MODEL, job.export.dtype)
        keep_codec(job, average, out / MODEL)
        write_json(out / METRICS, facts(job, recipe, watch) | {
            "length": job.data.length, "frames": data.training.frames,
            "parameters": sum(p.numel() for p in recipe.module.parameters())})
        conclude(out, watch)


def prepare(job: DuplexJob) -> tuple[DuplexLM, DuplexModule]:
    """What trains, and what it trains on: sound files are encoded, unless their codes are there."""
    cache = Path(job.data.cache or Path(job.out) / CODES)
    given = None if job.model is None else DuplexLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = tokenizer_for(job, given)
    torch.manual_seed(job.trainer.seed)
    model = given or DuplexLM(new_spec(job.shape, tokenizer, *sizes(job, cache)))
    words = model.spec.text.outputs or model.spec.text.vocab
    require(tokenizer.vocab_size <= words, f"the tokenizer has {tokenizer.vocab_size} entries, the model writes {words}"
                                           ": it is not this model's tokenizer")
    model.tokenizer = tokenizer
    data = DuplexModule(job.data, model.spec, tokenizer, job.trainer.seed, cache)
    data.setup()
    bind(model, data.header, job)
    if given is None and job.shape.hears == "vectors":
        hear_vectors(model, codec_heard(job, data))
    return model.train(), data


def bind(model: DuplexLM, header: Header, job: DuplexJob) -> None:
    """Notes the codec of the conversations, and how to speak. Raises InputError where a model to go on with was trained
    with another codec."""
    before, now = Note.of(model), Note.taken(header)
    require(before is None or before.weights == now.weights,
            f"{job.data.path} was encoded by a codec of other weights than {job.model} was trained with")
    model.generation = {**model.generation, **now.told()}
    if told := job.export.temperatures():
        model.generation[SPEAKING] = {**(model.generation.get(SPEAKING) or {}), **told}


def keep_codec(job: DuplexJob, model: DuplexLM, folder: Path) -> None:
    """Beside a model that does not name its codec, where the codec is at hand."""
    if Note.of(model).name is None and job.data.codec is not None:
        Mimi.from_pretrained(job.data.codec).save_pretrained(folder / CODEC)


def tokenizer_for(job: DuplexJob, model: DuplexLM | None) -> Tokenizer:
    """Raises InputError where there is none."""
    if job.data.tokenizer:
        tokenizer = load_tokenizer(job.data.tokenizer)
        require(tokenizer is not None, f"data.tokenizer {job.data.tokenizer} is no directory with a tokenizer")
        return tokenizer
    require(model.tokenizer is not None, f"{job.model} has no tokenizer: give one with data.tokenizer")
    return model.tokenizer


def sizes(job: DuplexJob, cache: Path) -> tuple[int, int, int]:
    """(own, heard, entries of a codebook): as in the first conversation, no more than the shape says."""
    first, (own, heard) = read_manifest(job.data.path)[0], (job.shape.own, job.shape.heard)
    if first.sound is not None:
        q = Codes(cache, job.data.codec, own, heard).opened().spec.quantizer
        return min(own, q.codebooks), min(heard, q.codebooks), q.size
    headers = [Reader(path).header for path in (first.own, first.heard)]
    return min(own, headers[0].codebooks), min(heard, headers[1].codebooks), headers[0].size


def codec_heard(job: DuplexJob, data: DuplexModule) -> Mimi:
    """Whose vectors a new model hears. Raises InputError where there is none, or another one than of the codes."""
    require(job.data.codec is not None, "shape.hears vectors needs data.codec: codec_small, a directory or a hub name")
    codec = data.codec or Mimi.from_pretrained(job.data.codec, dtype=torch.float32)
    require(codec.fingerprint() == data.header.weights,
            f"{job.data.path} was encoded by a codec of other weights than data.codec {job.data.codec}")
    return codec


def new_spec(shape: DuplexShape, tokenizer: Tokenizer, own: int, heard: int, card: int) -> spec.DuplexSpec:
    """In the layout of Moshi. The text has two tokens more than the tokenizer, if its first ones are words: padding and
    the end of it."""
    def layer(width: int, heads: int, kv_heads: int | None, window: spec.Window, rope: spec.Rope | None) -> spec.Layer:
        plain = {"q_bias": False, "k_bias": False, "v_bias": False, "out_bias": False}
        mixer = spec.Attention(heads=heads, kv_heads=kv_heads or heads, head_dim=width // heads, window=window,
                               rope=rope, **plain)
        mlp = spec.Mlp(hidden=-(-int(width * shape.mlp) // 32) * 32, act="silu", gated=True, up_bias=False,
                       down_bias=False)
        return spec.Layer(mixer=mixer, mlp=mlp, norm=NORM)
    temporal = layer(shape.width, shape.heads, shape.kv_heads, spec.Window(left=shape.context - 1, right=0),
                     spec.Rope(layout="interleaved"))
    deep = layer(shape.deep_width, shape.deep_heads, None, spec.Window(right=0), None)
    sets = min(shape.sets or own, own)
    voices = [[0, *[shape.delay] * (count - 1)][:count] for count in (own, heard)]
    words = tokenizer.vocab_size
    return spec.DuplexSpec(
        text=spec.TextStream(vocab=words + 2, padding=words, word_end=words + 1), card=card, context=shape.context,
        stack=spec.Stack(dim=shape.width, layers=(temporal,) * shape.depth, final_norm=NORM),
        delays=(0, *voices[0], *voices[1]), depth=spec.Depth(
            stack=spec.Stack(dim=shape.deep_width, layers=(deep,) * shape.deep_depth), rank=shape.rank,
            weights=tuple(min(k, sets - 1) for k in range(own))))


def conversations(data: DuplexModule, step: int) -> str:
    """What the batch before this step was made of, in words."""
    places = data.where(step - 1)
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    return f"the conversations at {'; '.join(places[:5])}{more}"


def introduce(job: DuplexJob, data: DuplexModule, model: DuplexLM, checkpoint: Path | None) -> None:
    counts = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
    whole, trained = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
    held: Any = data.validation.frames if data.validation else 0
    print(f"{len(data.training.dialogues)} conversations of {data.training.frames:,} frames, {held:,} frames to "
          f"evaluate on, {whole:.2f} million parameters, {trained:.2f} trained, {job.trainer.max_steps} steps of "
          f"{job.data.batch_size} x {job.data.length} frames"
          + (f"\ncontinuing {checkpoint}" if checkpoint else ""), file=sys.stderr)
